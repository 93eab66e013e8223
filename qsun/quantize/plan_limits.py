"""The plan's limits: what of layers, shards, formats and bits does not fit, and what would.

Each function gives the problems it finds, none where all is well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qsun.config import QuantizeConfig
from qsun.errors import bullet_list
from qsun.quantize.mappings import FUSED
from qsun.scheme import AWQ_BITS, candidate_bits
from qsun.skeleton import LinearShape

GROUP_SIZES = (128, 64, 32)
ROW_PARALLEL = ("o_proj", "down_proj")  # vLLM shards their inputs, every other layer's outputs
AWQ_WORD = 8  # output channels in one int32 of AutoAWQ's layout


def split_fusions(layers: Sequence[LinearShape], kept: Sequence[LinearShape]) -> list[str]:
    """Layers that vLLM runs as one matrix, of which only some stay in full precision."""
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


def indivisible_shards(
    config: Mapping[str, Any], layers: Sequence[LinearShape], tensor_parallel: int
) -> list[str]:
    """Heads or layers that so many GPUs cannot share evenly."""
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


def unaligned_layers(layers: Sequence[LinearShape], settings: QuantizeConfig) -> list[str]:
    """Layers whose inputs, or a shard of them, are no whole number of groups."""
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


def bits_limits(settings: QuantizeConfig) -> list[str]:
    """Bits that codes cannot have, or cannot be packed in."""
    stored, target = settings.stored_bits, settings.target_bits
    if target is None:
        if stored is None or stored >= settings.bits:
            return []
        return [f"stored_bits {stored} does not hold codes of {settings.bits} bits"]
    problems = []
    if settings.engine != "qsun":
        problems.append(
            f"target_bits is engine qsun's, and engine is {settings.engine}: only a search on "
            "moments knows each layer's error at every number of bits"
        )
    most = max(candidate_bits(settings.format, stored))
    if target > most:
        problems.append(f"target_bits {target} is above the {most} bits that a layer may have")
    return problems


def format_limits(layers: Sequence[LinearShape], settings: QuantizeConfig) -> list[str]:
    """What the format cannot hold."""
    if settings.format != "awq":
        return []
    problems = []
    stored = settings.stored_bits or (settings.bits if settings.target_bits is None else None)
    if stored != AWQ_BITS or settings.symmetric:
        problems.append(
            "format awq (AutoAWQ GEMM) packs asymmetric codes in 4 bits only: use "
            "compressed-tensors, or symmetric false with bits 4, or with stored_bits 4 and fewer"
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
