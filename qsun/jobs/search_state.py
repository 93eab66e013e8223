"""The state of a search: finished blocks and the streams behind them, kept beside the output.

A block is kept before the streams go on, and the streams now and then: an interrupted search goes
on from the last streams kept, and finds the same codes again for blocks after them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import ConfigError, OutputError, bullet_list
from qsun.files import write_json

IDENTITY = "run.json"
STREAMS_EVERY_S = 20.0  # between two times that streams are kept
PARTS = ("codes", "zeros", "scales")


@dataclass(frozen=True)
class KeptBlock:
    """A finished block: its layers, and by full name what smoothing made of its other tensors."""

    layers: list[QuantizedLayer]
    others: dict[str, torch.Tensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class KeptStreams:
    """What stood before block `block`."""

    block: int
    tensors: dict[str, torch.Tensor]


class SearchState:
    """The folder `OUT.quantization`.

    Raises:
        OutputError: an interrupted search lies there and none is to go on, or the other way round.
        ConfigError: it was started from other inputs or settings; names them.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        resume: bool,
        every_s: float = STREAMS_EVERY_S,
    ) -> None:
        self.folder = out.with_name(f"{out.name}.quantization")
        self._every_s, self._kept_at = every_s, time.monotonic()
        self._open(identity, resume)

    def _open(self, identity: Mapping[str, Any], resume: bool) -> None:
        started = self.folder / IDENTITY
        if resume != started.exists():
            raise OutputError(
                f"--resume: there is no interrupted search in {self.folder}"
                if resume
                else f"an interrupted search lies in {self.folder}.\n"
                "Go on with it by --resume, or remove it yourself."
            )
        if resume:
            before = json.loads(started.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(identity))
            changed = [
                f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key)
            ]
            if changed:
                raise ConfigError(
                    f"--resume: the search in {self.folder} was started differently:\n"
                    f"{bullet_list(changed)}\nRestore these, or remove the folder and start anew."
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(started, identity)
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def keep_block(self, index: int, kept: KeptBlock) -> None:
        """Keep a finished block."""
        tensors = {
            f"{layer.name}:{part}": getattr(layer, part) for layer in kept.layers for part in PARTS
        }
        tensors |= {f"{name}:other": tensor for name, tensor in kept.others.items()}
        names = [layer.name for layer in kept.layers]
        report = json.dumps({"layers": names, "report": kept.report})
        _publish(tensors, self._block(index), {"report": report})

    def block(self, index: int) -> KeptBlock:
        """A finished block."""
        from safetensors import safe_open

        path = self._block(index)
        with safe_open(path, framework="pt") as opened:
            told = json.loads(opened.metadata()["report"])
        tensors = load_file(path)
        layers = [
            QuantizedLayer(name, *(tensors[f"{name}:{part}"] for part in PARTS))
            for name in told["layers"]
        ]
        others = {
            name.removesuffix(":other"): tensor
            for name, tensor in tensors.items()
            if name.endswith(":other")
        }
        return KeptBlock(layers, others, told["report"])

    def blocks(self, count: int) -> Iterator[KeptBlock]:
        """Every finished block, one in memory at a time."""
        for index in range(count):
            yield self.block(index)

    def keep_streams(self, index: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Keep what stands before block `index`, if it has been a while."""
        if time.monotonic() - self._kept_at < self._every_s:
            return
        _publish(dict(tensors()), self._streams(index), {})
        for path in self.folder.glob("streams-*.safetensors"):
            if path != self._streams(index):
                path.unlink()
        self._kept_at = time.monotonic()

    def streams(self) -> KeptStreams | None:
        """The last streams kept; None where none are."""
        found = sorted(self.folder.glob("streams-*.safetensors"))
        if not found:
            return None
        return KeptStreams(int(found[-1].stem.removeprefix("streams-")), load_file(found[-1]))

    def close(self) -> None:
        """Remove it: the result is written."""
        shutil.rmtree(self.folder)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _streams(self, index: int) -> Path:
        return self.folder / f"streams-{index:05d}.safetensors"


def _publish(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    save_file({name: one.contiguous() for name, one in tensors.items()}, scratch, metadata)
    os.replace(scratch, path)
