"""The state of a search: finished blocks and the streams behind them, kept beside the output.

A block is kept before the streams go on, these now and then: an interrupted search goes on from the
last that were kept, and finds the same codes again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qsun.calibrate.shelf import DiskShelf, Shelf, shelf_in
from qsun.calibrate.shelf_set import damages, publish_set, set_damages
from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import ConfigError, OutputError, bullet_list
from qsun.files import disk_full_is_an_os_error, write_json

IDENTITY, MEASURED, ERRORS = "run.json", "perplexity.json", "errors.json"
BLOCKS, STREAMS = "block-*.safetensors", "streams-*"
SCRATCH = ".walk"
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
    tensors: Shelf


class SearchState:
    """The folder `OUT.quantization`, there as soon as a block is finished.

    Streams are kept when the last time is `every_s` ago.

    Raises:
        OutputError: an interrupted search lies there and none is to go on, or the other way round;
            or one that is damaged.
        ConfigError: it was started from other inputs or settings; names them.
    """

    def __init__(
        self, out: Path, identity: Mapping[str, Any], resume: bool, every_s: float
    ) -> None:
        self.folder = out.with_name(f"{out.name}.quantization")
        self._identity, self._every_s = json.loads(json.dumps(identity)), every_s
        self._kept_at = time.monotonic()
        if resume != self.is_started:
            raise OutputError(
                f"--resume: there is no interrupted search in {self.folder}"
                if resume
                else f"an interrupted search lies in {self.folder}.\n"
                "Go on with it by --resume, or remove it yourself."
            )
        if resume:
            self._refuse_another()
            self._refuse_damage()
        known = resume and (self.folder / MEASURED).exists()
        self._measured: dict[str, Any] = self._read(MEASURED) if known else {}

    @property
    def is_started(self) -> bool:
        """Whether there is something to go on from."""
        return (self.folder / IDENTITY).exists()

    def _refuse_another(self) -> None:
        before = _leaves(self._read(IDENTITY))
        now = _leaves(self._identity)
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

    def _refuse_damage(self) -> None:
        """Look at the headers of all that is needed: a file cut short has one that is too long."""
        last = self._last_streams()
        if last is None:
            return
        wrong = damages(map(self._block, range(_number(last))))
        wrong += [f"{last.name}/{one}" for one in set_damages(last)]
        if wrong:
            raise self._damaged(wrong)

    def keep_errors(self, table: Any) -> None:
        """Keep the table that layers get their bits from: plain values."""
        if not self.is_started:
            self._start()
        write_json(self.folder / ERRORS, table)

    def errors(self) -> Any:
        """The table of errors; None where none is kept.

        Raises:
            OutputError: it is damaged.
        """
        if not self.is_started:
            return None  # what lies there is of another search
        try:
            return json.loads((self.folder / ERRORS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged([f"{ERRORS}: {error}"]) from error

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged([f"{name}: {error}"]) from error
        if not isinstance(value, dict):
            raise self._damaged([f"{name}: holds no JSON object"])
        return value

    def _damaged(self, wrong: list[str]) -> OutputError:
        return OutputError(
            f"--resume: the search in {self.folder} is damaged:\n{bullet_list(wrong)}\n"
            "Remove the folder and start anew."
        )

    def keep_block(self, index: int, kept: KeptBlock) -> None:
        """Keep a finished block."""
        if not self.is_started:
            self._start()
        tensors = {
            f"{layer.name}:{part}": getattr(layer, part) for layer in kept.layers for part in PARTS
        }
        tensors |= {f"{name}:other": tensor for name, tensor in kept.others.items()}
        names = [layer.name for layer in kept.layers]
        report = json.dumps({"layers": names, "report": kept.report})
        _publish(tensors, self._block(index), {"report": report})

    def _start(self) -> None:
        """Make the folder; what an unfinished `close` has left there is of another search."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(BLOCKS):
                path.unlink()
            for path in self.folder.glob(STREAMS):
                shutil.rmtree(path)
            for name in (MEASURED, ERRORS):
                (self.folder / name).unlink(missing_ok=True)
            if self._measured:
                write_json(self.folder / MEASURED, self._measured)
            write_json(self.folder / IDENTITY, self._identity)
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def block(self, index: int) -> KeptBlock:
        """A finished block."""
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

    def keep_streams(self, index: int, store: Callable[[Path], None]) -> None:
        """Keep what stands before block `index`, which `store` writes, if it has been a while."""
        if time.monotonic() - self._kept_at < self._every_s:
            return
        folder = self._streams(index)
        publish_set(folder, store)
        for path in self.folder.glob(STREAMS):
            if path != folder:
                shutil.rmtree(path)
        self._kept_at = time.monotonic()

    def streams(self) -> KeptStreams | None:
        """The last streams kept; None where none are."""
        last = self._last_streams()
        return None if last is None else KeptStreams(_number(last), DiskShelf(last))

    @contextmanager
    def shelf(self, on_disk: bool) -> Iterator[Shelf]:
        """A shelf for the time of a walk; what lies on disk does so beside what is kept."""
        try:
            with shelf_in(self.folder / SCRATCH if on_disk else None) as shelf:
                yield shelf
        finally:
            if not self.is_started:
                with suppress(OSError):  # there is none, or what is not ours lies there
                    self.folder.rmdir()

    def measured(self, text: str) -> dict[str, float]:
        """The perplexities known of the held-out text with this digest, by name."""
        return dict(self._measured.get(text, {}))

    def keep_measured(self, text: str, perplexities: Mapping[str, float]) -> None:
        """Keep them; what is measured before a block is finished is kept with the first."""
        self._measured[text] = dict(perplexities)
        if self.is_started:
            write_json(self.folder / MEASURED, self._measured)

    def close(self) -> None:
        """Remove it: the result is written. From here on there is nothing to go on from."""
        (self.folder / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_streams(self) -> Path | None:
        return max(self.folder.glob(STREAMS), default=None)

    def _block(self, index: int) -> Path:
        return self.folder / BLOCKS.replace("*", f"{index:05d}")

    def _streams(self, index: int) -> Path:
        return self.folder / STREAMS.replace("*", f"{index:05d}")


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _leaves(value: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names."""
    found: dict[str, Any] = {}
    for name, one in value.items():
        found |= (
            _leaves(one, f"{within}{name}.") if isinstance(one, dict) else {f"{within}{name}": one}
        )
    return found


def _publish(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with disk_full_is_an_os_error():
            save_file({name: one.contiguous() for name, one in tensors.items()}, scratch, metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
