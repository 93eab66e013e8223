"""Safetensors headers: names, dtypes and shapes of tensors whose values stay unread.

The layout is 8 bytes with the header's length (little endian), the header as JSON, the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import weight_files
from qsun.errors import ModelError
from qsun.verify.static.json_files import read_mapping
from qsun.verify.steps import enumerated

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header describes it; `dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one file.

    Raises:
        ModelError: no safetensors file, a damaged header, or not as long as it says.
    """
    try:
        values_bytes, header = _parts(path)
        header.pop("__metadata__", None)
        if not header:
            raise ModelError(f"{path.name}: holds no tensors")
        tensors = {name: _tensor(path.name, name, entry) for name, entry in header.items()}
        _check_layout(path.name, header, values_bytes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path.name}: its header cannot be read: {error}") from error
    return tensors


def _parts(path: Path) -> tuple[int, dict[str, Any]]:
    """How many bytes follow the header, and the header."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(
                f"{path.name}: {size} bytes do not hold the header of {length} bytes it announces"
            )
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ModelError(f"{path.name}: its header is no JSON object")
    return size - 8 - length, header


def _tensor(file: str, name: str, entry: Mapping[str, Any]) -> TensorHeader:
    shape = tuple(entry["shape"])
    if not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise ModelError(f"{file}: {name} has the impossible shape {list(shape)}")
    dtype = str(entry["dtype"])
    begin, end = entry["data_offsets"]
    if dtype in BYTES and end - begin != prod(shape) * BYTES[dtype]:
        raise ModelError(
            f"{file}: {name} has {end - begin} bytes, not those of {dtype} {list(shape)}"
        )
    return TensorHeader(dtype, shape)


def _check_layout(file: str, header: Mapping[str, Any], values_bytes: int) -> None:
    reached = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != reached or end < begin:
            raise ModelError(f"{file}: its tensors leave gaps or overlap at byte {begin}")
        reached = end
    if reached != values_bytes:
        kind = "truncated" if values_bytes < reached else "longer than its tensors"
        raise ModelError(
            f"{file}: {kind}: {values_bytes} bytes of values, its header says {reached}"
        )


def checkpoint_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder, all its shards.

    Raises:
        ModelError: names every file that is missing or damaged, or that the index is wrong about.
    """
    found: dict[str, TensorHeader] = {}
    file_of: dict[str, str] = {}
    problems = []
    for path in weight_files(folder):
        try:
            header = read_header(path)
        except ModelError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{name}: in {file_of[name]} and {path.name}" for name in found if name in header
        ]
        found |= header
        file_of |= dict.fromkeys(header, path.name)
    if not problems:
        problems = _index_problems(folder, file_of)
    if problems:
        raise ModelError(f"{folder.name} has damaged weight files: {enumerated(problems)}")
    return found


def _index_problems(folder: Path, file_of: Mapping[str, str]) -> list[str]:
    if not (folder / INDEX).exists():
        return []
    named: dict[str, str] = read_mapping(folder / INDEX)["weight_map"]
    problems = [
        f"{name}: {INDEX} says {named.get(name)}, it lies in {file_of.get(name)}"
        for name in sorted(named.keys() | file_of.keys())
        if named.get(name) != file_of.get(name)
    ]
    if SINGLE_FILE not in named.values() and (folder / SINGLE_FILE).exists():
        problems.append(f"{SINGLE_FILE} and {INDEX} beside it: which is read depends on the reader")
    return problems
