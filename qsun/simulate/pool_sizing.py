"""How many decode workers a pool should have: by how full it is, or by what is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from qsun.simulate.config import SizingConfig, SloConfig
from qsun.simulate.curves import StepTimes
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
class Sizing:
    """A decode pool's size, looked at every `look_s`; new workers are ready after `start_s`."""

    limits: SizingConfig

    def clamped(self, seen: Seen) -> int:
        """What is wanted, between the least and the most allowed."""
        return min(max(self.wanted(seen), self.limits.least), self.limits.most)

    def wanted(self, seen: Seen) -> int:
        """How many decode workers there should be."""
        raise NotImplementedError


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
    """As many as yield the tokens that will be asked for when a new worker could be ready.

    Tokens asked for: requests a second, times the mean length of the latest answers. If more came
    in the later half of `window_s` than in the earlier, the rate goes on rising as it did, to
    `MOST_GROWTH` times itself at most; if fewer, the earlier half's counts. A worker yields its
    largest batch within the SLO's TPOT, over that batch's step time, filled up to `high`.
    """

    step_s: StepTimes
    slo: SloConfig

    def wanted(self, seen: Seen) -> int:
        """Tokens ahead over a worker's; as many as there are while nothing has ended yet."""
        latest = (one.request for one in reversed(seen.journeys) if one.answered)
        ended = list(islice(latest, LATEST))
        if not ended:
            return seen.size
        tokens = sum(one.output_tokens for one in ended) / len(ended)
        context = sum(one.prompt_tokens + one.output_tokens / 2 for one in ended) / len(ended)
        batch = min(seen.streams, self.step_s.largest_within(self.slo.tpot_p99_s, context))
        yields = self.limits.high * batch / self.step_s(batch, context)
        return math.ceil(self._rate_ahead(seen) * tokens / yields)

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


def sizing_of(name: str, limits: SizingConfig, slo: SloConfig, step_s: StepTimes) -> Sizing | None:
    """A pool sizing by its name; `fixed` is none."""
    if name == "fixed":
        return None
    return Reactive(limits) if name == "reactive" else Predictive(limits, step_s, slo)
