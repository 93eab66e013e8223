"""The bundle: one folder with everything a deployment needs, described by its manifest.

`bundle.json` is written last, lists a SHA-256 of every other file and carries one of itself; it
never changes afterwards. What is measured later (verdict, scorecard) is a record that names the
manifest's digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qsun.errors import IncompatibleError
from qsun.files import write_json

MANIFEST = "bundle.json"
SCHEMA = 1
DIGEST = "manifest_sha256"
# Records made from a finished bundle: its manifest cannot list them.
LATER_RECORDS = ("records/verdict.json", "records/scorecard.json", "records/latency.json")
# What people read of all records.
REPORTS = ("records/report.html", "records/report.md")
LATER_FOLDERS = ("records/verdict/",)


@dataclass(frozen=True)
class PrefillModule:
    """One task's prefill module: a `full` checkpoint, or a `lora` adapter of `rank` on `base/`.

    `system` is what it was tuned as (`sun`, `qsun`, `full-ft`), None without a tuning record.
    `reference_loss` is its mean loss (nats a token) on `verification/TASK.jsonl`, through the
    hand-off to the full-precision decode module; `base_loss` that of the base model alone.
    `licences` are those of the data it was trained on, by source.
    """

    task: str
    path: str
    module: str
    system: str | None
    boundary: str
    rank: int | None = None
    reference_loss: float | None = None
    base_loss: float | None = None
    licences: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says. Paths are relative to the bundle's folder.

    `base` names the base model's origin and the SHA-256 of its weight files; `base_path` is its
    full-precision checkpoint, on which LoRA modules are served, None where none is one.
    `decode_batch` is how many requests a decode worker is expected to answer at once.
    `kv_layout` is `KvLayout` as a mapping; `kv_cache_dtype` is vLLM's, the same for all workers.
    """

    name: str
    base: dict[str, Any]
    base_path: str | None
    decode_path: str
    decode_scheme: str
    tokenizer_path: str
    boundary: str
    kv_layout: dict[str, Any]
    kv_cache_dtype: str
    max_tokens: int
    prefill: tuple[PrefillModule, ...]
    records: tuple[str, ...]
    files: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    decode_batch: int = 32
    schema: int = SCHEMA


@dataclass(frozen=True)
class Bundle:
    """A manifest and the folder it describes. `digest` is the SHA-256 of the manifest."""

    folder: Path
    manifest: Manifest
    digest: str

    @property
    def decode(self) -> Path:
        """The decode module's folder."""
        return self.folder / self.manifest.decode_path

    @property
    def base(self) -> Path | None:
        """The full-precision base checkpoint's folder, where the bundle has one."""
        path = self.manifest.base_path
        return None if path is None else self.folder / path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.folder / self.manifest.tokenizer_path

    @property
    def prefill(self) -> dict[str, Path]:
        """Every task's prefill module's folder."""
        return {module.task: self.folder / module.path for module in self.manifest.prefill}


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write `bundle.json`, which makes `folder` a bundle; gives its digest."""
    value = json.loads(json.dumps(asdict(manifest)))
    digest = _digest(value)
    write_json(folder / MANIFEST, value | {DIGEST: digest})
    return digest


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest; no other file is looked at.

    Raises:
        IncompatibleError: no bundle, a manifest that was changed, or of an unknown schema.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop(DIGEST)
    except FileNotFoundError as error:
        raise IncompatibleError(f"{folder} is no bundle: it has no {MANIFEST}") from error
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise IncompatibleError(f"{path} cannot be read: {error!r}") from error
    if digest != _digest(value):
        raise IncompatibleError(
            f"{path} was changed after it was written: its digest is not its own.\n"
            "Fetch the bundle again, or export it again."
        )
    if value.get("schema") != SCHEMA:
        raise IncompatibleError(
            f"{path} has schema {value.get('schema')}; this qsun reads schema {SCHEMA}"
        )
    try:
        modules = tuple(PrefillModule(**module) for module in value.pop("prefill"))
        value["records"] = tuple(value["records"])
        return Bundle(folder, Manifest(prefill=modules, **value), digest)
    except (TypeError, KeyError) as error:
        raise IncompatibleError(f"{path} is not a bundle's manifest: {error}") from error


def _digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping, whatever the order and spacing it was written in."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
