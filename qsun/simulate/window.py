"""The window that figures are of: a warm-up is left out before, and an end after it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Window:
    """From `begin_s` to `end_s`; what came within it may end until `settle_s` later."""

    begin_s: float
    end_s: float
    settle_s: float = 0.0

    @property
    def length_s(self) -> float:
        """Seconds."""
        return self.end_s - self.begin_s

    def holds(self, at_s: float) -> bool:
        """Whether a moment is within."""
        return self.begin_s <= at_s < self.end_s

    def overlap_s(self, begin_s: float, end_s: float) -> float:
        """How much of a time lies within."""
        return max(0.0, min(end_s, self.end_s) - max(begin_s, self.begin_s))


@dataclass
class Gauge:
    """A number that changes, and its mean over a window."""

    window: Window
    value: float = 0.0
    since_s: float = 0.0
    summed: float = field(default=0.0, init=False)

    def add(self, change: float, now_s: float) -> None:
        """The number changes by so much now."""
        self.summed += self.value * self.window.overlap_s(self.since_s, now_s)
        self.value, self.since_s = self.value + change, now_s

    def mean(self, now_s: float) -> float:
        """Its mean over the part of the window until now."""
        so_far_s = self.window.overlap_s(0.0, now_s)
        self.add(0, now_s)
        return self.summed / so_far_s if so_far_s > 0 else self.value
