"""Refinement: codes and scales are taken up again in turn, each against all others as they are.

Coordinate descent on tr(D G D^T), D = what the codes stand for minus the weight: a code moves to
the grid point nearest to the best value for it, a scale to what is best for its group's codes and
the checkpoint's dtype can hold. No step makes the error larger.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qsun.quantize.code_grid import CodeGrid, Rounding
from qsun.quantize.turns import AT_ONCE, one_thread


def refined(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, steps: torch.Tensor, sweeps: int
) -> tuple[CodeGrid, torch.Tensor]:
    """Grid and code minus zero after so many sweeps over codes, scales between them.

    `weight` and `steps` float32 `[in, out]`; `gram` as damped for the compensation.
    """
    for sweep in range(sweeps):
        if sweep:
            grid = _refit_scales(weight, gram, grid, steps)
        steps = _sweep(weight, gram, grid, steps)
    return grid, steps


def _sweep(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, steps: torch.Tensor
) -> torch.Tensor:
    steps, missing = steps.clone(), weight - grid.values(steps)
    groups = torch.arange(len(grid.scales), device=steps.device)
    rounding = grid.by_group(groups)
    for start in range(0, len(steps), AT_ONCE):
        tile = slice(start, start + AT_ONCE)
        pull, within = gram[tile] @ missing, gram[tile, tile]
        found, moved = take_turns(pull, steps[tile], rounding[start // grid.group_size], within)
        steps[tile] = found
        missing[tile] -= moved
    return steps


def take_turns(
    pull: torch.Tensor, steps: torch.Tensor, one: Rounding, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's code minus zero, all of one group, and how far each weight moved."""
    if pull.is_cuda:
        from qsun.quantize.turns_on_gpu import descending_turns

        return descending_turns(pull, steps, *one, gram)
    found, moved, curvature = steps.clone(), torch.empty_like(pull), gram.diagonal().tolist()
    with one_thread():
        for at, (row, code, move) in enumerate(zip(pull, found, moved, strict=True)):
            before = code * one.scale
            one.into(torch.add(before, row, alpha=1 / curvature[at]), code)
            torch.addcmul(before.neg_(), code, one.scale, out=move)
            pull[at + 1 :].addr_(gram[at, at + 1 :], move, alpha=-1)
    return found, moved


def _refit_scales(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, steps: torch.Tensor
) -> CodeGrid:
    scales, missing = grid.scales.clone(), weight - grid.values(steps)
    for group in range(len(scales)):
        rows = slice(group * grid.group_size, (group + 1) * grid.group_size)
        ours, scale = steps[rows], scales[group]
        wanted = ((gram[rows] @ missing) * ours).sum(dim=0)
        held = ((gram[rows, rows] @ ours) * ours).sum(dim=0)
        best = (
            (scale + wanted / held.clamp_min(torch.finfo(held.dtype).tiny)).to(grid.dtype).float()
        )
        change = best - scale
        gains = (best > 0) & (change * (change * held - 2 * wanted) < 0)
        change = torch.where(gains, change, 0.0)
        missing[rows] -= ours * change
        scales[group] = torch.where(gains, best, scale)
    return replace(grid, scales=scales)
