"""Policies: which decode worker goes on with a request. Pure: values in, a name out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random


class Policy(Enum):
    """How decode workers are shared."""

    SHARED = "shared"
    """SUN's: any worker takes any task, the least loaded first."""
    ISOLATED = "isolated"
    """The conventional baseline: each task has decode workers of its own."""
    ROUND_ROBIN = "round-robin"
    """Any worker takes any task, one after another."""
    POWER_OF_TWO = "power-of-two"
    """Any worker takes any task, the less loaded of two drawn ones."""


@dataclass(frozen=True)
class Load:
    """What a decode worker has to do: requests and KV blocks, of as many as it takes."""

    worker: str
    in_flight: int
    streams: int
    reserved_blocks: int
    blocks: int

    @property
    def share(self) -> float:
        """How full it is, 0 to 1: of requests or of KV blocks, whichever is fuller."""
        return max(self.in_flight / self.streams, self.reserved_blocks / self.blocks)


def eligible(
    policy: Policy, workers: Sequence[str], tasks: Sequence[str], task: str
) -> frozenset[str]:
    """The decode workers that may take `task`, whatever they have to do.

    Isolated, tasks and workers are dealt to each other in the order of their names: with fewer
    workers than tasks, several tasks have the same one; with more, a task has several.
    """
    if policy is not Policy.ISOLATED:
        return frozenset(workers)
    ordered, place = sorted(workers), sorted(tasks).index(task)
    if not ordered:
        return frozenset()
    if len(ordered) <= len(tasks):
        return frozenset(ordered[place % len(ordered) :][:1])
    return frozenset(ordered[place :: len(tasks)])


def choose(policy: Policy, loads: Sequence[Load], turn: int) -> str:
    """One of the workers that have room. `turn` counts requests: the same turn, the same choice."""
    ordered = sorted(loads, key=lambda load: load.worker)
    if policy is Policy.ROUND_ROBIN:
        return ordered[turn % len(ordered)].worker
    if policy is Policy.POWER_OF_TWO and len(ordered) > 2:
        ordered = Random(turn).sample(ordered, 2)
    return min(ordered, key=lambda load: (load.share, load.in_flight, load.worker)).worker
