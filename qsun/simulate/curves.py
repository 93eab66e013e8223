"""Curves: seconds of a prefill and of a decode step, between the points that were measured.

Linear between two points. A batch has no time beyond the largest measured; lengths beyond the
longest go on along the last two points, and never fall; below the least, the least's time counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Line:
    """A value by length: `at` in tokens, ascending, and as many `values`."""

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, tokens: float) -> float:
        """The value at a length."""
        if tokens <= self.at[0]:
            return self.values[0]
        place = bisect_right(self.at, tokens)
        if place == len(self.at):
            return self.values[-1] + self._last_slope * (tokens - self.at[-1])
        left, right = self.at[place - 1], self.at[place]
        part = (tokens - left) / (right - left)
        return self.values[place - 1] * (1 - part) + self.values[place] * part

    @cached_property
    def _last_slope(self) -> float:
        if len(self.at) < 2:
            return 0.0
        rise, run = self.values[-1] - self.values[-2], self.at[-1] - self.at[-2]
        return max(0.0, rise / run)


class StepTimes:
    """Seconds of a decode step by batch and mean context, in one format."""

    def __init__(self, measured: Mapping[int, Line]) -> None:
        """From a line over contexts for each measured batch."""
        self.largest_batch = max(measured)
        self.longest_tokens = max(line.at[-1] for line in measured.values())
        self._lines = _every_batch(measured)

    def __call__(self, batch: int, context_tokens: float) -> float:
        """Seconds of one step of `batch` requests whose contexts have this mean."""
        return self._lines[batch - 1](context_tokens)

    def largest_within(self, tpot_s: float, context_tokens: float) -> int:
        """The largest batch whose step takes at most `tpot_s`, 1 where none does."""
        fitting = [
            batch
            for batch in range(1, self.largest_batch + 1)
            if self(batch, context_tokens) <= tpot_s
        ]
        return max(fitting, default=1)


@dataclass(frozen=True)
class Timing:
    """All that takes time: a decode step, a prompt read alone, the hand-off of its cache."""

    step_s: StepTimes
    prefill_s: Line
    hand_off_s: float


def _every_batch(measured: Mapping[int, Line]) -> Sequence[Line]:
    """A line for each batch from 1 to the largest measured."""
    batches = sorted(measured)
    found = []
    for batch in range(1, batches[-1] + 1):
        place = max(1, bisect_right(batches, batch))
        low, high = batches[place - 1], batches[min(place, len(batches) - 1)]
        part = 0.0 if high <= low else max(0.0, (batch - low) / (high - low))
        found.append(_between(measured[low], measured[high], part))
    return found


def _between(low: Line, high: Line, part: float) -> Line:
    if part == 0.0:
        return low
    # One knot past the ends keeps both lines' slopes there.
    knots = sorted({*low.at, *high.at})
    knots.append(2 * knots[-1])
    values = np.array([[line(knot) for knot in knots] for line in (low, high)])
    mixed = (1 - part) * values[0] + part * values[1]
    return Line(tuple(knots), tuple(map(float, mixed)))
