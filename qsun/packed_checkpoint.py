"""compressed-tensors' pack-quantized checkpoint, written shard by shard as layers come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from qsun.decode_checkpoint import QuantizedLayer
from qsun.files import write_json
from qsun.scheme import Scheme

SHARD_BYTES = 2 * 10**9  # what is held in memory at a time
FORMAT = "pack-quantized"
Named = tuple[str, torch.Tensor]


def packed_tensors(layer: QuantizedLayer, scheme: Scheme) -> dict[str, torch.Tensor]:
    """A layer as compressed-tensors' three tensors, four with zeros."""
    bits = scheme.stored_of(layer.name)
    packed = {
        f"{layer.name}.weight_packed": pack_to_int32(layer.codes, bits),
        f"{layer.name}.weight_scale": layer.scales,
        f"{layer.name}.weight_shape": torch.tensor(layer.codes.shape),
    }
    if not scheme.symmetric:
        zeros = pack_to_int32(layer.zeros, bits, packed_dim=0)
        packed[f"{layer.name}.weight_zero_point"] = zeros.contiguous()
    return packed


def write_packed(
    others: Iterable[Named],
    layers: Iterable[QuantizedLayer],
    config: Mapping[str, Any],
    scheme: Scheme,
    full_precision: Sequence[str],
    folder: Path,
) -> None:
    """Write weights and config; `others` belong to no quantized layer, `config` is the base's."""
    written = _write_shards(_all_tensors(others, layers, scheme), folder)
    _name_shards(written, folder)
    quantization = QuantizationConfig(
        config_groups=_groups(scheme),
        format=FORMAT,
        ignore=list(full_precision),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    write_json(folder / "config.json", dict(config) | scheme.code_bits())
    ModelCompressor(quantization_config=quantization).update_config(str(folder))


def _groups(scheme: Scheme) -> dict[str, QuantizationScheme | list[str]]:
    """A group for each number of bits that codes are packed in; several name their layers."""
    sizes = scheme.stored_sizes
    targets = {
        size: sorted(name for name, bits in scheme.layer_bits.items() if bits == size)
        if len(sizes) > 1
        else ["Linear"]
        for size in sizes
    }
    return {
        f"group_{at}": QuantizationScheme(
            targets=targets[size], weights=QuantizationArgs(**scheme.arguments(size)), format=FORMAT
        )
        for at, size in enumerate(sizes)
    }


def _all_tensors(
    others: Iterable[Named], layers: Iterable[QuantizedLayer], scheme: Scheme
) -> Iterator[Named]:
    yield from others
    for layer in layers:
        yield from packed_tensors(layer, scheme).items()


def _write_shards(tensors: Iterable[Named], folder: Path) -> list[dict[str, int]]:
    """Write them as they come; gives each shard's tensors with their bytes."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: one.nbytes for name, one in waiting.items()})
        waiting.clear()

    for name, tensor in tensors:
        held = sum(one.nbytes for one in waiting.values())
        if waiting and held + tensor.nbytes > SHARD_BYTES:
            write()
        waiting[name] = tensor.cpu().contiguous()
    write()
    return shards


def _name_shards(shards: list[dict[str, int]], folder: Path) -> None:
    """Give the shards the names that transformers looks for, and several of them an index."""
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for at, held in enumerate(shards):
        final = f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{at}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(held, final)
    total = sum(sum(held.values()) for held in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
