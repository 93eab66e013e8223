"""Summaries of latencies, one way for what was measured and for what was simulated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SECONDS = {"p50": 50, "p90": 90, "p99": 99}
# Of a rate the low percentiles are the bad ones.
RATES = {"p50": 50, "p10": 10, "p1": 1}


def percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Mean and percentiles of durations; none of nothing."""
    return _summary(seconds, SECONDS)


def interactivity(tpot_s: Sequence[float]) -> dict[str, float] | None:
    """Tokens a second that each user sees, the reciprocal of TPOT: mean and low percentiles."""
    return _summary([1 / one for one in tpot_s if one > 0], RATES)


def fairness(shares: Sequence[float]) -> float | None:
    """Jain's index of what each task gets: 1 where all get the same, 1/n where one gets all.

    Jain, Chiu, Hawe (1984), "A quantitative measure of fairness and discrimination".
    """
    values = np.asarray(shares, dtype=float)
    if not values.any():
        return None
    return float(values.sum() ** 2 / (len(values) * (values**2).sum()))


def _summary(
    values: Sequence[float] | np.ndarray, points: dict[str, int]
) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, list(points.values()))
    return {"mean": float(np.mean(values)), **dict(zip(points, map(float, found), strict=True))}
