"""Samples: rows become chat text, chat text becomes tokens, and everything left out is counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.calibrate.definition import SourceDefinition, TextDefinition
from qsun.calibrate.rows import Row, read_rows
from qsun.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SHOWN_CHARACTERS = 60  # of a value that is refused


@dataclass(frozen=True)
class SourceRows:
    """The shuffled rows of one source and how many samples it owes."""

    source: SourceDefinition
    rows: list[Row]
    wanted: int


@dataclass(frozen=True)
class SourceCount:
    """What became of one source's rows."""

    name: str
    rows: int
    used: int
    too_short: int
    truncated: int


@dataclass(frozen=True)
class SampleSet:
    """Tokenized samples, with what was left out and a digest of every token."""

    tokens: list[list[int]]
    counts: list[SourceCount]
    digest: str
    chat_template: str

    @property
    def token_count(self) -> int:
        """Tokens over all samples."""
        return sum(map(len, self.tokens))

    def summary(self) -> dict[str, Any]:
        """What a record keeps of the set: everything but the tokens."""
        return {
            "samples": len(self.tokens),
            "tokens": self.token_count,
            "sha256": self.digest,
            "chat_template": self.chat_template,
            "sources": [asdict(count) for count in self.counts],
        }


def read_sources(definition: TextDefinition, relative_to: Path) -> list[SourceRows]:
    """Read and shuffle every source, and try its first row, before any model is opened.

    Raises:
        CalibrationError: a source is missing, empty, or lacks a named column.
    """
    read = []
    wanted = definition.samples_of()
    for source, count in zip(definition.sources, wanted, strict=True):
        rows = read_rows(source, definition.seed, relative_to)
        row_messages(rows[0], source)
        random.Random(definition.seed).shuffle(rows)
        read.append(SourceRows(source, rows, count))
    return read


def tokenize_sources(
    sources: Sequence[SourceRows], definition: TextDefinition, tokenizer: PreTrainedTokenizerBase
) -> SampleSet:
    """Take samples from each source in its shuffled order until it has given its share.

    A text under `min_tokens` is skipped, one over `max_tokens` is cut; both are counted.

    Raises:
        CalibrationError: a source runs out before its share is full.
    """
    tokens: list[list[int]] = []
    counts = []
    for read in sources:
        used, count = _take(read, definition, tokenizer)
        tokens += used
        counts.append(count)
    state = hashlib.sha256()
    for sample in tokens:
        state.update(len(sample).to_bytes(4, "little"))
        state.update(b"".join(token.to_bytes(4, "little") for token in sample))
    template = "model" if tokenizer.chat_template else "none: prompt, blank line, response"
    return SampleSet(tokens, counts, state.hexdigest(), template)


def _take(
    read: SourceRows, definition: TextDefinition, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], SourceCount]:
    used: list[list[int]] = []
    too_short = truncated = seen = 0
    for row in read.rows:
        if len(used) == read.wanted:
            break
        seen += 1
        ids = _encode(row, read.source, tokenizer)
        if len(ids) < definition.min_tokens:
            too_short += 1
            continue
        truncated += len(ids) > definition.max_tokens
        used.append(ids[: definition.max_tokens])
    if len(used) < read.wanted:
        raise CalibrationError(
            f"source {read.source.name} gave {len(used)} of {read.wanted} samples: {too_short} of "
            f"its {seen} rows are under min_tokens {definition.min_tokens}.\n"
            "Lower samples or min_tokens, or give it more text."
        )
    return used, SourceCount(read.source.name, seen, len(used), too_short, truncated)


def _encode(row: Row, source: SourceDefinition, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if source.text is not None:
        return list(tokenizer(_field(row, source.text, source)).input_ids)
    messages = row_messages(row, source)
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)
    return list(tokenizer(_chat(messages, source, tokenizer), add_special_tokens=False).input_ids)


def _chat(
    messages: list[Message], source: SourceDefinition, tokenizer: PreTrainedTokenizerBase
) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise CalibrationError(
            f"source {source.name}: the model's chat template refuses a row with the roles "
            f"{roles}: {error}"
        ) from error


def row_messages(row: Row, source: SourceDefinition) -> list[Message]:
    """The chat that a row stands for; plain text is one user message.

    Raises:
        CalibrationError: a named column is not in the row, which lists the row's columns; or it
            holds something else than text or messages.
    """
    if source.messages is not None:
        value = _lookup(row, source.messages, source)
        if not isinstance(value, list) or not all(map(_is_message, value)):
            raise CalibrationError(
                f"source {source.name}: column {source.messages!r} must hold a list of messages "
                f"with role and content, both text; a row has {_beginning(value)}"
            )
        return value
    prompt = _field(row, source.prompt or source.text or "", source)
    messages = [{"role": "user", "content": prompt}]
    if source.response is not None:
        messages.append({"role": "assistant", "content": _field(row, source.response, source)})
    return messages


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("role", "content")
    )


def _beginning(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _field(row: Row, spec: str, source: SourceDefinition) -> str:
    if "{{" in spec:
        return _render(row, spec, source)
    value = _lookup(row, spec, source)
    if not isinstance(value, str):
        raise CalibrationError(
            f"source {source.name}: column {spec!r} holds {type(value).__name__}, not text: "
            f"a row has {_beginning(value)}"
        )
    return value


def _lookup(row: Row, path: str, source: SourceDefinition) -> Any:
    value: Any = row
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            raise CalibrationError(
                f"source {source.name}: there is no column {path!r}; "
                f"its columns are {', '.join(row)}"
            )
        value = value[step]
    return value


def _render(row: Row, template: str, source: SourceDefinition) -> str:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        return environment.from_string(template).render(row)
    except Exception as error:  # whatever an expression of the user's raises, by design
        raise CalibrationError(
            f"source {source.name}: template {template!r}: {error or type(error).__name__}; "
            f"its columns are {', '.join(row)}"
        ) from error
