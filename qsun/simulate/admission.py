"""Admission as the router's: room on a decode worker first, in the order of arrival, by a policy.

Nobody gives up waiting: the router's limits on its queue are left out, so that a queue that grows
is seen to grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

import simpy

from qsun.policy import Policy, choose, eligible
from qsun.simulate.decode_worker import DecodeWorker
from qsun.simulate.pool import Pool


@dataclass
class Slot:
    """Room for one request: its blocks on a decode worker."""

    task: str
    tokens: int
    turn: int
    worker: DecodeWorker


@dataclass(eq=False)
class _Waiting:
    task: str
    tokens: int
    turn: int
    avoid: frozenset[str]
    slot: simpy.Event


class Admission:
    """Room on the decode workers, given out by a policy."""

    def __init__(
        self, env: simpy.Environment, pool: Pool, policy: Policy, tasks: Sequence[str]
    ) -> None:
        self.waiting = 0
        self._env, self._pool, self._policy, self._tasks = env, pool, policy, sorted(tasks)
        self._queues: dict[str, deque[_Waiting]] = {task: deque() for task in self._tasks}
        self._turns = count()
        self._eligible: dict[str, frozenset[str]] = {}
        self._names: frozenset[str] = frozenset()
        pool.changed = self._pool_changed
        self._pool_changed()

    def enter(self, task: str, tokens: int, avoid: frozenset[str] = frozenset()) -> simpy.Event:
        """Room for `tokens` tokens, prompt and answer: an event that gives a `Slot`."""
        one = _Waiting(task, tokens, next(self._turns), avoid, self._env.event())
        self._queues[task].append(one)
        self.waiting += 1
        self._serve_queue()
        return one.slot

    def move(self, slot: Slot, avoid: frozenset[str]) -> None:
        """Choose again, as things are now that the prompt has been read."""
        self._release(slot)
        before = slot.worker
        slot.worker = self._room(slot, avoid, frozenset()) or before
        self._reserve(slot)
        self._pool.retire(before)
        self._serve_queue()

    def leave(self, slot: Slot) -> None:
        """Give a request's room back."""
        self._release(slot)
        self._pool.retire(slot.worker)
        self._serve_queue()

    def _serve_queue(self) -> None:
        """Give room to those who wait, nobody ahead of an earlier one who could use the same.

        Of a task, the first in the queue stands for all: where it finds no room, its workers are
        spoken for, and the others of the task could use no other.
        """
        if not self.waiting:
            return
        heads = {task: queue[0].turn for task, queue in self._queues.items() if queue}
        spoken_for: set[str] = set()
        while heads and not spoken_for >= self._names:
            task = min(heads, key=heads.__getitem__)
            one = self._queues[task][0]
            worker = self._room(one, one.avoid, spoken_for)
            if worker is None:
                spoken_for |= self._allowed(task)
                del heads[task]
                continue
            self._queues[task].popleft()
            self.waiting -= 1
            slot = Slot(one.task, one.tokens, one.turn, worker)
            self._reserve(slot)
            one.slot.succeed(slot)
            if self._queues[task]:
                heads[task] = self._queues[task][0].turn
            else:
                del heads[task]

    def _room(
        self, wanted: Slot | _Waiting, avoid: Collection[str], spoken_for: Collection[str]
    ) -> DecodeWorker | None:
        allowed = self._allowed(wanted.task)
        fitting = [
            worker
            for worker in self._pool.workers
            if worker.ready
            and worker.name in allowed
            and worker.name not in spoken_for
            and worker.has_room(wanted.tokens)
        ]
        # A worker that failed this request is asked again only where there is no other.
        fitting = [worker for worker in fitting if worker.name not in avoid] or fitting
        if not fitting:
            return None
        name = choose(self._policy, [worker.load() for worker in fitting], wanted.turn)
        return next(worker for worker in fitting if worker.name == name)

    def _allowed(self, task: str) -> frozenset[str]:
        if task not in self._eligible:
            names = self._pool.names()
            self._eligible[task] = eligible(self._policy, names, self._tasks, task)
        return self._eligible[task]

    def _pool_changed(self) -> None:
        self._eligible, self._names = {}, frozenset(self._pool.names())
        self._serve_queue()

    def _reserve(self, slot: Slot) -> None:
        slot.worker.in_flight += 1
        slot.worker.reserved_blocks += slot.worker.room.blocks_for(slot.tokens)

    def _release(self, slot: Slot) -> None:
        slot.worker.in_flight -= 1
        slot.worker.reserved_blocks -= slot.worker.room.blocks_for(slot.tokens)
