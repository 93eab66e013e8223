"""Pieces: calibration samples as micro-batches, with the positions that the decode module computes.

A sample with a response is cut as it is served, at boundary n-1: the prefill module writes the
prompt's cache without its last token, the decode module reads that token and then the response.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from operator import attrgetter

import torch

from qsun.calibrate.samples import Sample
from qsun.handoff import padded


@dataclass(frozen=True)
class Piece:
    """Rows of one source, padded on the right.

    `prompts` int64 `[rows, positions]` is what the prefill module reads, None where the decode
    module reads all by itself; `written` int64 `[rows]` are their lengths. `read` int64 `[rows,
    positions]` is what the decode module reads after them; where `counted` (bool, alike) is set,
    it does so in service, or would; each such position counts `weight` times.
    """

    source: str
    prompts: torch.Tensor | None
    written: torch.Tensor
    read: torch.Tensor
    counted: torch.Tensor
    weight: float = 1.0

    @property
    def counted_positions(self) -> int:
        """How many positions' inputs count."""
        return int(self.counted.sum())


def cut_as_served(samples: Sequence[Sample], tokens: int) -> list[Piece]:
    """Pieces of at most about `tokens` tokens, prompts apart from what the decode module reads.

    Every sample has a prompt of at least 2 tokens and a response.
    """
    return [
        Piece(source, *padded([one.tokens[: one.prompt - 1] for one in rows]), *_read(rows))
        for source, rows in _grouped(samples, tokens)
    ]


def whole_texts(samples: Sequence[Sample], tokens: int) -> list[Piece]:
    """Pieces that the decode module reads by itself from the beginning; every position counts."""
    pieces = []
    for source, rows in _grouped(samples, tokens):
        read, lengths = padded([one.tokens for one in rows])
        counted = torch.arange(read.shape[1]) < lengths[:, None]
        pieces.append(Piece(source, None, torch.zeros_like(lengths), read, counted))
    return pieces


def weighted(pieces: Sequence[Piece], shares: Mapping[str, float], total: float) -> list[Piece]:
    """The pieces with each source's positions counting as its share of `total` positions."""
    positions: dict[str, int] = {}
    for piece in pieces:
        positions[piece.source] = positions.get(piece.source, 0) + piece.counted_positions
    whole = sum(shares[source] for source in positions)
    weights = {
        source: total * shares[source] / whole / count for source, count in positions.items()
    }
    return [replace(piece, weight=weights[piece.source]) for piece in pieces]


def some_of(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Samples of each source in turn, until they have so many tokens together."""
    by_source: dict[str, list[Sample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
    found: list[Sample] = []
    for row in zip_longest(*by_source.values()):
        if tokens <= 0:
            break
        chosen = [one for one in row if one is not None]
        tokens -= sum(len(one.tokens) for one in chosen)
        found += chosen
    return found


def _read(rows: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    read, lengths = padded([one.tokens[one.prompt - 1 : -1] for one in rows])
    return read, torch.arange(read.shape[1]) < lengths[:, None]


def _grouped(samples: Sequence[Sample], tokens: int) -> Iterator[tuple[str, list[Sample]]]:
    """Samples of one source and like length, together."""
    by_source = sorted(samples, key=lambda one: (one.source, len(one.tokens)))
    for source, found in groupby(by_source, key=attrgetter("source")):
        rows: list[Sample] = []
        for sample in found:
            if rows and (len(rows) + 1) * len(sample.tokens) > tokens:
                yield source, rows
                rows = []
            rows.append(sample)
        yield source, rows
