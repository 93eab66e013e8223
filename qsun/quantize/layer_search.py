"""The search for codes: the linear layers of one stage, from weights and moments to what is stored.

Ranges, then codes: rounded one by one or with compensation, then refined. All on the Gram matrix
of the inputs; with moments crossed with full precision's, the codes also make up for what earlier
layers' rounding did to the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.config import SearchConfig
from qsun.decode_checkpoint import QuantizedLayer
from qsun.quantize.clipping import best_ranges, whole_range
from qsun.quantize.code_grid import CodeGrid, columns
from qsun.quantize.compensation import compensated, damped, inverted
from qsun.quantize.refinement import refined


@dataclass(frozen=True)
class Found:
    """A layer as it will be stored, and its relative output errors.

    `error` is of what was found, `rounded_error` of round-to-nearest, both on the stage's inputs.
    """

    layer: QuantizedLayer
    error: float
    rounded_error: float


@dataclass(frozen=True)
class Inputs:
    """What is known of a stage's inputs: `gram` and `cross` as in `calibrate/moments.py`."""

    gram: torch.Tensor
    cross: torch.Tensor | None


def search_layers(
    weights: Mapping[str, torch.Tensor],
    inputs: Inputs,
    args: QuantizationArgs,
    search: SearchConfig,
    dtype: torch.dtype,
) -> list[Found]:
    """Quantize layers of the same inputs; weights float32 `[out, in]` by the layers' names."""
    weight = torch.cat(list(weights.values())).t().contiguous()
    gram = damped(inputs.gram, search.damping)
    inverse, target = inverted(gram), weight
    if inputs.cross is not None:
        target = weight + corrections(weight, inputs.gram, inverse, inputs.cross)
    if search.clip:
        grid = best_ranges(target, inputs.gram, args, dtype)
    else:
        grid = whole_range(target, args, dtype)
    if search.rounding == "compensated":
        steps = compensated(target, inputs.gram, inverse, grid)
    else:
        steps = grid.rounded(target)
    grid, steps = refined(target, gram, grid, steps, search.sweeps)
    return _split(weights, weight, target, grid, steps, inputs.gram, args, dtype)


def corrections(
    weight: torch.Tensor, gram: torch.Tensor, inverse: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """What to add to `weight` so that it gives the full-precision outputs on the inputs at hand.

    Least squares of X̂ V against X W, X̂ the inputs at hand, X the exact ones: V - W is
    (X̂'X̂ + damping)^-1 (X̂'X - X̂'X̂) W. Float32 `[in, out]`.
    """
    return inverse @ ((cross.t() - gram) @ weight)


def output_error(gram: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """Squared output error of each output, float32 `[out]`; `wrong` `[in, out]`."""
    return ((gram @ wrong) * wrong).sum(dim=0).clamp_min(0)


def _split(
    weights: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    target: torch.Tensor,
    grid: CodeGrid,
    steps: torch.Tensor,
    gram: torch.Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
) -> list[Found]:
    errors = output_error(gram, grid.values(steps) - target)
    plain = whole_range(weight, args, dtype)
    rounded = output_error(gram, plain.values(plain.rounded(weight)) - weight)
    outputs = output_error(gram, weight)
    found, start = [], 0
    for name, one in weights.items():
        rows = slice(start, start + len(one))
        start += len(one)
        whole = outputs[rows].sum().clamp_min(torch.finfo(torch.float32).tiny)
        found.append(
            Found(
                columns(grid, rows).layer(name, steps[:, rows]),
                float((errors[rows].sum() / whole).sqrt()),
                float((rounded[rows].sum() / whole).sqrt()),
            )
        )
    return found
