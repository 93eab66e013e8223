"""The definition of a text set: which sources, how many samples, how long, which seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qsun.errors import ConfigError, bullet_list
from qsun.settings import load_settings

KINDS = ("huggingface", "jsonl", "package", "generator")
NEEDED = {
    "huggingface": ("dataset",),
    "jsonl": ("path",),
    "package": ("package", "path"),
    "generator": ("dataset",),
}


@dataclass(frozen=True)
class SourceDefinition:
    """One source of rows, and which of a row's columns make a sample.

    A row gives either `text`, or `prompt` (with or without `response`), or `messages`. Each names
    a column (`answer`, `metadata.answer_cot`) or is a Jinja template over the columns
    (`{{ question }}`). `answers` and `answers_key` join a second file of the same package by a
    common column. `templates` chooses a side of the generator's problem templates.
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
    templates: str = field(default="all", metadata={"choices": ("all", "train", "held-out")})
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class TextDefinition:
    """A set of samples for calibration or held-out measurement, mixed from its sources."""

    description: str
    sources: tuple[SourceDefinition, ...]
    samples: int = field(default=128, metadata={"minimum": 1})
    min_tokens: int = field(default=16, metadata={"minimum": 2})
    max_tokens: int = field(default=512, metadata={"minimum": 2})
    seed: int = 0

    def samples_of(self) -> list[int]:
        """Samples that each source gives: shares by weight, largest remainders rounded up."""
        total = sum(source.weight for source in self.sources)
        shares = [self.samples * source.weight / total for source in self.sources]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for index in by_remainder[: self.samples - sum(counts)]:
            counts[index] += 1
        return counts


def load_definition(path: Path) -> TextDefinition:
    """Read a definition from `calib/`.

    Raises:
        ConfigError: every mistake, each named.
    """
    definition = load_settings(TextDefinition, path)
    problems = [] if definition.sources else ["sources: at least one is needed"]
    if definition.min_tokens > definition.max_tokens:
        problems.append("min_tokens is above max_tokens: no sample could ever fit")
    if definition.sources and not sum(source.weight for source in definition.sources):
        problems.append("sources: every weight is 0")
    for source in definition.sources:
        problems += _source_problems(source)
    if problems:
        raise ConfigError(f"{path} has {len(problems)} mistake(s):\n{bullet_list(problems)}")
    return definition


def _source_problems(source: SourceDefinition) -> list[str]:
    problems = [
        f"source {source.name}: kind {source.kind} needs {key}"
        for key in NEEDED[source.kind]
        if getattr(source, key) is None
    ]
    given = [key for key in ("text", "prompt", "messages") if getattr(source, key) is not None]
    if len(given) != 1:
        problems.append(
            f"source {source.name}: give one of text, prompt or messages, not {given or 'none'}"
        )
    if source.response is not None and source.prompt is None:
        problems.append(f"source {source.name}: response needs a prompt beside it")
    return problems
