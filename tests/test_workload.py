"""Workloads: seeded, with rates, shares and lengths as asked for; traces, and wrong ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from qsun.errors import DataError
from qsun.workload import (
    Workload,
    closed_loop,
    open_loop,
    problems_of,
    read_trace,
    trace_lines,
    zipf_shares,
)

TASKS = ("math", "code", "tools", "chat")
OPEN = Workload(rate_per_s=20.0)
SECONDS = 1000.0


def gaps(workload: Workload) -> np.ndarray:
    return np.diff([one.at_s for one in open_loop(workload, TASKS, SECONDS, seed=3)])


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("poisson", 1.0), ("constant", 0.0), ("bursty:3", 3.0)]
)
def test_requests_come_at_the_rate_and_as_evenly_as_asked(arrivals: str, cv: float) -> None:
    found = gaps(replace(OPEN, arrivals=arrivals))
    assert found.mean() == pytest.approx(1 / 20, rel=0.08)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.08, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_tasks_have_their_shares_by_zipfs_law(alpha: float) -> None:
    shares = zipf_shares(4, alpha)
    assert shares.sum() == pytest.approx(1)
    assert shares[1] / shares[0] == pytest.approx(2**-alpha)
    drawn = [one.task for one in open_loop(replace(OPEN, alpha=alpha), TASKS, SECONDS, seed=5)]
    found = [drawn.count(task) / len(drawn) for task in TASKS]
    assert found == pytest.approx(shares, abs=0.02)


@pytest.mark.parametrize(
    ("form", "least", "median", "mean", "most"),
    [
        ("fixed:7", 7, 7, 7, 7),
        ("uniform:10:30", 10, 20, 20, 30),
        ("lognormal:50:0.5", 2, 50, 50 * np.exp(0.125), 300),
        ("geometric:40", 2, 40 * np.log(2), 40, 300),
    ],
)
def test_lengths_are_as_asked(form: str, least: int, median: float, mean: float, most: int) -> None:
    workload = replace(OPEN, prompt_tokens=form, output_tokens="fixed:1", max_tokens=301)
    found = [one.prompt_tokens for one in open_loop(workload, TASKS, SECONDS, seed=9)]
    assert least <= min(found)
    assert max(found) <= most
    assert np.median(found) == pytest.approx(median, rel=0.05)
    assert np.mean(found) == pytest.approx(mean, rel=0.05)


def test_the_same_seed_draws_the_same_requests() -> None:
    assert open_loop(OPEN, TASKS, 50, seed=1) == open_loop(OPEN, TASKS, 50, seed=1)
    assert open_loop(OPEN, TASKS, 50, seed=1) != open_loop(OPEN, TASKS, 50, seed=2)
    users = Workload(concurrency=2, output_tokens="uniform:1:9")
    assert list(islice(closed_loop(users, TASKS, 1), 20)) == list(
        islice(closed_loop(users, TASKS, 1), 20)
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rate_per_s": None}, "one of rate_per_s"),
        ({"concurrency": 2}, "one of rate_per_s"),
        ({"arrivals": "bursty"}, "bursty:NUMBER"),
        ({"arrivals": "often"}, "arrivals: often is not one of poisson"),
        ({"prompt_tokens": "fixed:many"}, "no number"),
        ({"output_tokens": "uniform:9:1"}, "larger number first"),
        ({"output_tokens": "fixed:0"}, "not above 0"),
        ({"output_tokens": "lognormal:nan:1"}, "not above 0"),
        ({"output_tokens": "geometric:0.5"}, "less than a token"),
        ({"max_tokens": 300}, "320 tokens: 300 are served"),
    ],
)
def test_what_cannot_be_drawn_is_said(changes: dict[str, object], problem: str) -> None:
    assert problems_of(OPEN) == []
    assert problem in "\n".join(problems_of(replace(OPEN, **changes)))  # type: ignore[arg-type]


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    drawn = open_loop(OPEN, TASKS, 5, seed=2)
    path.write_text(trace_lines(drawn[::-1]))
    found = read_trace(path, TASKS)
    first = drawn[0].at_s
    assert [one.at_s for one in found] == pytest.approx(
        [one.at_s - first for one in drawn], abs=1e-5
    )
    assert [one.task for one in found] == [one.task for one in drawn]


def test_a_wrong_trace_is_refused_with_every_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "task": "math", "input_length": 5, "output_length": 1}\n'
        '{"timestamp": 1, "task": "maths", "input_length": 5, "output_length": 1}\n'
        '{"timestamp": 1, "task": "math", "output_length": 1}\n'
        '{"timestamp": -1, "task": "math", "input_length": 5, "output_length": 1}\n'
        "no JSON\n"
    )
    with pytest.raises(DataError) as caught:
        read_trace(path, TASKS)
    for part in ("line 2: task maths", "did you mean math", "line 3: no 'input_length'", "line 5"):
        assert part in str(caught.value)
    assert "line 4: a timestamp from 0 on" in str(caught.value)
    path.write_text('{"timestamp": 0, "task": "math", "input_length": 5, "output_length": 4}')
    with pytest.raises(DataError, match="line 1: 5 and 4 tokens: 8 are served"):
        read_trace(path, TASKS, max_tokens=8)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no request"):
        read_trace(path, TASKS)
    with pytest.raises(DataError, match="cannot read trace"):
        read_trace(tmp_path / "none.jsonl", TASKS)
