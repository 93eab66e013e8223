"""A request's way through a simulated cluster, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qsun.workload import Request


class Outcome(Enum):
    """How a request ended. One without an outcome was still under way."""

    ANSWERED = "answered"
    """All its tokens came."""
    BROKEN = "broken"
    """Its decode worker died when the client had a part of the answer."""
    UNAVAILABLE = "unavailable"
    """Its decode worker died before the first token, as often as the router tries again."""
    TOO_LONG = "too long"
    """No decode worker's KV cache could hold prompt and answer."""


@dataclass(eq=False, slots=True)
class Journey:
    """One request with its times, seconds from the start; none where it did not come to that."""

    request: Request
    began_s: float
    admitted_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    outcome: Outcome | None = None
    attempts: int = 0

    @property
    def answered(self) -> bool:
        """Whether all tokens came."""
        return self.outcome is Outcome.ANSWERED

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token; queue, prefill and hand-off are within."""
        return None if self.first_s is None else self.first_s - self.began_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens, of an answer of two or more."""
        if not self.answered or self.request.output_tokens < 2:
            return None
        assert self.ended_s is not None, "an answer has an end"
        assert self.first_s is not None, "an answer has a first token"
        return (self.ended_s - self.first_s) / (self.request.output_tokens - 1)

    @property
    def request_s(self) -> float | None:
        """From its arrival to its end."""
        return None if self.ended_s is None else self.ended_s - self.began_s
