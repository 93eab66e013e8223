"""Statistics: how sure an accuracy is, and a difference between two systems on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Two systems on the same samples, the first minus the second.

    `interval_95` is the percentile bootstrap's over samples; `p` McNemar's exact two-sided test
    (None where values are not 0 and 1); `only_first` and `only_second` count samples that one alone
    got right.
    """

    first: str
    second: str
    test: str
    difference: float
    interval_95: tuple[float, float]
    p: float | None
    only_first: int | None
    only_second: int | None

    def summary(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return asdict(self)


def exact_interval(correct: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval (1934) of a share."""
    from scipy.stats import binomtest

    found = binomtest(correct, total).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability of so uneven a split of the samples that one alone got right, by chance."""
    from scipy.stats import binomtest

    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of the mean difference when samples are drawn anew, pairs kept together."""
    differences = np.subtract(first, second)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(differences), size=(resamples, len(differences)), dtype=np.int32)
    low, high = np.quantile(differences[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def compare(
    first: str,
    second: str,
    test: str,
    values: tuple[Sequence[float], Sequence[float]],
    seed: int = 0,
) -> Paired:
    """Two systems' values of the same samples in the same order."""
    ours, theirs = values
    binary = all(one in (0.0, 1.0) for one in (*ours, *theirs))
    pairs = list(zip(ours, theirs, strict=True))
    only_first = sum(a > b for a, b in pairs)
    only_second = sum(b > a for a, b in pairs)
    return Paired(
        first,
        second,
        test,
        float(np.mean(np.subtract(ours, theirs))),
        bootstrap_difference(ours, theirs, seed),
        mcnemar(only_first, only_second) if binary else None,
        only_first if binary else None,
        only_second if binary else None,
    )
