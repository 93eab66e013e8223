"""Refinement: codes and scales are taken up again in turn, each against all others as they are.

Coordinate descent on tr(D G D^T), D = what the codes stand for minus the weight: a code moves to
the grid point nearest to the best value for it, a scale to what is best for its group's codes and
the checkpoint's dtype can hold. No step makes the error larger.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qsun.quantize.code_grid import CodeGrid

AT_ONCE = 32  # inputs whose effect on later ones is held back and then made in one product


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
    curvature, rounding = gram.diagonal().tolist(), grid.by_group()
    found_rows, missing_rows = steps.unbind(0), missing.unbind(0)
    for start in range(0, len(steps), AT_ONCE):
        end = min(start + AT_ONCE, len(steps))
        pull = gram[start:end] @ missing
        for at, row in enumerate(pull.unbind(0), start):
            one, found = rounding[at // grid.group_size], found_rows[at]
            before = found * one.scale
            best = torch.add(before, row, alpha=1 / curvature[at])
            one.into(best, found)
            moved = before.neg_().addcmul_(found, one.scale)
            missing_rows[at].sub_(moved)
            pull[at - start + 1 :].addr_(gram[at, at + 1 : end], moved, alpha=-1)
    return steps


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
