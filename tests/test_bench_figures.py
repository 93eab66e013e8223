"""What a bench computes: steady windows, summaries, gaps between tokens."""

from __future__ import annotations

import numpy as np
import pytest

from qsun.bench.client import Answer
from qsun.bench.curves import gaps_together
from qsun.bench.drive import Run
from qsun.bench.measures import measures_of, summary_of
from qsun.bench.settings import BenchConfig
from qsun.bench.steady import POINTS, cut, in_flight, steady_from
from qsun.bench.target import Target, Work
from qsun.latency_summary import fairness, interactivity, percentiles
from qsun.workload import Request


def test_a_beginning_that_is_not_like_the_rest_is_cut_off() -> None:
    dice = np.random.default_rng(0)
    filling = np.concatenate([np.linspace(0, 10, 40), 10 + dice.normal(0, 1, 160)])
    found = cut(filling)
    assert found is not None
    assert 28 <= found <= 45
    assert cut(np.full(200, 3.0)) == 0


def test_what_only_grows_is_never_steady() -> None:
    assert cut(np.arange(200.0)) is None
    overloaded = [(second, 10_000.0) for second in np.linspace(0, 60, 600)]
    assert steady_from(overloaded, 60) is None


def test_requests_in_flight_are_counted_at_even_times() -> None:
    counts = in_flight([(0.0, 10.0), (5.0, 10.0), (7.5, 20.0)], 10.0)
    assert len(counts) == POINTS
    assert list(counts[: POINTS // 2]) == [1] * (POINTS // 2)
    assert list(counts[POINTS // 2 : 3 * POINTS // 4]) == [2] * (POINTS // 4)
    assert set(counts[3 * POINTS // 4 :]) == {3}


def test_summaries_have_students_intervals() -> None:
    runs = [
        {
            **dict.fromkeys(("tokens_per_s_per_decode_worker", "tokens_per_s_per_worker"), 1.0),
            "tokens_per_s": value,
            "goodput_per_s": 0.0,
            "ttft_s": None,
            "tpot_s": {"p50": 0.1, "p99": 0.2},
            "interactivity_tokens_per_s": {"p50": 10.0},
            "fairness": None,
        }
        for value in (9.0, 10.0, 11.0)
    ]
    found = summary_of(runs)
    assert found["tokens_per_s"]["mean"] == pytest.approx(10)
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)
    assert found["tokens_per_s"]["interval"] == pytest.approx([10 - 2.4841, 10 + 2.4841], abs=1e-3)
    assert found["tpot_p99_s"]["mean"] == pytest.approx(0.2)
    assert "ttft_p50_s" not in found
    assert "fairness" not in found
    for few in (1, 2):
        assert summary_of(runs[:few])["tokens_per_s"]["interval"] is None


def test_a_window_between_two_looks_has_the_workers_batches() -> None:
    request = Request(0.0, "math", 8, 2)
    answers = [Answer(request, 0.7, [0.8, 1.4], 1.6) for _ in range(2)]
    pace = {"decode-0": (30.0, 10.0), "decode-1": (10.0, 10.0)}  # tokens and steps a second

    def look(at_s: float) -> tuple[float, dict[str, Work]]:
        done = {name: Work("decode", *(at_s * one for one in both)) for name, both in pace.items()}
        return at_s, done | {"prefill-0": Work("prefill", at_s, at_s)}

    run = Run(1.5, answers, [look(at_s) for at_s in (0.01, 0.52, 1.03, 1.61)])
    target = Target("", None, ("math",), "", "", "", 10, dict.fromkeys(pace, "decode"))
    found = measures_of(run, target, BenchConfig())
    begin_s, end_s = found["window_s"]
    assert 0.52 < begin_s < 1.03 < end_s < 1.61  # one look alone lies within it
    shares = found["by_worker"]
    assert {name: one["mean_batch"] for name, one in shares.items()} == pytest.approx(
        {"decode-0": 3, "decode-1": 1}
    )
    assert shares["decode-0"]["tokens_per_s"] == pytest.approx(0.75 * found["tokens_per_s"])


def test_a_tasks_tokens_in_the_window_count_whenever_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qsun.bench.measures.steady_from", lambda *_: 1.0)
    answers = [
        Answer(Request(0.0, "math", 8, 3), 0.5, [0.8, 1.2, 1.5], 1.6),
        Answer(Request(0.0, "tools", 8, 2), 1.1, [1.3, 1.6], 1.7),
    ]
    target = Target("", None, ("math", "tools"), "", "", "", 10, {"decode-0": "decode"})
    looks = [(at_s, {"decode-0": Work("decode", at_s, at_s)}) for at_s in (0.1, 2.1)]
    found = measures_of(Run(2.0, answers, looks), target, BenchConfig())
    assert found["window_s"] == [1.0, 2.0]
    assert found["sent"] == 1
    tokens = {task: one["tokens_per_s"] for task, one in found["by_task"].items()}
    assert tokens == {"math": 2.0, "tools": 2.0}
    assert found["tokens_per_s"] == 4.0


def test_fairness_is_jains_index() -> None:
    assert fairness([2, 2, 2, 2]) == pytest.approx(1)
    assert fairness([1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert fairness([]) is None


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([]) is None
    assert interactivity([]) is None
    assert percentiles([0.1, 0.3]) == pytest.approx(
        {"mean": 0.2, "p50": 0.2, "p90": 0.28, "p99": 0.298}
    )
    found = interactivity([0.1, 0.2])
    assert found is not None
    assert found["p50"] == pytest.approx(7.5)


def test_gaps_are_taken_while_all_are_answered() -> None:
    def answer(*token_s: float) -> Answer:
        return Answer(Request(0, "math", 4, len(token_s)), token_s=list(token_s))

    long, short = answer(1, 2, 3, 4, 5, 6), answer(3, 4, 4, 4, 5)
    # The long one's between 3 and 5; of the short one's three that came at 4, each a third.
    assert sorted(gaps_together([long, short])) == pytest.approx([1 / 3] * 3 + [1] * 3)
