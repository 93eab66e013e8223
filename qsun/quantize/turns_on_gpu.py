"""Turns on a GPU: a tile's inputs are gone through within one kernel, a few outputs to a program.

The same steps as in `compensation.py` and `refinement.py`, where each would be several launches.
Imported where tensors are on a GPU alone: torch brings Triton there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

OUTPUTS = 32  # of a program, which is one warp
# Added and taken away again it rounds a float32 below 2^22 to the nearest integer, halves to even.
ROUNDER = tl.constexpr(1.5 * 2**23)


def compensating_turns(
    left: torch.Tensor,
    scales: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    upper: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's code minus zero, and what each input hands to those after it.

    Float32: `upper` `[turns, turns]`, all others `[turns, out]`, turns a power of 2.
    """
    turns, outputs = left.shape
    steps, errors = torch.empty_like(left), torch.empty_like(left)
    _compensate[triton.cdiv(outputs, OUTPUTS),](
        *(one.contiguous() for one in (left, scales, least, most, upper)),
        steps,
        errors,
        outputs,
        TURNS=turns,
        WIDTH=OUTPUTS,
        num_warps=1,
    )
    return steps, errors


def descending_turns(
    pull: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    gram: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's code minus zero, all of one group, and how far each weight moved.

    Float32: `pull` and `steps` `[turns, out]`, `scale`, `least` and `most` `[out]`, `gram` `[turns,
    turns]`, turns a power of 2.
    """
    turns, outputs = pull.shape
    found, moved = torch.empty_like(pull), torch.empty_like(pull)
    _descend[triton.cdiv(outputs, OUTPUTS),](
        *(one.contiguous() for one in (pull, steps, scale, least, most, gram)),
        found,
        moved,
        outputs,
        TURNS=turns,
        WIDTH=OUTPUTS,
        num_warps=1,
    )
    return found, moved


@triton.jit
def _nearest(wanted, least, most):
    return (tl.minimum(tl.maximum(wanted, least), most) + ROUNDER) - ROUNDER


@triton.jit
def _compensate(
    left,
    scales,
    least,
    most,
    upper,
    steps,
    errors,
    outputs,
    TURNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = columns < outputs
    turns = tl.arange(0, TURNS)
    places = turns[:, None] * outputs + columns[None, :]
    rest = tl.load(left + places, mask=there[None, :], other=0.0)
    for turn in range(TURNS):
        row = turn * outputs + columns
        scale = tl.load(scales + row, mask=there, other=1.0)
        low = tl.load(least + row, mask=there, other=0.0)
        high = tl.load(most + row, mask=there, other=0.0)
        weight = tl.sum(tl.where(turns[:, None] == turn, rest, 0.0), axis=0)
        step = _nearest(tl.div_rn(weight, scale), low, high)
        error = tl.div_rn(weight - step * scale, tl.load(upper + turn * TURNS + turn))
        effect = tl.load(upper + turn * TURNS + turns, mask=turns > turn, other=0.0)
        rest -= effect[:, None] * error[None, :]
        tl.store(steps + row, step, mask=there)
        tl.store(errors + row, error, mask=there)


@triton.jit
def _descend(
    pull,
    steps,
    scales,
    least,
    most,
    gram,
    found,
    moved,
    outputs,
    TURNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = columns < outputs
    turns = tl.arange(0, TURNS)
    places = turns[:, None] * outputs + columns[None, :]
    rest = tl.load(pull + places, mask=there[None, :], other=0.0)
    scale = tl.load(scales + columns, mask=there, other=1.0)
    low = tl.load(least + columns, mask=there, other=0.0)
    high = tl.load(most + columns, mask=there, other=0.0)
    for turn in range(TURNS):
        row = turn * outputs + columns
        before = tl.load(steps + row, mask=there, other=0.0) * scale
        wanted = tl.sum(tl.where(turns[:, None] == turn, rest, 0.0), axis=0)
        wanted = before + tl.div_rn(wanted, tl.load(gram + turn * TURNS + turn))
        step = _nearest(tl.div_rn(wanted, scale), low, high)
        move = step * scale - before
        effect = tl.load(gram + turn * TURNS + turns, mask=turns > turn, other=0.0)
        rest -= effect[:, None] * move[None, :]
        tl.store(found + row, step, mask=there)
        tl.store(moved + row, move, mask=there)
