"""The table of errors: what each number of bits would do to each layer's outputs.

Ranges are clipped and weights rounded to nearest, which is quick; codes are searched for once the
bits are known. Errors are squared: tr(D G D^T), D = rounded minus exact weight, on one Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize.bit_allocation import StageLosses
from qsun.quantize.clipping import best_ranges
from qsun.quantize.layer_search import output_error
from qsun.scheme import Scheme


@dataclass(frozen=True)
class LayerErrors:
    """One layer: `errors` by bits and `outputs`, both squared and summed over all positions."""

    name: str
    weights: int
    outputs: float
    errors: Mapping[int, float]

    def relative(self, bits: int) -> float:
        """The share of its squared outputs that is wrong."""
        return self.errors[bits] / self.outputs if self.outputs > 0 else 0.0


def layer_errors(
    weights: Mapping[str, torch.Tensor],
    gram: torch.Tensor,
    scheme: Scheme,
    candidates: Sequence[int],
    dtype: torch.dtype,
) -> list[LayerErrors]:
    """Errors of layers of the same inputs; weights float32 `[out, in]` by the layers' names."""
    weight = torch.cat(list(weights.values())).t().contiguous()
    outputs = output_error(gram, weight)
    errors = {}
    for bits in candidates:
        grid = best_ranges(weight, gram, QuantizationArgs(**scheme.arguments(bits)), dtype)
        errors[bits] = output_error(gram, grid.values(grid.rounded(weight)) - weight)
    found, start = [], 0
    for name, one in weights.items():
        rows = slice(start, start + len(one))
        start += len(one)
        found.append(
            LayerErrors(
                name,
                one.numel(),
                float(outputs[rows].sum()),
                {bits: float(error[rows].sum()) for bits, error in errors.items()},
            )
        )
    return found


def stage_losses(layers: Sequence[LayerErrors]) -> StageLosses:
    """What each number of bits costs layers that share theirs: the sum of their relative errors."""
    return StageLosses(
        tuple(layer.name for layer in layers),
        sum(layer.weights for layer in layers),
        {bits: sum(layer.relative(bits) for layer in layers) for bits in layers[0].errors},
    )
