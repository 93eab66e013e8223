"""Samples: rows become chat text, chat text becomes tokens, and everything left out is counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.calibrate.definition import TextDefinition
from qsun.chats import encode_prompts, encode_row, row_messages
from qsun.errors import DataError
from qsun.rows import Row, read_rows
from qsun.sources import SourceDefinition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
class Sample:
    """One sample's tokens, of which the first `prompt` are what a response was given to.

    `prompt` is 0 where the row is plain text.
    """

    source: str
    tokens: list[int]
    prompt: int

    @property
    def is_served(self) -> bool:
        """Whether it has a prompt to hand off and a response: what a decode module answers."""
        return 2 <= self.prompt < len(self.tokens)


@dataclass(frozen=True)
class SampleSet:
    """Tokenized samples, with what was left out and a digest of every token."""

    samples: list[Sample]
    counts: list[SourceCount]
    digest: str
    chat_template: str

    @property
    def tokens(self) -> list[list[int]]:
        """Every sample's tokens."""
        return [sample.tokens for sample in self.samples]

    @property
    def token_count(self) -> int:
        """Tokens over all samples."""
        return sum(map(len, self.tokens))

    def summary(self) -> dict[str, Any]:
        """What a record keeps of the set: everything but the tokens."""
        return {
            "samples": len(self.samples),
            "tokens": self.token_count,
            "sha256": self.digest,
            "chat_template": self.chat_template,
            "sources": [asdict(count) for count in self.counts],
        }


def read_sources(definition: TextDefinition, relative_to: Path) -> list[SourceRows]:
    """Read and shuffle every source, and try its first row, before any model is opened.

    Raises:
        DataError: a source is missing, empty, or lacks a named column.
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
        DataError: a source runs out before its share is full.
    """
    samples: list[Sample] = []
    counts = []
    for read in sources:
        used, count = _take(read, definition, tokenizer)
        samples += used
        counts.append(count)
    state = hashlib.sha256()
    for sample in samples:
        state.update(len(sample.tokens).to_bytes(4, "little"))
        state.update(b"".join(token.to_bytes(4, "little") for token in sample.tokens))
    template = "model" if tokenizer.chat_template else "none: prompt, blank line, response"
    return SampleSet(samples, counts, state.hexdigest(), template)


def _take(
    read: SourceRows, definition: TextDefinition, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Sample], SourceCount]:
    used: list[Sample] = []
    too_short = truncated = seen = 0
    for row in read.rows:
        if len(used) == read.wanted:
            break
        seen += 1
        ids = encode_row(row, read.source, tokenizer)
        if len(ids) < definition.min_tokens:
            too_short += 1
            continue
        truncated += len(ids) > definition.max_tokens
        prompt = _prompt_length(row, read.source, ids, tokenizer)
        used.append(Sample(read.source.name, ids[: definition.max_tokens], prompt))
    if len(used) < read.wanted:
        raise DataError(
            f"source {read.source.name} gave {len(used)} of {read.wanted} samples: {too_short} of "
            f"its {seen} rows are under min_tokens {definition.min_tokens}.\n"
            "Lower samples or min_tokens, or give it more text."
        )
    return used, SourceCount(read.source.name, seen, len(used), too_short, truncated)


def _prompt_length(
    row: Row, source: SourceDefinition, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many of a row's tokens come before its response; 0 without one.

    Where a tokenizer joins the two texts' ends, the tokens that they share no more are the
    response's.
    """
    messages = row_messages(row, source)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        return 0
    [prompt] = encode_prompts([(messages[:-1], source)], tokenizer)
    same = (ours == theirs for ours, theirs in zip(prompt, ids, strict=False))
    return sum(1 for _ in takewhile(bool, same))
