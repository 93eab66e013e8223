"""Inspection: what a model, checkpoint, GGUF file or `config.json` is, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file, weight_files
from qsun.decode_checkpoint import DecodeCheckpoint
from qsun.errors import ModelError
from qsun.files import sha256_file
from qsun.kv_layout import DTYPE_BYTES, KvLayout, kv_layout
from qsun.models import ModelSource, read_config
from qsun.records import read_record
from qsun.scheme import Scheme, scheme_of

RECORD = Path("records") / "quantization.json"


@dataclass(frozen=True)
class Inspection:
    """What was found. Sizes in bytes; `files_changed` names files that left their record."""

    architecture: str
    kv: KvLayout
    dtype: str
    tied_embeddings: bool
    scheme: Scheme | None
    quantized_layers: int
    quantized_layer_bytes: int
    weight_bytes: int
    record: str | None
    files_changed: list[str]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        kv = asdict(self.kv) | {"rope_parameters": dict(self.kv.rope_parameters)}
        return asdict(self) | {"kv": kv, "kv_bytes_per_token": self.kv.bytes_per_token}


def inspect(path: Path) -> Inspection:
    """Look at a checkpoint folder, a `.gguf` file or a `config.json`.

    Raises:
        ModelError: none of these, damaged, or unsafe.
    """
    if path.suffix == ".gguf" and path.is_file():
        config = read_config(ModelSource(gguf=path.absolute()))
        return _inspection(config, weight_bytes=path.stat().st_size)
    if path.suffix == ".json" and path.is_file():
        return _inspection(read_config_file(path))
    if not path.is_dir():
        raise ModelError(f"{path} is no model folder, .gguf file or config.json")
    config = read_config_file(path / "config.json")
    weight_bytes = sum(file.stat().st_size for file in weight_files(path))
    layers = layer_bytes = 0
    if scheme_of(config) is not None:
        with DecodeCheckpoint(path) as checkpoint:
            layers, layer_bytes = len(checkpoint.layer_names()), checkpoint.layer_bytes()
    record, changed = _against_record(path)
    return _inspection(config, weight_bytes, layers, layer_bytes, record, changed)


def _inspection(
    config: Mapping[str, Any],
    weight_bytes: int = 0,
    quantized_layers: int = 0,
    quantized_layer_bytes: int = 0,
    record: str | None = None,
    files_changed: list[str] | None = None,
) -> Inspection:
    try:
        layout = kv_layout(config)
    except KeyError as error:
        raise ModelError(f"the model's config does not say its {error.args[0]}") from error
    if layout.dtype not in DTYPE_BYTES:
        raise ModelError(
            f"the model's config has dtype {layout.dtype!r}: qsun knows {', '.join(DTYPE_BYTES)}"
        )
    return Inspection(
        architecture=config["architectures"][0],
        kv=layout,
        dtype=layout.dtype,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        scheme=scheme_of(config),
        quantized_layers=quantized_layers,
        quantized_layer_bytes=quantized_layer_bytes,
        weight_bytes=weight_bytes,
        record=record,
        files_changed=files_changed or [],
    )


def _against_record(folder: Path) -> tuple[str | None, list[str]]:
    if not (folder / RECORD).is_file():
        return None, []
    digests: dict[str, str] = read_record(folder / RECORD, "quantization").result["files"]
    changed = [
        name
        for name, digest in digests.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]
    return RECORD.as_posix(), changed
