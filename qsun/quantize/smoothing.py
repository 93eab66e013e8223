"""AWQ's scales, searched on the Gram matrix alone.

Source: AWQ, arXiv 2306.00978; the grid and its two kinds of scales as in llm-compressor 0.14. A
candidate's error is that of its layers' outputs, tr(D G D^T), where llm-compressor runs the block
on all samples again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize.clipping import whole_range

LEAST_WEIGHT, LEAST_SCALE = 1e-4, 1e-4


@dataclass(frozen=True)
class Scales:
    """Channel scales, float32 `[in]`, and the squared output error without and with them."""

    values: torch.Tensor
    before: float
    after: float


def best_scales(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    absolute: torch.Tensor,
    args: QuantizationArgs,
    points: int,
    dtype: torch.dtype,
) -> Scales:
    """The scales of least error for layers of the same inputs, weights float32 `[in, out]`.

    `absolute` `[in]` is the mean absolute input.
    """
    joined = torch.cat(list(weights), dim=1)
    none = torch.ones(len(joined), device=joined.device)
    before = scaled_error(joined, gram, none, args, dtype)
    best = Scales(none, before, before)
    for scales in candidates(joined, absolute, args, points):
        error = scaled_error(joined, gram, scales, args, dtype)
        if error < best.after:
            best = Scales(scales, before, error)
    return best


def scaled_error(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scales: torch.Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
) -> float:
    """Squared output error of a weight `[in, out]` that is scaled, rounded and scaled back."""
    scaled = weight * scales.unsqueeze(1)
    grid = whole_range(scaled, args, dtype)
    wrong = grid.values(grid.rounded(scaled)) / scales.unsqueeze(1) - weight
    return float(((gram @ wrong) * wrong).sum())


def candidates(
    weight: torch.Tensor, absolute: torch.Tensor, args: QuantizationArgs, points: int
) -> Iterator[torch.Tensor]:
    """Every scale vector of the grid: powers of the inputs' means, alone and over the weights'."""
    grouped = weight.abs().reshape(-1, args.group_size or len(weight), weight.shape[1])
    share = grouped / grouped.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    weights = share.reshape(weight.shape).mean(dim=1)
    for point in range(points):
        ratio = point / points
        powered = absolute.pow(ratio)
        for scales in (powered, powered / (weights.pow(1 - ratio) + LEAST_WEIGHT)):
            held = scales.clamp_min(LEAST_SCALE)
            yield held / (held.max() * held.min()).sqrt()
