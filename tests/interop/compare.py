"""Compare AutoAWQ's reading of a checkpoint with qsun's, layer by layer, bit for bit.

    .venv/bin/python tests/interop/compare.py CHECKPOINT --interop-python PYTHON --record RECORD

CHECKPOINT is what `qsun quantize --format awq` published. AutoAWQ's reading must also have the
digests that the checkpoint's own record took before anything was packed: two readers that agree
about damaged or wrongly packed codes are not enough. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qsun.checkpoint_files import Tensors
from qsun.decode_checkpoint import DecodeCheckpoint, QuantizedLayer
from qsun.errors import bullet_list
from qsun.files import sha256_file
from qsun.records import Record, new_record, read_record
from qsun.scheme import AWQ_BITS

UNPACK = Path(__file__).with_name("autoawq_unpack.py")
MIDDLE = 2 ** (AWQ_BITS - 1)  # AutoAWQ's codes are unsigned, qsun's signed


@dataclass(frozen=True)
class Settings:
    """What was compared, and by which interpreter."""

    checkpoint: str
    interop_python: str


@dataclass(frozen=True)
class LayerComparison:
    """One layer as read by both; `as_quantized` says whether AutoAWQ's has the recorded digest."""

    name: str
    weights: int
    unequal_codes: int
    unequal_zeros: int
    unequal_weights: int
    as_quantized: bool

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        unequal = self.unequal_codes + self.unequal_zeros + self.unequal_weights
        return self.as_quantized and not unequal

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.unequal_codes} codes, {self.unequal_zeros} zeros, "
            f"{self.unequal_weights} weights unequal"
            + ("" if self.as_quantized else "; not the codes, zeros and scales of its record")
        )


def compare_layer(layer: QuantizedLayer, unpacked: Tensors, digest: str) -> LayerComparison:
    """Hold `layer`, as qsun reads it, against AutoAWQ's reading and the recorded `digest`."""
    codes, zeros, weight = (
        unpacked[f"{layer.name}.{part}"].t().contiguous() for part in ("codes", "zeros", "weight")
    )
    codes, zeros = codes - MIDDLE, zeros - MIDDLE
    return LayerComparison(
        name=layer.name,
        weights=weight.numel(),
        unequal_codes=_unequal(codes, layer.codes),
        unequal_zeros=_unequal(zeros, layer.zeros),
        # qsun's product is exact in float32 and AutoAWQ's, in float16, is that one rounded once.
        # Compared as integers: -0 is not 0.
        unequal_weights=_unequal(weight.view(torch.int16), layer.weight().half().view(torch.int16)),
        as_quantized=replace(layer, codes=codes, zeros=zeros).digest() == digest,
    )


def _unequal(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one != other).sum())


@contextmanager
def unpack(settings: Settings) -> Iterator[tuple[Tensors, dict[str, str]]]:
    """AutoAWQ's reading of the checkpoint, and the versions that made it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "unpacked.safetensors"
        command = [settings.interop_python, str(UNPACK), settings.checkpoint, str(out)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        with Tensors(Path(scratch)) as tensors:
            yield tensors, json.loads(answer.stdout)


def compare(settings: Settings, quantized: Record) -> dict[str, Any]:
    """Compare both readings of the checkpoint that `quantized` is the record of."""
    folder = Path(settings.checkpoint)
    digests = {row["name"]: row["sha256"] for row in quantized.result["quantization"]["layers"]}
    with unpack(settings) as (unpacked, versions), DecodeCheckpoint(folder) as checkpoint:
        names = {
            "AutoAWQ": {name.rpartition(".")[0] for name in unpacked.names()},
            "qsun": set(checkpoint.layer_names()),
            "the quantization record": set(digests),
        }
        shared = set.intersection(*names.values())
        layers = [
            compare_layer(layer, unpacked, digests[layer.name])
            for layer in checkpoint.layers()
            if layer.name in shared
        ]
    files = {name: sha256_file(folder / name) for name in quantized.result["files"]}
    differences = [
        *missing_layers(names),
        *(str(layer) for layer in layers if not layer.equal),
        *other_files(files, quantized.result["files"]),
    ]
    return {
        "equal": not differences,
        "layers": len(layers),
        "weights": sum(layer.weights for layer in layers),
        "unequal_codes": sum(layer.unequal_codes for layer in layers),
        "unequal_zeros": sum(layer.unequal_zeros for layer in layers),
        "unequal_weights": sum(layer.unequal_weights for layer in layers),
        "layers_not_as_quantized": sum(not layer.as_quantized for layer in layers),
        "differences": differences,
        "interop_versions": versions,
        "quantization": {
            "command": quantized.command,
            "base": quantized.result["base"],
            "calibration_sha256": quantized.result["calibration"]["sha256"],
            "files": files,
        },
    }


def missing_layers(names: Mapping[str, set[str]]) -> Iterator[str]:
    """A line per layer that one of the readers, or the record, does not know."""
    everywhere = set.union(*names.values())
    if not everywhere:
        yield "no quantized layer"
    for reader, found in names.items():
        for name in sorted(everywhere - found):
            yield f"{name}: unknown to {reader}"


def other_files(found: Mapping[str, str], recorded: Mapping[str, str]) -> Iterator[str]:
    """A line per file whose digest is not the recorded one."""
    for name, digest in recorded.items():
        if found[name] != digest:
            yield f"{name}: not the file of the quantization record"


def main() -> None:
    """Compare, write the record, and say in one line what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--interop-python", required=True)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    settings = Settings(arguments.checkpoint, arguments.interop_python)
    path = Path(settings.checkpoint) / "records" / "quantization.json"
    quantized = read_record(path, "quantization")
    result = compare(settings, quantized)
    new_record("interop", settings, quantized.seed, result).write(arguments.record)
    if not result["equal"]:
        sys.exit(f"AutoAWQ, qsun and the record differ:\n{bullet_list(result['differences'])}")
    print(
        f"AutoAWQ {result['interop_versions']['autoawq']} and qsun read the same codes, zeros and "
        f"weights, bit for bit, as they were quantized: {result['layers']} layers, "
        f"{result['weights']:,} weights"
    )


if __name__ == "__main__":
    main()
