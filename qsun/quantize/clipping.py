"""Clipping: ranges narrower than a group's extremes, chosen where the layer's outputs gain.

A group is judged by its own block of the Gram matrix: the error of its part of the outputs.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize.code_grid import CodeGrid, grid_of

NARROWEST, STEPS = 0.4, 12  # of a group's extremes, in so many even steps from 1


def whole_range(weight: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype) -> CodeGrid:
    """The grid that reaches every group's extremes; `weight` float32 `[in, out]`."""
    grouped = _grouped(weight, args)
    return grid_of(grouped.amin(dim=1), grouped.amax(dim=1), args, dtype)


def best_ranges(
    weight: torch.Tensor, gram: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> CodeGrid:
    """The grid of least error over the tried widths, for each group and output by itself."""
    grouped = _grouped(weight, args)
    groups, size, _ = grouped.shape
    blocks = torch.stack(
        [gram[at : at + size, at : at + size] for at in range(0, groups * size, size)]
    )
    least, most = grouped.amin(dim=1), grouped.amax(dim=1)
    best = grid_of(least, most, args, dtype)
    least_error = _errors(best, grouped, blocks)
    for step in range(1, STEPS):
        width = 1 - (1 - NARROWEST) * step / STEPS
        tried = grid_of(least * width, most * width, args, dtype)
        errors = _errors(tried, grouped, blocks)
        better = errors < least_error
        least_error = torch.where(better, errors, least_error)
        best = CodeGrid(
            torch.where(better, tried.scales, best.scales),
            torch.where(better, tried.zeros, best.zeros),
            best.low,
            best.high,
            best.group_size,
            best.dtype,
        )
    return best


def _errors(grid: CodeGrid, grouped: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Squared output error of each group, float32 `[groups, out]`."""
    steps = grid.nearest(grouped)
    wrong = steps.mul_(grid.scales.unsqueeze(1)).sub_(grouped)
    return (torch.bmm(blocks, wrong) * wrong).sum(dim=1)


def _grouped(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    return weight.reshape(-1, args.group_size or len(weight), weight.shape[1])
