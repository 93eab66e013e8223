"""One piece of work: what is tuned, on what, and where it grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qsun.config import RunConfig
from qsun.tasks.definition import TaskDefinition
from qsun.tasks.examples import TaskData


@dataclass(frozen=True)
class Checkpoints:
    """The folders of the modules; `decode` is a quantized module, `teacher` a dense one."""

    base: Path
    decode: Path | None
    teacher: Path | None


@dataclass(frozen=True)
class Work:
    """One tuning: what is trained, on what, and where it grows."""

    run: RunConfig
    system: str
    task: TaskDefinition
    data: TaskData
    checkpoints: Checkpoints
    dtype: str
    folder: Path
    resume: bool
