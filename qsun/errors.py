"""The error tree: what a user can put right, each kind with an exit code of its own.

A `QsunError` is shown as its message alone; any other exception is a bug and keeps its traceback.
Exit code 2 belongs to the command line parser (click) and 130 to Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class QsunError(Exception):
    """Root of everything a user can put right. The message says what, where and the remedy."""

    exit_code = 1


class ConfigError(QsunError):
    """A configuration or calibration definition with unknown keys or impossible values."""

    exit_code = 3


class ModelError(QsunError):
    """A model that is missing, unreadable, damaged, unsafe or of an unsupported architecture."""

    exit_code = 4


class PlanError(QsunError):
    """A quantization that cannot be done as asked, found before any weight is loaded."""

    exit_code = 5


class DataError(QsunError):
    """Calibration text or task data that is missing, empty, or not where its definition says."""

    exit_code = 6


class OutputError(QsunError):
    """An output folder that is in use, or a disk without enough room."""

    exit_code = 7


class ServingEnvironmentError(QsunError):
    """No usable vLLM interpreter, or a vLLM process that did not start."""

    exit_code = 8


class LoadCheckError(QsunError):
    """vLLM does not compute what was quantized."""

    exit_code = 9


class ResourceError(QsunError):
    """Memory that ran out, on the accelerator or beside it."""

    exit_code = 10


class IncompatibleError(QsunError):
    """Modules that must not be served together, or a bundle that is not what it was."""

    exit_code = 11


class UncheckedError(QsunError):
    """A verification that could not be carried out to its end."""

    exit_code = 12


class FloorError(QsunError):
    """An accuracy below the floor that the user set."""

    exit_code = 13


class Interrupted(QsunError):
    """Work that was stopped by its user and can be gone on with."""

    exit_code = 130


def bullet_list(lines: Iterable[str], at_most: int = 12) -> str:
    """One indented line per entry; a long list ends with the number of those left out."""
    entries = list(lines)
    shown = [f"  - {entry}" for entry in entries[:at_most]]
    if len(entries) > at_most:
        shown.append(f"  ... and {len(entries) - at_most} more")
    return "\n".join(shown)


def nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    """The likeliest meaning of an unknown name, or all that are known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
