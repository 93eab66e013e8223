"""The plan: which layer gets which bits and group size. Refuses before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from qsun.config import QuantizeConfig
from qsun.errors import PlanError, bullet_list
from qsun.quantize.mappings import FUSED, SMOOTHINGS
from qsun.skeleton import LinearShape

GROUP_SIZES = (128, 64, 32)
ROW_PARALLEL = ("o_proj", "down_proj")  # vLLM shards their inputs, every other layer's outputs
AWQ_WORD = 8  # output channels in one int32 of AutoAWQ's layout


@dataclass(frozen=True)
class Plan:
    """What will be quantized and how. Layers are in model order."""

    architecture: str
    bits: int
    group_size: int
    symmetric: bool
    format: str
    layers: tuple[LinearShape, ...]
    full_precision_layers: tuple[str, ...]

    @property
    def weight_count(self) -> int:
        """Number of weights in all quantized layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: the code, plus its share of a 16-bit scale and a zero."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (16 + zero_bits) / self.group_size

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
    problems = _unused_patterns(shapes, settings)
    kept = [shape for shape in shapes if _kept(shape.name, settings.keep_full_precision)]
    layers = [shape for shape in shapes if shape not in kept]
    if not layers:
        problems.append("keep_full_precision leaves no layer to quantize")
    problems += _split_fusions(layers, kept)
    problems += _indivisible_shards(config, layers, settings.tensor_parallel)
    if not problems:
        problems += _unaligned_layers(layers, settings)
    problems += _format_limits(layers, settings)
    if problems:
        raise PlanError(f"this quantization cannot be done:\n{bullet_list(problems)}")
    return Plan(
        architecture=architecture,
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        format=settings.format,
        layers=tuple(layers),
        full_precision_layers=tuple(shape.name for shape in kept),
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


def _split_fusions(layers: Sequence[LinearShape], kept: Sequence[LinearShape]) -> list[str]:
    quantized = {shape.name for shape in layers}
    problems = []
    for shape in kept:
        parent, _, last = shape.name.rpartition(".")
        for fused in FUSED:
            mates = [name for name in fused if f"{parent}.{name}" in quantized]
            if last in fused and mates:
                problems.append(
                    f"{shape.name} would stay in full precision but {', '.join(mates)} beside it "
                    "would not: vLLM runs them as one matrix, so keep all of them or none"
                )
    return problems


def _indivisible_shards(
    config: Mapping[str, Any], layers: Sequence[LinearShape], tensor_parallel: int
) -> list[str]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    problems = []
    if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        problems.append(
            f"tensor_parallel {tensor_parallel} does not divide the model's {heads} attention "
            f"heads and {kv_heads} KV heads"
        )
    uneven = [layer for layer in layers if _split_features(layer) % tensor_parallel]
    if uneven:
        problems.append(
            f"tensor_parallel {tensor_parallel} does not divide {len(uneven)} layers, "
            f"{uneven[0].name} ({_split_features(uneven[0])} features) first"
        )
    return problems


def _row_parallel(layer: LinearShape) -> bool:
    return layer.name.rpartition(".")[2] in ROW_PARALLEL


def _split_features(layer: LinearShape) -> int:
    return layer.in_features if _row_parallel(layer) else layer.out_features


def _unaligned_layers(layers: Sequence[LinearShape], settings: QuantizeConfig) -> list[str]:
    offenders = [
        layer for layer in layers if not _fits(layer, settings.group_size, settings.tensor_parallel)
    ]
    if not offenders:
        return []
    fitting = [
        str(size)
        for size in GROUP_SIZES
        if all(_fits(layer, size, settings.tensor_parallel) for layer in layers)
    ]
    shards = settings.tensor_parallel
    remedy = (
        f"group_size {' or '.join(fitting)} fits every layer"
        if fitting
        else "no group size fits every layer: list these under keep_full_precision"
    )
    widths = sorted({_shard_width(layer, shards) for layer in offenders})
    sharding = f", sharded {shards} ways" if shards > 1 else ""
    named = bullet_list(
        (f"{layer.name} ({_shard_width(layer, shards)} inputs)" for layer in offenders), at_most=4
    )
    return [
        f"group_size {settings.group_size} does not divide the inputs of {len(offenders)} of "
        f"{len(layers)} layers ({', '.join(map(str, widths))} inputs{sharding}); {remedy}:\n"
        + "\n".join(f"  {line}" for line in named.splitlines())
    ]


def _shard_width(layer: LinearShape, tensor_parallel: int) -> int:
    return layer.in_features // (tensor_parallel if _row_parallel(layer) else 1)


def _fits(layer: LinearShape, group_size: int, tensor_parallel: int) -> bool:
    return _shard_width(layer, tensor_parallel) % group_size == 0


def _format_limits(layers: Sequence[LinearShape], settings: QuantizeConfig) -> list[str]:
    if settings.format != "awq":
        return []
    problems = []
    if settings.bits != 4 or settings.symmetric:
        problems.append(
            "format awq (AutoAWQ GEMM) holds 4-bit asymmetric codes only: "
            "use compressed-tensors, or bits 4 and symmetric false"
        )
    narrow = [
        layer.name for layer in layers if layer.out_features % (AWQ_WORD * settings.tensor_parallel)
    ]
    if narrow:
        problems.append(
            f"format awq packs {AWQ_WORD} output channels a word: {len(narrow)} layers do not "
            f"fill whole words, {narrow[0]} first; use compressed-tensors"
        )
    return problems
