"""Shelves: where tensors wait for their next block, by name, in memory or on disk."""

from __future__ import annotations

import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qsun.files import disk_full_is_an_os_error

SUFFIX, NAME = ".safetensors", "tensor"


class Shelf(MutableMapping[str, torch.Tensor]):
    """Tensors by name, on the processor's side; what is put there is not written to any more."""

    @abstractmethod
    def store(self, name: str, folder: Path) -> None:
        """Write a tensor to a folder that a `DiskShelf` can be made of."""


class MemoryShelf(dict[str, torch.Tensor], Shelf):
    """Tensors in memory."""

    def store(self, name: str, folder: Path) -> None:
        """Write a file."""
        _write(self[name], folder / f"{name}{SUFFIX}")


class DiskShelf(Shelf):
    """Tensors in a folder, a file each; what is read is mapped, and no longer than it is held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(name)
        with safe_open(self._path(name), framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(NAME)
            return tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        # A new file: the old one may be mapped, or linked from elsewhere.
        scratch = self._folder / f".{name}.partial"
        _write(tensor, scratch)
        scratch.replace(self._path(name))

    def __delitem__(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError as error:
            raise KeyError(name) from error

    def __contains__(self, name: object) -> bool:
        return self._path(str(name)).exists()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob(f"*{SUFFIX}")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def store(self, name: str, folder: Path) -> None:
        """Link the file, or copy it where the disk knows no links."""
        target = folder / self._path(name).name
        try:
            os.link(self._path(name), target)
        except OSError:
            shutil.copyfile(self._path(name), target)


@contextmanager
def shelf_in(folder: Path | None) -> Iterator[Shelf]:
    """A shelf in memory, or in a folder that is made for it and gone afterwards."""
    if folder is None:
        yield MemoryShelf()
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield DiskShelf(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(tensor: torch.Tensor, path: Path) -> None:
    with disk_full_is_an_os_error():
        save_file({NAME: tensor.contiguous()}, path)
