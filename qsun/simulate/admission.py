"""Admission as the router's: by the same queue, in simulated time.

Nobody gives up waiting: the router's limits on its queue are left out, so that a queue that grows
is seen to grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import simpy

from qsun.policy import Policy
from qsun.room_queue import RoomQueue
from qsun.room_queue import Slot as AnySlot
from qsun.simulate.decode_worker import DecodeWorker
from qsun.simulate.pool import Pool

Slot = AnySlot[DecodeWorker]


class Admission:
    """Room on the decode workers, given out by a policy."""

    def __init__(
        self, env: simpy.Environment, pool: Pool, policy: Policy, tasks: Sequence[str]
    ) -> None:
        self._env, self._pool = env, pool
        self._queue: RoomQueue[DecodeWorker] = RoomQueue(
            policy, tasks, pool.names, lambda _: pool.ready()
        )
        pool.changed = self._queue.serve

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def enter(self, task: str, tokens: int, avoid: frozenset[str] = frozenset()) -> simpy.Event:
        """Room for `tokens` tokens, prompt and answer: an event that gives a `Slot`."""
        given = self._env.event()

        def give(slot: Slot) -> bool:
            given.succeed(slot)
            return True

        self._queue.enter(self._queue.waiting(task, tokens, avoid, give))
        return given

    def move(self, slot: Slot, avoid: frozenset[str]) -> None:
        """Choose again, as things are now that the prompt has been read."""
        before = slot.worker
        self._queue.move(slot, avoid)
        self._pool.retire(before)

    def leave(self, slot: Slot) -> None:
        """Give a request's room back."""
        self._queue.leave(slot)
        self._pool.retire(slot.worker)
