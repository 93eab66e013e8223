"""References: a few of a task's own prompts with the responses it was tuned for, as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.errors import IncompatibleError

if TYPE_CHECKING:
    from qsun.handoff import Batch


@dataclass(frozen=True)
class Reference:
    """One prompt and its response, as token ids."""

    prompt: list[int]
    response: list[int]


def write_references(path: Path, references: Sequence[Reference]) -> None:
    """One line of JSON each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(reference)) for reference in references]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_references(path: Path, vocabulary: int) -> list[Reference]:
    """What `write_references` wrote.

    Raises:
        IncompatibleError: missing, damaged, or with tokens that `vocabulary` does not have.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        references = [Reference(**json.loads(line)) for line in lines]
        tokens = [token for one in references for token in (*one.prompt, *one.response)]
        lengths = [(len(one.prompt), len(one.response)) for one in references]
    except (OSError, ValueError, TypeError) as error:
        raise IncompatibleError(
            f"{path} cannot be read as prompts and responses: {error}"
        ) from error
    if not references or any(prompt < 2 or not response for prompt, response in lengths):
        raise IncompatibleError(f"{path} has a prompt under 2 tokens, or an empty response")
    if any(not isinstance(token, int) or not 0 <= token < vocabulary for token in tokens):
        raise IncompatibleError(f"{path} has tokens outside the vocabulary of {vocabulary}")
    return references


def batches(references: Sequence[Reference], size: int) -> Iterator[Batch]:
    """All of them, `size` at a time, shortest first."""
    from qsun.handoff import collate

    ordered = sorted(references, key=lambda one: len(one.prompt) + len(one.response))
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        yield collate([row.prompt for row in rows], [row.response for row in rows])
