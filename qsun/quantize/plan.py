"""The plan: which layer gets which bits and group size. Refuses before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

from qsun.config import QuantizeConfig
from qsun.errors import PlanError, bullet_list
from qsun.quantize.mappings import SMOOTHINGS
from qsun.quantize.plan_limits import (
    bits_limits,
    format_limits,
    indivisible_shards,
    split_fusions,
    unaligned_layers,
)
from qsun.scheme import Scheme, candidate_bits
from qsun.skeleton import LinearShape


@dataclass(frozen=True)
class Plan:
    """What will be quantized and how. Layers are in model order.

    `stored_bits` is None where codes are packed in as many bits as they have. With `target_bits`,
    `layer_bits` are unknown until errors were measured; `bits` is the most that a layer may have.
    """

    architecture: str
    bits: int
    group_size: int
    symmetric: bool
    format: str
    layers: tuple[LinearShape, ...]
    full_precision_layers: tuple[str, ...]
    stored_bits: int | None = None
    target_bits: float | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        """The scheme of the module that it makes."""
        return Scheme(
            self.format,
            self.bits,
            self.group_size,
            self.symmetric,
            self.stored_bits,
            self.layer_bits,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Quantization arguments for `bits`."""
        return self.scheme.arguments(self.bits)

    def with_bits(self, layer_bits: Mapping[str, int]) -> Plan:
        """The plan with each layer's own bits."""
        return replace(self, bits=max(layer_bits.values()), layer_bits=dict(layer_bits))

    @property
    def weight_count(self) -> int:
        """Number of weights in all quantized layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def code_bits(self) -> float:
        """Mean bits of a code; at most so many where layers are still to get theirs."""
        if self.target_bits is not None and not self.layer_bits:
            return self.target_bits
        weights = ((one.in_features * one.out_features, one.name) for one in self.layers)
        bits_of = self.scheme.bits_of
        return sum(count * bits_of(name) for count, name in weights) / self.weight_count

    @property
    def packed_bits(self) -> float:
        """Mean bits that a code takes on disk."""
        return self.code_bits if self.stored_bits is None else float(self.stored_bits)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: the code, plus its share of a 16-bit scale and a zero."""
        zero_bits = 0 if self.symmetric else self.packed_bits
        return self.packed_bits + (16 + zero_bits) / self.group_size

    @property
    def layer_bytes(self) -> int:
        """Bytes that the quantized layers will take on disk."""
        return round(self.weight_count * self.bits_per_weight / 8)


def make_plan(
    config: Mapping[str, Any], shapes: Sequence[LinearShape], settings: QuantizeConfig
) -> Plan:
    """Decide, from shapes alone.

    Raises:
        PlanError: names every layer and setting that does not fit, and what would.
    """
    architecture = config["architectures"][0]
    check_architecture(config)
    candidates = candidate_bits(settings.format, settings.stored_bits)
    problems = _unused_patterns(shapes, settings)
    kept = [shape for shape in shapes if _kept(shape.name, settings.keep_full_precision)]
    layers = [shape for shape in shapes if shape not in kept]
    if not layers:
        problems.append("keep_full_precision leaves no layer to quantize")
    problems += split_fusions(layers, kept)
    problems += indivisible_shards(config, layers, settings.tensor_parallel)
    if not problems:
        problems += unaligned_layers(layers, settings)
    problems += format_limits(layers, settings) + bits_limits(settings)
    if problems:
        raise PlanError(f"this quantization cannot be done:\n{bullet_list(problems)}")
    return Plan(
        architecture=architecture,
        bits=settings.bits if settings.target_bits is None else max(candidates),
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        format=settings.format,
        layers=tuple(layers),
        full_precision_layers=tuple(shape.name for shape in kept),
        stored_bits=settings.stored_bits
        if settings.target_bits is not None or settings.stored_bits != settings.bits
        else None,
        target_bits=settings.target_bits,
    )


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise `PlanError` for an architecture whose cache qsun does not know how to keep intact."""
    architecture = config["architectures"][0]
    if architecture not in SMOOTHINGS:
        raise PlanError(
            f"architecture {architecture} is not supported. Supported: {', '.join(SMOOTHINGS)}.\n"
            "For another, qsun must first know which of its layers feed the KV cache "
            "(qsun/quantize/mappings.py)."
        )
    if config.get("quantization_config"):
        raise PlanError("the base model is already quantized: start from its full precision form")


def _kept(name: str, patterns: Iterable[str]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatch(name, pattern) or fnmatch(last, pattern) for pattern in patterns)


def _unused_patterns(shapes: Sequence[LinearShape], settings: QuantizeConfig) -> list[str]:
    return [
        f"keep_full_precision: {pattern!r} matches no linear layer "
        f"(they are called like {shapes[0].name})"
        for pattern in settings.keep_full_precision
        if not any(_kept(shape.name, [pattern]) for shape in shapes)
    ]
