"""A bundle's files: all that the manifest lists and no other, unchanged, none of them code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from qsun.bundle import LATER_FOLDERS, LATER_RECORDS, MANIFEST, REPORTS, Manifest
from qsun.errors import IncompatibleError, ModelError
from qsun.files import GIB, sha256_file, size
from qsun.progress import track
from qsun.verify.static.json_files import read_mapping
from qsun.verify.steps import enumerated

PICKLES = frozenset(
    {*(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"), *(".joblib", ".dill", ".npy", ".npz")}
)
CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"})
# Beside config.json, which a check of its own reads.
SETTINGS_SUFFIX = "_config.json"
MAX_THREADS = 8
SHOWN_FROM_BYTES = GIB


@dataclass(frozen=True)
class BundleFiles:
    """The files of a bundle's folder beside its manifest."""

    folder: Path
    manifest: Manifest

    @cached_property
    def present(self) -> list[str]:
        """Every file, link or other entry that is no plain folder, but what may come later."""
        return sorted(name for name in self._entries() if not _later(name))

    def _entries(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            if path.is_symlink() or not path.is_dir():
                yield path.relative_to(self.folder).as_posix()

    @cached_property
    def missing(self) -> list[str]:
        """Files that the manifest lists and the folder lacks."""
        return [
            name
            for name in self.manifest.files
            if _plain(name) and not (self.folder / name).is_file()
        ]

    @cached_property
    def changed(self) -> list[str]:
        """Files of another digest than the manifest's; hashes all of them, in threads."""
        names = [name for name in self.manifest.files if name not in set(self.missing)]
        total = sum((self.folder / name).stat().st_size for name in names)
        paths = [self.folder / name for name in names]
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(sha256_file, paths)
            if total >= SHOWN_FROM_BYTES:
                digests = track(digests, f"digests of {size(total)}", len(paths))
            found = list(digests)
        return [
            name
            for name, digest in zip(names, found, strict=True)
            if digest != self.manifest.files[name]
        ]

    def check_paths(self) -> str:
        """Whether every path stays in the folder.

        Raises:
            IncompatibleError: names those that do not.
        """
        wrong = [
            f"{name!r}: leaves the bundle's folder" for name in self._named() if not _plain(name)
        ]
        wrong += list(self._leaving_links())
        if wrong:
            raise IncompatibleError(enumerated(wrong))
        return f"{len(self.manifest.files)} files, all below the bundle's folder"

    def _named(self) -> list[str]:
        manifest = self.manifest
        folders = [manifest.decode_path, manifest.tokenizer_path]
        folders += [] if manifest.base_path is None else [manifest.base_path]
        folders += [module.path for module in manifest.prefill]
        return list(dict.fromkeys([*folders, *manifest.records, *manifest.files]))

    def _leaving_links(self) -> Iterator[str]:
        root = self.folder.resolve()
        for path in sorted(self.folder.rglob("*")):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                name = path.relative_to(self.folder).as_posix()
                yield f"{name}: a link that leaves the bundle's folder, to {path.readlink()}"

    def check_listing(self) -> str:
        """Whether the folder holds what the manifest lists, and nothing else.

        Raises:
            IncompatibleError: names what is missing and what is there unlisted.
        """
        listed = self.manifest.files
        wrong = [f"{name}: listed and missing" for name in self.missing]
        wrong += [
            f"{name}: not in the manifest"
            for name in self.present
            if name not in listed and not _forbidden(name)
        ]
        wrong += [
            f"{name}: a record without a digest"
            for name in self.manifest.records
            if name not in listed
        ]
        if wrong:
            raise IncompatibleError(enumerated(wrong))
        return f"{len(listed)} files, each one listed"

    def check_digests(self) -> str:
        """Whether every file is the one that was exported.

        Raises:
            IncompatibleError: names every file with another SHA-256.
        """
        wrong = [f"{name}: another SHA-256 than the manifest's" for name in self.changed]
        if wrong:
            raise IncompatibleError(enumerated(wrong))
        return f"{len(self.manifest.files) - len(self.missing)} files with the SHA-256 listed"

    def check_code(self) -> str:
        """Whether there is nothing that runs when it is loaded.

        Raises:
            IncompatibleError: names pickles, modules, and files that ask for remote code.
        """
        wrong = [f"{name}: {_forbidden(name)}" for name in self.present if _forbidden(name)]
        settings = [name for name in self.present if name.endswith(SETTINGS_SUFFIX)]
        wrong += code_maps({name: self.folder / name for name in settings})
        if wrong:
            raise IncompatibleError(enumerated(wrong))
        return "no pickle, no Python module, no auto_map"


def code_maps(paths: Mapping[str, Path]) -> list[str]:
    """The JSON files, of those that exist, which ask for code that a model brings along."""
    return [
        f"{name}: asks to run code that the model brings along (auto_map)"
        for name, path in paths.items()
        if path.is_file() and _maps_code(path)
    ]


def _maps_code(path: Path) -> bool:
    try:
        return "auto_map" in read_mapping(path)
    except ModelError:
        return False  # no loader can read it either


def _later(name: str) -> bool:
    later = (MANIFEST, *LATER_RECORDS, *REPORTS)
    return name in later or name.startswith(LATER_FOLDERS)


def _plain(name: str) -> bool:
    path = PurePosixPath(name)
    unusual = "\\" in name or "\0" in name or str(path) != name or name == "."
    return not (unusual or path.is_absolute() or ".." in path.parts)


def _forbidden(name: str) -> str | None:
    """Why a file may not be in a bundle, told by its name."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PICKLES:
        return "a pickle, which runs code when it is loaded"
    return "Python can import it" if suffix in CODE else None
