"""The search for one block: smoothing, if asked for, then stage after stage of linear layers.

Each stage's codes go into the block before the next stage's inputs are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.block import LAYERS, Block, Stage
from qsun.config import SearchConfig
from qsun.quantize.bit_errors import LayerErrors, layer_errors
from qsun.quantize.diagnosis import Diagnosis, Pairs, diagnose
from qsun.quantize.layer_search import Found, Inputs, search_layers
from qsun.quantize.mappings import SMOOTHINGS, assert_kv_neutral
from qsun.quantize.plan import Plan
from qsun.quantize.smoothing import best_scales


class Summed(Protocol):
    """What is summed over a stage's inputs; see `calibrate/moments.py`."""

    gram: torch.Tensor
    cross: torch.Tensor | None
    absolute: torch.Tensor
    rows: int
    weight: float

    @property
    def pairs(self) -> Pairs | None:
        """Some of the rows, with full precision's."""


@dataclass(frozen=True)
class StageGain:
    """Squared output errors before and after smoothing `source`, rounded to nearest."""

    source: str
    before: float
    after: float


@dataclass(frozen=True)
class Smoothed:
    """What smoothing did to a block: each stage's scales, and other tensors by full name."""

    scales: dict[Stage, torch.Tensor]
    others: dict[str, torch.Tensor]
    gains: list[StageGain]


@dataclass(frozen=True)
class BlockFound:
    """A block's quantized layers, what smoothing made of its other tensors, and its gains.

    `diagnoses` are of its stages, in their order.
    """

    layers: list[Found]
    others: dict[str, torch.Tensor]
    gains: list[StageGain]
    diagnoses: list[Diagnosis]


class BlockSearch:
    """The search in one model: `plan` says what, `search` how."""

    def __init__(self, plan: Plan, search: SearchConfig, points: int, dtype: torch.dtype) -> None:
        self._planned = {layer.name for layer in plan.layers}
        self._smoothings = SMOOTHINGS[plan.architecture]
        self._scheme = plan.scheme
        self._search, self._points, self._dtype = search, points, dtype

    def run(
        self,
        index: int,
        block: Block,
        moments_of: Callable[[Stage], Summed],
        restart: Callable[[], None],
    ) -> BlockFound:
        """Quantize the block that `block` holds, in place.

        `moments_of` gives a stage's moments with the block as it is; `restart` forgets what was
        computed of the block so far.
        """
        names = [name for stage in Stage for name in stage.value]
        weights = {name: block.linear(name).weight.float() for name in names}
        smoothed = Smoothed({}, {}, [])
        if self._search.smoothing == "awq":
            smoothed = self._smooth(index, block, weights, moments_of)
            restart()
        found: list[Found] = []
        diagnoses: list[Diagnosis] = []
        for stage in Stage:
            ours = self._ours(index, stage)
            if not ours:
                continue
            summed = moments_of(stage)
            named = {f"{LAYERS}.{index}.{name}": weights[name] for name in ours}
            scales, args = smoothed.scales.get(stage), self._arguments(index, stage)
            layers = search_layers(
                named,
                Inputs(summed.gram, _crossed(summed.cross, scales)),
                args,
                self._search,
                self._dtype,
            )
            for name, one in zip(ours, layers, strict=True):
                block.linear(name).weight.copy_(one.layer.weight(block.device))
            found += layers
            diagnoses.append(diagnose(named, layers, summed, scales, args, self._dtype))
        return BlockFound(found, smoothed.others, smoothed.gains, diagnoses)

    def errors(
        self,
        index: int,
        block: Block,
        moments_of: Callable[[Stage], Summed],
        candidates: Sequence[int],
    ) -> list[list[LayerErrors]]:
        """What each number of bits would do to the layers of each stage, in a block as it is."""
        found = []
        for stage in Stage:
            names = self._ours(index, stage)
            if names:
                weights = {
                    f"{LAYERS}.{index}.{name}": block.linear(name).weight.float() for name in names
                }
                gram = moments_of(stage).gram
                found.append(layer_errors(weights, gram, self._scheme, candidates, self._dtype))
        return found

    def _ours(self, index: int, stage: Stage) -> list[str]:
        """The stage's layers that are quantized, named as within a block."""
        return [name for name in stage.value if f"{LAYERS}.{index}.{name}" in self._planned]

    def _arguments(self, index: int, stage: Stage) -> QuantizationArgs:
        """How a stage's layers are rounded: all to the same bits, for vLLM runs them as one."""
        bits = self._scheme.bits_of(f"{LAYERS}.{index}.{stage.value[0]}")
        return QuantizationArgs(**self._scheme.arguments(bits))

    def _smooth(
        self,
        index: int,
        block: Block,
        weights: dict[str, torch.Tensor],
        moments_of: Callable[[Stage], Summed],
    ) -> Smoothed:
        """Scale `weights` and the block."""
        assert_kv_neutral(smoothing.source for smoothing in self._smoothings)
        by_last = {name.rpartition(".")[2]: name for name in weights}
        done = Smoothed({}, {}, [])
        for smoothing in self._smoothings:
            targets = [by_last[name] for name in smoothing.targets]
            if any(f"{LAYERS}.{index}.{name}" not in self._planned for name in targets):
                continue
            [stage] = [one for one in Stage if targets[0] in one.value]
            summed = moments_of(stage)
            scales = best_scales(
                [weights[name].t() for name in targets],
                summed.gram,
                summed.absolute / summed.weight,
                self._arguments(index, stage),
                self._points,
                self._dtype,
            )
            for name in targets:
                weights[name] = weights[name] * scales.values
                block.linear(name).weight.copy_(weights[name])
            source = by_last.get(smoothing.source)
            if source is None:
                norm = block.layer.get_submodule(smoothing.source)
                norm.weight.copy_(norm.weight.float() / scales.values)
                done.others[f"{LAYERS}.{index}.{smoothing.source}.weight"] = (
                    norm.weight.cpu().clone()
                )
            else:
                weights[source] = weights[source] / scales.values.unsqueeze(1)
                block.linear(source).weight.copy_(weights[source])
            done.scales[stage] = scales.values
            name = f"{LAYERS}.{index}.{smoothing.source}"
            done.gains.append(StageGain(name, scales.before, scales.after))
        return done


def _crossed(cross: torch.Tensor | None, scales: torch.Tensor | None) -> torch.Tensor | None:
    """The cross moments with their exact side divided by a stage's scales, as its inputs are."""
    return cross if cross is None or scales is None else cross / scales.unsqueeze(1)
