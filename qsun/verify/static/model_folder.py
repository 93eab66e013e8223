"""A checkpoint folder as the static checks see it: config, layout and tensor headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.errors import ModelError
from qsun.kv_layout import DTYPE_BYTES, KvLayout, kv_layout
from qsun.scheme import Scheme, scheme_of
from qsun.verify.static.headers import TensorHeader, checkpoint_headers
from qsun.verify.static.json_files import read_mapping

CONFIG = "config.json"
COUNTS = ("layers", "kv_heads", "head_dim", "max_tokens", "vocabulary")


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint's folder. Each file is read when first asked for, and once.

    Every property raises `ModelError` where what it reads is missing or damaged.
    """

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        return read_config_file(self.path / CONFIG)

    @cached_property
    def layout(self) -> KvLayout:
        """The KV layout that its config describes."""
        return checked_layout(self.config)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Its tensors."""
        return checkpoint_headers(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors by name."""
        return {name: tensor.shape for name, tensor in self.headers.items()}

    @cached_property
    def scheme(self) -> Scheme | None:
        """How it is quantized; None where it is not."""
        return read_scheme(self.config)

    def settings(self, name: str) -> dict[str, Any]:
        """Another JSON file of the folder, empty where there is none."""
        return read_mapping(self.path / name) if (self.path / name).exists() else {}


def checked_layout(config: Mapping[str, Any]) -> KvLayout:
    """The KV layout of a config, whatever the config holds.

    Raises:
        ModelError: a field is missing or holds what it cannot.
    """
    try:
        layout = kv_layout(config)
    except KeyError as error:
        raise ModelError(f"config.json does not say its {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"config.json gives no KV layout: {error}") from error
    wrong = [
        f"{name}: {value!r}"
        for name in COUNTS
        if not isinstance(value := getattr(layout, name), int) or value < 1
    ]
    if layout.dtype not in DTYPE_BYTES:
        wrong.append(f"dtype: {layout.dtype!r}")
    if wrong:
        raise ModelError(f"config.json gives no KV layout: {'; '.join(wrong)}")
    return layout


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The quantization that a config declares.

    Raises:
        ModelError: one that is not qsun's, or that lacks a field.
    """
    if config.get("quantization_config") is None:
        return None
    try:
        return scheme_of(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"config.json's quantization_config cannot be read: {error!r}") from error


def scheme_text(config: Mapping[str, Any]) -> str:
    """The scheme in the manifest's words: its dtype where a module is not quantized."""
    scheme = read_scheme(config)
    return checked_layout(config).dtype if scheme is None else str(scheme)
