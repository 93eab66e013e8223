"""A shelf's set: a folder of tensors that a `DiskShelf` reads, there as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qsun.files import write_json

CONTENTS = "contents.json"


def publish_set(folder: Path, store: Callable[[Path], None]) -> None:
    """Make `folder` of the files that `store` writes to the folder it is given."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        store(scratch)
        names = sorted(path.name for path in scratch.iterdir())
        write_json(scratch / CONTENTS, {"files": names})
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def set_damages(folder: Path) -> list[str]:
    """What is wrong with a set, a line per file."""
    try:
        told = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        files = [folder / name for name in told["files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"{CONTENTS}: {error}"]
    return damages(files)


def damages(files: Iterable[Path]) -> list[str]:
    """What is wrong with these files, by their headers: a file cut short has one too long."""
    wrong = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                opened.metadata()
        except (SafetensorError, OSError) as error:
            wrong.append(f"{path.name}: {error}")
    return wrong
