"""Examples: a task's rows as prompts, responses and answers; no test is trained on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.chats import Message, column_text, row_messages
from qsun.errors import DataError
from qsun.rows import Row, read_rows
from qsun.sources import SourceDefinition
from qsun.tasks.definition import TaskDefinition
from qsun.tasks.leaks import Overlap, overlap

# Generators number their problems from the seed on: the splits must lie further apart than that.
SPLIT_SEEDS = {"train": 0, "validation": 10_000_000, "tests": 20_000_000}


@dataclass(frozen=True)
class Example:
    """One prompt as a chat, the response to learn, and the answer a response is checked against."""

    prompt: tuple[tuple[str, str], ...]
    response: str
    answer: str
    source: SourceDefinition

    @property
    def messages(self) -> list[Message]:
        """The prompt as role and content."""
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def text(self) -> str:
        """The prompt's contents, one after another."""
        return "\n".join(content for _, content in self.prompt)


@dataclass(frozen=True)
class TaskData:
    """All splits of a task. `removed` counts training and validation rows that are tests."""

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    removed: int
    overlaps: dict[str, Overlap]

    @property
    def digest(self) -> str:
        """SHA-256 of every prompt, response and answer, in order."""
        state = hashlib.sha256()
        for examples in (self.train, self.validation, *self.tests.values()):
            for one in examples:
                state.update(json.dumps([one.prompt, one.response, one.answer]).encode())
        return state.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What a record keeps: counts, sources and what training shares with the tests."""
        return {
            "sha256": self.digest,
            "train": len(self.train),
            "validation": len(self.validation),
            "tests": {name: len(examples) for name, examples in self.tests.items()},
            "removed_because_tested": self.removed,
            "overlap_with_training": {
                name: found.summary() for name, found in self.overlaps.items()
            },
        }


def read_task(task: TaskDefinition, relative_to: Path, samples: int | None = None) -> TaskData:
    """Read every split, take tests out of training, and measure what is left in common.

    `samples` training rows at most, in place of the definition's.

    Raises:
        DataError: a source is missing, empty or lacks a named column; too few rows.
    """
    tests = read_tests(task, relative_to)
    train = _examples(task.train, task.seed, "train", relative_to)
    validation = _examples(task.validation, task.seed, "validation", relative_to)
    tested = {example.text for examples in tests.values() for example in examples}
    rows = len(train) + len(validation)
    train = [example for example in train if example.text not in tested]
    validation = [example for example in validation if example.text not in tested]
    removed = rows - len(train) - len(validation)
    if not task.validation:
        validation, train = train[: task.validation_samples], train[task.validation_samples :]
    kept = {example.text for example in validation}
    train = [example for example in train if example.text not in kept]
    train = train[: samples or task.samples]
    if not train:
        raise DataError(
            f"task {task.name}: no training rows are left beside {len(validation)} for validation"
            f" and {removed} that are tests: give it more rows, or lower validation_samples"
        )
    overlaps = {name: overlap(train, examples) for name, examples in tests.items()}
    return TaskData(train, validation[: task.validation_samples], tests, removed, overlaps)


def read_tests(task: TaskDefinition, relative_to: Path) -> dict[str, list[Example]]:
    """The test sets alone, by name."""
    return {
        source.name: _examples([source], task.seed, "tests", relative_to)[: task.test_samples]
        for source in task.tests
    }


def read_validation(task: TaskDefinition, relative_to: Path) -> list[Example]:
    """The validation split alone, as `read_task` gives it."""
    if not task.validation:
        return read_task(task, relative_to).validation
    tests = read_tests(task, relative_to)
    tested = {example.text for examples in tests.values() for example in examples}
    found = _examples(task.validation, task.seed, "validation", relative_to)
    return [one for one in found if one.text not in tested][: task.validation_samples]


def _examples(
    sources: Sequence[SourceDefinition], seed: int, split: str, relative_to: Path
) -> list[Example]:
    """The examples of all sources in one shuffled order."""
    found = [
        _example(row, source)
        for source in sources
        for row in read_rows(source, seed + SPLIT_SEEDS[split], relative_to)
    ]
    random.Random(seed).shuffle(found)
    return found


def _example(row: Row, source: SourceDefinition) -> Example:
    messages = row_messages(row, source)
    response = ""
    if messages[-1]["role"] == "assistant":
        response = messages[-1]["content"]
        messages = messages[:-1]
    if not messages:
        raise DataError(f"source {source.name}: a row has a response but no prompt")
    answer = column_text(row, source.answer, source) if source.answer is not None else ""
    prompt = tuple((message["role"], message["content"]) for message in messages)
    return Example(prompt, response, answer, source)
