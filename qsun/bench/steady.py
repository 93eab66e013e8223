"""When a run has become steady: the beginning that would falsify its means is cut off.

MSER (White, 1997, "An effective truncation heuristic for bias reduction in simulation output"):
the cut that makes the mean of what follows the surest, by the marginal standard error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POINTS = 200  # of time at which requests in flight are counted


def in_flight(spans: Sequence[tuple[float, float]], seconds: float) -> np.ndarray:
    """How many of the requests, each sent and ended at its times, were there at even times."""
    times = (np.arange(POINTS) + 0.5) * seconds / POINTS
    sent = np.sort([span[0] for span in spans])
    ended = np.sort([span[1] for span in spans])
    return np.searchsorted(sent, times, "right") - np.searchsorted(ended, times, "right")


def cut(series: np.ndarray) -> int | None:
    """How many of the first values to leave out, less than half; None where half is not enough.

    That is so where the series still grows or falls at its end: there is no steady state.
    """
    half = len(series) // 2
    values = np.asarray(series, dtype=float)
    errors = [values[first:].var() / (len(values) - first) for first in range(half)]
    best = int(np.argmin(errors))
    return None if best == half - 1 else best


def steady_from(spans: Sequence[tuple[float, float]], seconds: float) -> float | None:
    """From which second on a run of `seconds` is steady; None where it never is."""
    found = cut(in_flight(spans, seconds)) if spans else None
    return None if found is None else found * seconds / POINTS
