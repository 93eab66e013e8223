"""Samples: rows become chat text, chat text becomes tokens, and everything left out is counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.calibrate.definition import TextDefinition
from qsun.chats import encode_row, row_messages
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
        ids = encode_row(row, read.source, tokenizer)
        if len(ids) < definition.min_tokens:
            too_short += 1
            continue
        truncated += len(ids) > definition.max_tokens
        used.append(ids[: definition.max_tokens])
    if len(used) < read.wanted:
        raise DataError(
            f"source {read.source.name} gave {len(used)} of {read.wanted} samples: {too_short} of "
            f"its {seen} rows are under min_tokens {definition.min_tokens}.\n"
            "Lower samples or min_tokens, or give it more text."
        )
    return used, SourceCount(read.source.name, seen, len(used), too_short, truncated)
