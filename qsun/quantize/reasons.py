"""Reasons: why the worst layers are worse than the typical one, decided by stated rules.

A layer's error is the product of four factors (`diagnosis.py`). Each is compared with its geometric
mean over all layers, the typical one, so that a layer's excess is the product of the factors'
excesses. The factor that makes at least half of it, as logarithms go, is the reason; where none
does, there is no single one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.quantize.tables import percent

WORST = 10
SHARE = 0.5  # of the excess, that a factor must make alone
# Positions for each input below which errors are of few positions: with 3.9, SmolLM2's at 3 bits
# (damping 0.01) were 1.3 times as large on other text of the same sources, with 1.5 1.8 times.
FEW = 4

Layer = Mapping[str, Any]  # a layer's result, as a record has it


@dataclass(frozen=True)
class Factor:
    """One factor of the error: its word, and its value in a layer whose numbers are known."""

    word: str
    value: Callable[[Layer], float]


FACTORS = (
    Factor("weights", lambda layer: layer["numbers"]["weight_rounding"]),
    Factor("inputs", lambda layer: layer["numbers"]["rounding_reach"]),
    Factor("outputs", lambda layer: _inverse(layer["numbers"]["weight_reach"])),
    Factor("search", lambda layer: layer["error"] * _inverse(layer["rtn_error"])),
)


@dataclass(frozen=True)
class Reason:
    """Why a layer is bad: its excess over the typical error, that of each factor, and in words.

    Without numbers there are no factors.
    """

    layer: Layer
    excess: float
    factors: dict[str, float]
    text: str


@dataclass(frozen=True)
class Typical:
    """Geometric means over all layers in which they are defined."""

    error: float
    factors: dict[str, float]


def typical(layers: Sequence[Layer]) -> Typical:
    """The typical error and factors; 0 where no layer has any."""
    known = [layer for layer in layers if has_factors(layer)]
    factors = {one.word: geometric_mean([one.value(layer) for layer in known]) for one in FACTORS}
    return Typical(geometric_mean([layer["error"] for layer in known or layers]), factors)


def worst_layers(
    layers: Sequence[Layer], stages: Sequence[Mapping[str, Any]], count: int = WORST
) -> list[Reason]:
    """The layers of the largest errors, the worst first, with their reasons."""
    usual = typical(layers)
    stage_of = {name: stage for stage in stages for name in stage["layers"]}
    found = []
    for layer in sorted(layers, key=lambda layer: -layer["error"])[:count]:
        excess = layer["error"] / usual.error if usual.error else 1.0
        stage = stage_of.get(layer["name"])
        if stage is None or not has_factors(layer):
            text = "not known" if stage is None else "no single cause: round-to-nearest is exact"
            found.append(Reason(layer, excess, {}, text))
            continue
        factors = {one.word: one.value(layer) / usual.factors[one.word] for one in FACTORS}
        text = _text(layer, stage, excess, factors, layers, stages)
        found.append(Reason(layer, excess, factors, text))
    return found


def _text(
    layer: Layer,
    stage: Mapping[str, Any],
    excess: float,
    factors: Mapping[str, float],
    layers: Sequence[Layer],
    stages: Sequence[Mapping[str, Any]],
) -> str:
    if excess <= 1:
        return "no worse than the typical layer"
    main = max(factors, key=lambda word: factors[word])
    if math.log(factors[main]) < SHARE * math.log(excess):
        return "no single cause"
    if main == "weights":
        return _weights(layer, layers)
    if main == "inputs":
        return (
            "rounding falls on the strong inputs: one of "
            f"{stage['inputs']:,} holds {percent(stage['largest_channel'])} of their energy"
        )
    if main == "outputs":
        reach = layer["numbers"]["weight_reach"]
        usual = geometric_mean([one["numbers"]["weight_reach"] for one in layers if one["numbers"]])
        return (
            f"outputs small against the inputs: {reach:.2f} of what its weights would give inputs "
            f"that are spread evenly (typical {usual:.2f})"
        )
    return _search(layer, stage, stages)


def _weights(layer: Layer, layers: Sequence[Layer]) -> str:
    bits = sum(one["bits"] for one in layers) / len(layers)
    if layer["bits"] < bits:
        return f"{layer['bits']} bits, where layers have {bits:.1f} on average"
    width = layer["numbers"]["group_width"]
    usual = geometric_mean([one["numbers"]["group_width"] for one in layers if one["numbers"]])
    return (
        f"weights far apart within their groups: a range is {width:.1f} times their root mean "
        f"square (typical {usual:.1f})"
    )


def _search(layer: Layer, stage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    share = percent(layer["error"] / layer["rtn_error"])
    left = f"the search leaves {share} of round-to-nearest's error"
    usual = geometric_mean([one["independence"] for one in stages])
    if stage["independence"] <= usual:
        return left
    return (
        f"inputs tell little of each other: {percent(stage['independence'])} of their energy is in "
        f"no weaker ones (typical {percent(usual)}), and {left}"
    )


def few_positions(stages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The stages that have seen few positions for their inputs: their errors look too small."""
    return [stage for stage in stages if stage["positions"] < FEW * stage["inputs"]]


def has_factors(layer: Layer) -> bool:
    """Whether all factors of a layer's error are known, and none is 0."""
    if layer.get("numbers") is None or not layer["rtn_error"]:
        return False
    return all(factor.value(layer) > 0 for factor in FACTORS)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of what is above 0; 0 if nothing is."""
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def _inverse(value: float) -> float:
    return 1 / value if value else 0.0
