"""Rows: where text comes from. Each source becomes a list of plain dictionaries."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qsun.errors import DataError
from qsun.functions import gather_functions
from qsun.sources import SourceDefinition

Row = dict[str, Any]
HELD_OUT_EVERY = 5  # generator templates whose number divides by this are never trained on


def read_rows(source: SourceDefinition, seed: int, relative_to: Path) -> list[Row]:
    """All rows of a source, in its own order.

    Raises:
        DataError: missing, unreadable or empty.
    """
    readers: dict[str, Callable[[], list[Row]]] = {
        "huggingface": lambda: _huggingface(source, relative_to),
        "jsonl": lambda: _jsonl(relative_to / Path(str(source.path)).expanduser()),
        "package": lambda: _package(source),
        "generator": lambda: list(_generator(source, seed)),
        "functions": lambda: gather_functions(source.packages),
    }
    rows = readers[source.kind]()
    if not rows:
        raise DataError(f"source {source.name}: it is empty")
    return rows


def _jsonl(path: Path) -> list[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            return [
                _json_object(line, f"{path}:{number}")
                for number, line in enumerate(stream, start=1)
                if line.strip()
            ]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: it is cut short or damaged ({error}); fetch it again"
        ) from error


def _json_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object")
    return row


def _package(source: SourceDefinition) -> list[Row]:
    package = str(source.package)
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"source {source.name}: package {package!r} is not installed; `make setup` installs "
            "the packages that the shipped definitions name"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    rows = _jsonl(root / str(source.path))
    if source.answers is None:
        return rows
    key = source.answers_key
    answers = {row.get(key): row for row in _jsonl(root / source.answers)}
    unanswered = [row.get(key) for row in rows if row.get(key) not in answers]
    if unanswered:
        raise DataError(
            f"source {source.name}: {len(unanswered)} rows have no answer by {key!r}, "
            f"{unanswered[0]!r} first"
        )
    return [row | answers[row[key]] for row in rows]


def _generator(source: SourceDefinition, seed: int) -> Iterator[Row]:
    import reasoning_gym

    try:
        problems = reasoning_gym.create_dataset(source.dataset, seed=seed, size=source.rows)
    except ValueError as error:
        raise DataError(f"source {source.name}: {error}") from error
    templates = getattr(problems, "task_indices", None)
    if templates is None and source.templates != "all":
        raise DataError(f"source {source.name}: {source.dataset} has no templates to hold out")
    for index in range(source.rows):
        if templates is not None and source.templates != "all":
            held_out = templates[index] % HELD_OUT_EVERY == 0
            if held_out != (source.templates == "held-out"):
                continue
        yield problems[index]


def _huggingface(source: SourceDefinition, relative_to: Path) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    name = str(source.dataset)
    if name.startswith((".", "/", "~")):
        name = str((relative_to / Path(name).expanduser()).resolve())
    try:
        loaded = load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        # Its own message says no more than that generating failed.
        told = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = (str(told).strip() or type(told).__name__).splitlines()[0]
        raise DataError(f"source {source.name}: cannot load {name}: {reason}") from error
    return [dict(row) for row in loaded]
