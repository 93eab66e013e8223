"""Intervals and tests: published values, binomials by hand, and the same draws for a seed."""

from __future__ import annotations

import random
from dataclasses import replace
from math import comb
from typing import Any

import pytest

from qsun.errors import DataError
from qsun.evaluate.samples import Sample, Samples
from qsun.evaluate.scorecard import Scorecard, compare_records
from qsun.evaluate.statistics import bootstrap_difference, compare, exact_interval, mcnemar


def samples(system: str, values: list[float], prompts: str = "abcdefghijklmnop") -> Samples:
    rows = tuple(
        Sample(index, prompts[index], "target", "text", value) for index, value in enumerate(values)
    )
    return Samples(system, "math.held-out", "accuracy", 1.0, rows)


# Clopper and Pearson's, as published: 0 and all of 8 are 1 - (0.025)^(1/8) by hand.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 8, 0.0, 0.3694),
        (8, 8, 0.6306, 1.0),
        (10, 100, 0.0490, 0.1762),
        (5, 10, 0.1871, 0.8129),
        (0, 1, 0.0, 0.975),
    ],
)
def test_exact_intervals_are_the_published_ones(
    correct: int, total: int, low: float, high: float
) -> None:
    found = exact_interval(correct, total)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_an_exact_interval_of_none_right_follows_from_its_definition() -> None:
    assert exact_interval(0, 8)[1] == pytest.approx(1 - 0.025 ** (1 / 8), abs=1e-9)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 5), (1, 9), (3, 3), (7, 2), (12, 0)])
def test_mcnemar_is_the_binomial_by_hand(only_first: int, only_second: int) -> None:
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(total, one) for one in range(fewer + 1)) / 2**total
    expected = min(1.0, 2 * tail)
    assert mcnemar(only_first, only_second) == pytest.approx(expected)
    assert mcnemar(only_second, only_first) == pytest.approx(expected)


def test_mcnemar_of_no_difference_is_one() -> None:
    assert mcnemar(0, 0) == 1.0


def test_the_bootstrap_interval_is_the_same_for_a_seed_and_another_for_another() -> None:
    rng = random.Random(1)
    first = [rng.random() for _ in range(40)]
    second = [rng.random() for _ in range(40)]
    assert bootstrap_difference(first, second, 3) == bootstrap_difference(first, second, 3)
    assert bootstrap_difference(first, second, 3) != bootstrap_difference(first, second, 4)


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """Of 200 drawn sets whose true difference is 0.2, about 95 % have it inside."""
    rng = random.Random(5)
    inside = 0
    for seed in range(200):
        first = [float(rng.random() < 0.7) for _ in range(100)]
        second = [float(rng.random() < 0.5) for _ in range(100)]
        low, high = bootstrap_difference(first, second, seed, resamples=1000)
        inside += low <= 0.2 <= high
    assert 180 <= inside <= 199


def test_identical_values_differ_by_nothing() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    found = compare("qsun", "sun", "math", (values, values))
    assert (found.difference, found.interval_95, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert (found.only_first, found.only_second) == (0, 0)


def test_a_comparison_is_of_pairs() -> None:
    first, second = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    found = compare("qsun", "sun", "math", (first, second))
    assert found.difference == pytest.approx(3 / 6)
    assert (found.only_first, found.only_second) == (4, 1)
    assert found.p == mcnemar(4, 1)
    # The means alone would not say it: pairs that move together leave a narrow interval.
    steady = compare("qsun", "sun", "math", ([3.0, 9.0, 1.0], [2.0, 8.0, 0.0]))
    assert steady.interval_95 == (1.0, 1.0)
    assert steady.p is None
    assert steady.only_first is None


def test_samples_of_other_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="longer than"):
        compare("qsun", "sun", "math", ([1.0, 0.0], [1.0, 0.0, 1.0]))


def test_systems_that_were_asked_other_prompts_are_not_compared() -> None:
    asked = samples("qsun", [1.0, 0.0, 1.0])
    other = samples("sun", [1.0, 0.0, 1.0], prompts="abX")
    with pytest.raises(DataError, match=r"math\.held-out: these systems were not asked the same"):
        Scorecard((asked, other)).summary()


def test_fewer_samples_or_other_targets_are_not_the_same_questions() -> None:
    asked = samples("qsun", [1.0, 0.0, 1.0])
    targets = tuple(replace(row, target_sha256="other") for row in asked.rows)
    for other in (samples("sun", [1.0, 0.0]), replace(asked, system="sun", rows=targets)):
        with pytest.raises(DataError, match="were not asked the same prompts"):
            Scorecard((asked, other)).summary()


def test_a_scorecard_has_every_pair_the_later_system_first() -> None:
    card = Scorecard(
        (samples("qsun", [1.0, 1.0]), samples("base", [0.0, 0.0]), samples("sun", [1.0, 0.0]))
    ).summary()
    assert list(card["systems"]["math.held-out"]) == ["base", "sun", "qsun"]
    found = {(one["first"], one["second"]): one["difference"] for one in card["pairs"]}
    assert found == {("sun", "base"): 0.5, ("qsun", "base"): 1.0, ("qsun", "sun"): 0.5}
    assert card["values"]["math.held-out"] == {"base": "00", "sun": "10", "qsun": "11"}


def test_values_between_0_and_1_have_no_exact_interval_and_no_p() -> None:
    card: dict[str, Any] = Scorecard(
        (samples("base", [0.5, 1.0]), samples("sun", [0.25, 1.0]))
    ).summary()
    found = card["systems"]["math.held-out"]["base"]
    assert (found["accuracy"], found["interval_95"], found["correct"]) == (0.75, None, None)
    assert card["pairs"][0]["p"] is None
    assert card["values"]["math.held-out"]["sun"] == [0.25, 1.0]


def test_earlier_scorecards_are_compared_by_sample_and_refused_with_others() -> None:
    now = Scorecard((samples("qsun", [1.0, 1.0, 0.0]),)).summary()
    before = Scorecard((samples("qsun", [0.0, 1.0, 1.0]),)).summary()
    (found,) = compare_records(now, before)
    assert (found["first"], found["second"]) == ("qsun now", "qsun before")
    assert (found["difference"], found["only_first"], found["only_second"]) == (0.0, 1, 1)
    fewer = Scorecard((samples("qsun", [1.0, 1.0]),)).summary()
    with pytest.raises(DataError, match=r"math\.held-out: other samples"):
        compare_records(now, fewer)
    with pytest.raises(DataError, match="no system and test set in common"):
        compare_records(now, Scorecard((samples("sun", [1.0, 1.0, 1.0]),)).summary())
