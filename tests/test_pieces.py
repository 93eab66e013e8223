"""Pieces: what counts, how often, and which texts are read whole."""

from __future__ import annotations

import pytest

from qsun.calibrate.pieces import cut_as_served, some_of, weighted, whole_texts
from qsun.calibrate.samples import Sample
from qsun.config import SearchConfig
from qsun.jobs.block_walk import pieces_of

LONG = [Sample("long", list(range(1, 41)), 10) for _ in range(6)]  # 30 response tokens each
SHORT = [Sample("short", list(range(1, 13)), 8) for _ in range(6)]  # 4 each
SHARES = {"long": 3.0, "short": 1.0, "unused": 5.0}


def test_each_source_counts_by_its_share_however_long_its_responses_are() -> None:
    pieces = weighted(cut_as_served([*LONG, *SHORT], 64), SHARES, 1000)
    counted = {
        source: sum(one.weight * one.counted_positions for one in pieces if one.source == source)
        for source in ("long", "short")
    }
    assert counted == pytest.approx({"long": 750, "short": 250})


def test_some_texts_are_taken_of_every_source_in_turn() -> None:
    found = some_of([*LONG, *SHORT], 60)
    assert [one.source for one in found] == ["long", "short", "long", "short"]
    assert some_of(LONG, 10**6) == LONG


def test_texts_read_whole_count_as_their_share_of_what_is_served() -> None:
    samples = [*LONG, *SHORT]
    served = sum(one.counted_positions for one in cut_as_served(samples, 64))
    pieces = pieces_of(samples, SHARES, SearchConfig(plain=0.25, batch_tokens=64))
    behind = [one for one in pieces if one.prompts is not None]
    whole = [one for one in pieces if one.prompts is None]
    assert sum(one.weight * one.counted_positions for one in behind) == pytest.approx(served)
    assert sum(one.weight * one.counted_positions for one in whole) == pytest.approx(served / 4)
    assert sum(one.counted_positions for one in whole) < sum(len(one.tokens) for one in samples)


def test_without_a_share_nothing_is_read_whole() -> None:
    pieces = pieces_of(LONG, SHARES, SearchConfig(plain=0.0))
    assert all(one.prompts is not None for one in pieces)


def test_of_whole_texts_every_position_counts_alike_with_one_source() -> None:
    pieces = pieces_of(LONG, SHARES, SearchConfig(positions="all", batch_tokens=100))
    assert [one.weight for one in pieces] == [1.0] * len(whole_texts(LONG, 100))
