"""Checkpoint files: what a model folder holds, read safely and one tensor at a time.

Only safetensors are read, and never code that a folder brings along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qsun.errors import ModelError, bullet_list

if TYPE_CHECKING:
    import torch


def read_config_file(path: Path) -> dict[str, Any]:
    """Read one `config.json`; refuses what is no model config.

    Raises:
        ModelError: missing, unreadable, not a model config, or asking for remote code.
    """
    config = _read_json(path)
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise ModelError(f"{path} names no architecture: it is not a model's config.json")
    if "auto_map" in config:
        raise ModelError(
            f"{path} asks to run code that the model brings along (auto_map).\n"
            "qsun runs no remote code: use a checkpoint of an architecture that transformers "
            "has built in."
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those of its index when it has one.

    Raises:
        ModelError: there are none, or the index names a file that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise ModelError(
                f"{folder} has no *.safetensors file. qsun reads no pickled weights (.bin, .pt): "
                "save the model again with safe_serialization."
            )
        return found
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map from tensor names to file names")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [f"{name}: not a plain file name" for name in names if Path(name).name != name]
    wrong += [f"{name}: missing" for name in names if not (folder / name).is_file()]
    if wrong:
        raise ModelError(f"{index} names files that are not in its folder:\n{bullet_list(wrong)}")
    return [folder / name for name in names]


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that is incomplete, damaged, or asks for remote code.

    Raises:
        ModelError: names every damaged file.
    """
    from safetensors import SafetensorError, safe_open

    read_config_file(folder / "config.json")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and "auto_map" in _read_json(tokenizer):
        raise ModelError(
            f"{tokenizer} asks to run code that the model brings along (auto_map).\n"
            "qsun runs no remote code: use a tokenizer that transformers has built in."
        )
    damaged = []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                if not tensors.keys():
                    damaged.append(f"{path.name}: holds no tensors")
        except (SafetensorError, OSError) as error:
            damaged.append(f"{path.name}: {error}")
    if damaged:
        raise ModelError(
            f"{folder} has damaged weight files:\n{bullet_list(damaged)}\nFetch them again."
        )


class Tensors:
    """The tensors of a checkpoint folder, read from disk one at a time by name.

    A file is mapped no longer than what was read of it is held: all of a mapping's pages that were
    ever read count as this process's memory.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self._files[name] = path
                    self._shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, its values unread."""
        return self._shapes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as tensors:
            return cast("torch.Tensor", tensors.get_tensor(name))
