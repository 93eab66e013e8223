"""The definition of a task: its training and test rows, its limits, its checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsun.errors import ConfigError, bullet_list
from qsun.settings import load_settings
from qsun.sources import SourceDefinition, source_problems
from qsun.tasks.checkers import CHECKERS


@dataclass(frozen=True)
class TaskDefinition:
    """One task in one shape: sources of rows, token limits, and the checker of a response.

    Every source gives `prompt` (or `messages` that end with the response) and, for training,
    `response`; a test source gives `answer`, in the form that `checker` reads. A task without
    tests is judged by the loss on its validation rows alone. Without `validation` sources, the
    validation rows are taken out of the training rows.
    """

    name: str
    description: str
    train: tuple[SourceDefinition, ...]
    checker: str | None = field(default=None, metadata={"choices": tuple(CHECKERS)})
    tests: tuple[SourceDefinition, ...] = ()
    validation: tuple[SourceDefinition, ...] = ()
    samples: int | None = field(default=None, metadata={"minimum": 1})
    validation_samples: int = field(default=256, metadata={"minimum": 1})
    test_samples: int | None = field(default=None, metadata={"minimum": 1})
    max_tokens: int = field(default=1024, metadata={"minimum": 4})
    max_new_tokens: int = field(default=512, metadata={"minimum": 1})
    stop: tuple[str, ...] = ()
    seed: int = 0


def load_task(path: Path) -> TaskDefinition:
    """Read a task from `calib/tasks/` or from a file of the user's.

    Raises:
        ConfigError: every mistake, each named.
    """
    task = load_settings(TaskDefinition, path)
    problems = [] if task.train else ["train: at least one source is needed"]
    for split in ("train", "validation", "tests"):
        sources: Sequence[SourceDefinition] = getattr(task, split)
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            problems.append(f"{split}: two sources have one name")
        for source in sources:
            problems += [f"{split}: {problem}" for problem in source_problems(source)]
            problems += [f"{split}: {problem}" for problem in _row_problems(source, split)]
    if task.tests and task.checker is None:
        problems.append(f"checker: tests need one of {', '.join(CHECKERS)}")
    if problems:
        raise ConfigError(f"{path} has {len(problems)} mistake(s):\n{bullet_list(problems)}")
    return task


def _row_problems(source: SourceDefinition, split: str) -> list[str]:
    if source.text is not None:
        return [f"source {source.name}: a task needs prompt or messages, not text"]
    if split == "tests":
        missing = source.answer is None
        return [f"source {source.name}: a test needs answer"] if missing else []
    if source.prompt is not None and source.response is None:
        return [f"source {source.name}: a prompt needs a response beside it"]
    return []
