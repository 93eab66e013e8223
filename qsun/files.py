"""Files: sizes, digests, atomic writes, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsun.errors import OutputError, bullet_list

GIB = 1024**3
HASHING_THREADS = 8


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit, scale in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def bytes_of(text: str) -> int:
    """What `size` writes, read: a number with a unit, `8GiB` or `500 MB`.

    Raises:
        ValueError: no such thing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a number of bytes with a unit, for example 8GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """Each file's SHA-256, several read at a time."""
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_file, paths))


def digest_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in paths)
    return dict(zip(names, sha256_files(paths), strict=True))


def link_or_copy(source: str, target: str) -> None:
    """Give a file, or the one behind a symbolic link, a second name; a copy on another disk."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that `path` holds either the old text or all of the new.

    Raises:
        ValueError: a NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either what it did or all of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds, or would hold, `path`."""
    return shutil.disk_usage(existing_parent(path)).free


def refuse_used_folder(folder: Path) -> None:
    """Raise `OutputError` unless `folder` is absent or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise OutputError(
            f"output {folder} already exists and is not an empty folder.\n"
            "Choose another --out, or remove it yourself: qsun never overwrites."
        )


def refuse_used_files(paths: Iterable[Path]) -> None:
    """Raise `OutputError`, with all that is wrong, unless every path is free in a folder."""
    problems = []
    for path in paths:
        if path.exists() or path.is_symlink():
            problems.append(f"{path} already exists: choose another name, or remove it yourself")
        elif not path.parent.is_dir():
            problems.append(f"{path.parent} is no folder: make it, or choose another")
    if problems:
        raise OutputError(
            f"nothing was written, and qsun never overwrites:\n{bullet_list(problems)}"
        )


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends well.

    If the block raises, or is interrupted, the scratch folder goes and `target` never existed.

    Raises:
        OutputError: `target` is in use, cannot be created, or the disk filled up on the way.
    """
    refuse_used_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        yield scratch
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        scratch.chmod(0o755)
        _sync(scratch)
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(
            f"the disk of {target.parent} filled up: nothing was published.\n"
            "Free some room or choose another --out; --dry-run says how much is needed."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def disk_full_is_an_os_error() -> Iterator[None]:
    """Both safetensors and tokenizers report a full disk as errors of their own, by text alone."""
    try:
        yield
    except Exception as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device") from error
        raise


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
