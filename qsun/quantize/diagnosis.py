"""Diagnosis: numbers that say why a layer's error is what it is, taken while its stage is searched.

A layer's error is a product, and nothing is left over:

    error = weight_rounding * rounding_reach / weight_reach * (error / rtn_error)

The reach of a matrix M is ||X M^T|| over what it were if X spread its energy evenly over all
directions. Round-to-nearest's error is the first three factors, and the last is what the search
leaves of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize.clipping import whole_range
from qsun.quantize.compensation import damped
from qsun.quantize.layer_search import Found, output_error

DAMPING = 0.01  # of the mean diagonal, so that few positions do not make it singular


class Pairs(Protocol):
    """Rows of inputs and the same in full precision; see `calibrate/row_pairs.py`."""

    @property
    def inputs(self) -> torch.Tensor:
        """Float32 `[rows, in]`."""

    @property
    def exact(self) -> torch.Tensor:
        """Float32 `[rows, in]`."""


class SummedPairs(Protocol):
    """What is needed of a stage's moments; see `calibrate/moments.py`."""

    gram: torch.Tensor
    rows: int

    @property
    def pairs(self) -> Pairs | None:
        """Some of the rows, with full precision's; None where all are full precision's."""


@dataclass(frozen=True)
class StageNumbers:
    """The inputs of some layers, over `positions` positions.

    `directions` is the effective rank of their Gram matrix G, tr(G)^2 / ||G||^2, of at most
    `inputs`. `independence` is the share of the inputs' energy that is in none of the inputs of
    less energy: 1 where no input tells of another, and rounding cannot be made up for.
    `largest_channel` is the share of the energy that one input has.
    `input_change` is the relative difference from full precision's inputs, None where the search
    has no others.
    """

    layers: list[str]
    inputs: int
    positions: int
    directions: float
    independence: float
    largest_channel: float
    input_change: float | None


@dataclass(frozen=True)
class LayerNumbers:
    """One layer: the factors of its error, and its error against full precision's outputs.

    `weight_rounding` is ||R|| / ||W|| of round-to-nearest's R = V - W. `group_width` is the root
    mean square of its groups' ranges over that of its weights. `inherited_error` is what the
    changed inputs do to the outputs of W, `total_error` what they and the codes do together, both
    relative; None where the inputs are full precision's.
    """

    weight_rounding: float
    rounding_reach: float
    weight_reach: float
    group_width: float
    inherited_error: float | None
    total_error: float | None


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one stage, and of its layers by their names."""

    stage: StageNumbers
    layers: dict[str, LayerNumbers]


def diagnose(
    weights: Mapping[str, torch.Tensor],
    found: Sequence[Found],
    summed: SummedPairs,
    scales: torch.Tensor | None,
    args: QuantizationArgs,
    dtype: torch.dtype,
) -> Diagnosis:
    """Numbers of layers of the same inputs; `weights` float32 `[out, in]` by the layers' names.

    The exact rows are divided by a smoothing's `scales` `[in]`, as the others are already.
    """
    rows, pairs = None, summed.pairs
    if pairs is not None:
        rows = pairs.inputs, pairs.exact if scales is None else pairs.exact / scales
    layers = {
        one.layer.name: _layer(weights[one.layer.name], one, summed.gram, rows, args, dtype)
        for one in found
    }
    return Diagnosis(_stage([*weights], summed.gram, summed.rows, rows), layers)


def _stage(
    names: list[str],
    gram: torch.Tensor,
    positions: int,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> StageNumbers:
    energies = gram.diagonal()
    whole = float(energies.sum())
    change = None
    if rows is not None:
        inputs, exact = rows
        change = ratio(float((inputs - exact).norm()), float(exact.norm()))
    return StageNumbers(
        layers=names,
        inputs=len(gram),
        positions=positions,
        directions=ratio(whole**2, float(gram.square().sum())),
        independence=independence(gram),
        largest_channel=ratio(float(energies.max()), whole),
        input_change=change,
    )


def independence(gram: torch.Tensor, damping: float = DAMPING) -> float:
    """The share of energy that is left of each input when those of less energy are subtracted.

    These are the directions in which error compensation cannot move an input's rounding error:
    it goes from the most energy to the least, and what comes later makes up for it.
    """
    order = gram.diagonal().argsort(stable=True)
    held = damped(gram, damping)[order][:, order]
    left = torch.linalg.cholesky(held).diagonal().square()
    return float(left.sum() / held.diagonal().sum())


def _layer(
    weight: torch.Tensor,
    found: Found,
    gram: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
    args: QuantizationArgs,
    dtype: torch.dtype,
) -> LayerNumbers:
    turned = weight.t().contiguous()
    plain = whole_range(turned, args, dtype)
    rounding = plain.values(plain.rounded(turned)) - turned
    grouped = turned.reshape(len(plain.scales), plain.group_size, -1)
    widths = (grouped.amax(dim=1) - grouped.amin(dim=1)).square().mean().sqrt()
    inherited = total = None
    if rows is not None:
        inputs, exact = rows
        wanted = exact @ turned
        size = float(wanted.norm())
        stored = found.layer.weight(weight.device).t()
        inherited = ratio(float((inputs @ turned - wanted).norm()), size)
        total = ratio(float((inputs @ stored - wanted).norm()), size)
    return LayerNumbers(
        weight_rounding=ratio(float(rounding.norm()), float(turned.norm())),
        rounding_reach=reach(gram, rounding),
        weight_reach=reach(gram, turned),
        group_width=ratio(float(widths), float(turned.square().mean().sqrt())),
        inherited_error=inherited,
        total_error=total,
    )


def reach(gram: torch.Tensor, matrix: torch.Tensor) -> float:
    """Outputs of `matrix` `[in, out]` over what evenly spread inputs would give; 0 if it is 0."""
    outputs = math.sqrt(float(output_error(gram, matrix).sum()))
    mean = float(gram.diagonal().mean())
    return ratio(outputs, float(matrix.norm()) * math.sqrt(mean))


def ratio(part: float, whole: float) -> float:
    """`part` over `whole`, 0 where there is nothing."""
    return part / whole if whole > 0 else 0.0
