"""How many decode workers a pool should have: by how full it is, or by what is asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from qsun.simulate.config import SizingConfig, SloConfig
from qsun.simulate.curves import Timing
from qsun.simulate.journey import Journey

LATEST = 200  # answers whose lengths are looked at
MOST_GROWTH = 2.0  # a rate that rises is expected to double at most, however short the look at it


@dataclass(frozen=True)
class Seen:
    """What a router can see of itself: its decode workers, requests, and who came so far."""

    now_s: float
    ready: int
    starting: int
    in_flight: int
    waiting: int
    streams: int
    journeys: Sequence[Journey]

    @property
    def size(self) -> int:
        """Workers that are ready, or will be."""
        return self.ready + self.starting

    @property
    def load_share(self) -> float:
        """Requests, those that wait too, of as many as ready and starting workers take."""
        return (self.in_flight + self.waiting) / (self.streams * max(1, self.size))


@dataclass(frozen=True)
class Sizing(ABC):
    """A decode pool's size, looked at every `look_s`; new workers are ready after `start_s`."""

    limits: SizingConfig

    def clamped(self, seen: Seen) -> int:
        """What is wanted, between the least and the most allowed."""
        return min(max(self.wanted(seen), self.limits.least), self.limits.most)

    @abstractmethod
    def wanted(self, seen: Seen) -> int:
        """How many decode workers there should be."""


@dataclass(frozen=True)
class Reactive(Sizing):
    """One more above a load share of `high`, one less below `low`."""

    def wanted(self, seen: Seen) -> int:
        """One more, one less, or as many."""
        if seen.load_share > self.limits.high:
            return seen.size + 1
        return seen.size - 1 if seen.load_share < self.limits.low else seen.size


@dataclass(frozen=True)
class Predictive(Sizing):
    """As many as can take the requests that will come when a new worker could be ready.

    If more came in the later half of `window_s` than in the earlier, the rate goes on rising as it
    did, to `MOST_GROWTH` times itself at most; if fewer, the earlier half's counts. Those that wait
    now are to be gone by then, too. By Little's law a worker takes as many a second as it has
    streams within the SLO's TPOT, filled up to `high`, over the time that a request has one: its
    prefill, its hand-off and its steps, at the mean lengths of the latest answers.
    """

    timing: Timing
    slo: SloConfig

    def wanted(self, seen: Seen) -> int:
        """Requests a second, over a worker's; as many as there are while nothing has ended yet."""
        latest = (one.request for one in reversed(seen.journeys) if one.answered)
        ended = list(islice(latest, LATEST))
        if not ended:
            return seen.size
        prompt = sum(one.prompt_tokens for one in ended) / len(ended)
        output = sum(one.output_tokens for one in ended) / len(ended)
        context, step_s = prompt + output / 2, self.timing.step_s
        batch = min(seen.streams, step_s.largest_within(self.slo.tpot_p99_s, context))
        before_s = self.timing.prefill_s(prompt) + self.timing.hand_off_s
        takes = self.limits.high * batch / (before_s + output * step_s(batch, context))
        waiting = seen.waiting / max(self.limits.start_s, self.limits.look_s)
        return math.ceil((self._rate_ahead(seen) + waiting) / takes)

    def _rate_ahead(self, seen: Seen) -> float:
        """Requests a second when a worker that is started now is ready."""
        window_s = min(self.limits.window_s, seen.now_s)
        came = [seen.now_s - one.began_s for one in _recent(seen, window_s)]
        half_s = window_s / 2
        later = sum(ago <= half_s for ago in came) / half_s
        earlier = sum(half_s < ago for ago in came) / half_s
        rising = (later - earlier) / half_s * self.limits.start_s
        return max(earlier, min(later + max(0.0, rising), MOST_GROWTH * later))


def _recent(seen: Seen, window_s: float) -> list[Journey]:
    """Those that came within the last `window_s`, the latest first."""
    found = []
    for journey in reversed(seen.journeys):
        if journey.began_s < seen.now_s - window_s:
            break
        found.append(journey)
    return found


def sizing_of(name: str, limits: SizingConfig, slo: SloConfig, timing: Timing) -> Sizing | None:
    """A pool sizing by its name; `fixed` is none."""
    if name == "fixed":
        return None
    return Reactive(limits) if name == "reactive" else Predictive(limits, timing, slo)
