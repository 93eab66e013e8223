"""Sources: where rows of text come from and which of their columns mean what."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("huggingface", "jsonl", "package", "generator", "functions")
NEEDED = {
    "huggingface": ("dataset",),
    "jsonl": ("path",),
    "package": ("package", "path"),
    "generator": ("dataset",),
    "functions": ("packages",),
}


@dataclass(frozen=True)
class SourceDefinition:
    """One source of rows, and which of a row's columns make a sample.

    A row gives either `text`, or `prompt` (with or without `response`), or `messages`. Each names
    a column (`answer`, `metadata.answer_cot`) or is a Jinja template over the columns
    (`{{ question }}`). `answers` and `answers_key` join a second file of the same package by a
    common column. A generator makes `rows` problems, and `templates` chooses a side of its problem
    templates. Functions with docstrings are gathered from installed `packages`. `answer`, for tasks
    alone, is what a response is checked against.
    """

    name: str
    kind: str = field(metadata={"choices": KINDS})
    weight: float = field(default=1.0, metadata={"minimum": 0.0})
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    path: str | None = None
    package: str | None = None
    answers: str | None = None
    answers_key: str = "id"
    packages: tuple[str, ...] = ()
    rows: int = field(default=4096, metadata={"minimum": 1})
    templates: str = field(default="all", metadata={"choices": ("all", "train", "held-out")})
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    answer: str | None = None
    licence: str | None = None


def source_problems(source: SourceDefinition) -> list[str]:
    """Everything wrong with a source that its definition alone shows."""
    problems = [
        f"source {source.name}: kind {source.kind} needs {key}"
        for key in NEEDED[source.kind]
        if not getattr(source, key)
    ]
    given = [key for key in ("text", "prompt", "messages") if getattr(source, key) is not None]
    if len(given) != 1:
        problems.append(
            f"source {source.name}: give one of text, prompt or messages, not {given or 'none'}"
        )
    if source.response is not None and source.prompt is None:
        problems.append(f"source {source.name}: response needs a prompt beside it")
    return problems
