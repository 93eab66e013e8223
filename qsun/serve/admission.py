"""Admission: a request begins when its prompt can be read and some decode worker has room for it.

A decode worker that runs out of KV blocks preempts, and would have to read the prompt again by
itself. So blocks for prompt and longest answer are set aside before the prompt is read; what finds
none waits in a queue, in the order of arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from qsun.policy import Policy
from qsun.room_queue import RoomQueue
from qsun.room_queue import Slot as AnySlot
from qsun.room_queue import Waiting as AnyWaiting
from qsun.serve.pool import Pool, Worker
from qsun.serve.refusals import Refusal, bad_request, overloaded, unavailable

Slot = AnySlot[Worker]
Waiting = AnyWaiting[Worker]


class Admission:
    """Room on the decode workers, given out by a policy."""

    def __init__(
        self, pool: Pool, policy: Policy, tasks: Collection[str], queue_length: int, queue_s: float
    ) -> None:
        self._pool = pool
        self._queue_length, self._queue_s = queue_length, queue_s
        self._queue: RoomQueue[Worker] = RoomQueue(policy, tasks, pool.decode_names, self._ready)
        pool.changed.append(lambda _: self._queue.serve())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def enter(self, task: str, tokens: int, avoid: frozenset[str] = frozenset()) -> Slot:
        """Room for `tokens` tokens, prompt and answer, now or within the queue's deadline.

        Raises:
            Refusal: the queue is full or moved too slowly (429), no worker that could be asked
                came back in time (503), or no decode worker could ever hold as much (400).
        """
        self._check_possible(task, tokens)
        given: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()

        def give(slot: Slot) -> bool:
            if not given.done():
                given.set_result(slot)
            return not given.cancelled()

        one = self._queue.waiting(task, tokens, avoid, give)
        if len(self._queue) >= self._queue_length and not self._queue.finds_room(one):
            raise overloaded(f"{len(self._queue)} requests are waiting already", self._queue_s / 2)
        self._queue.enter(one)
        try:
            async with asyncio.timeout(self._queue_s):
                return await given
        except TimeoutError as error:
            self._withdraw(one, given)
            raise self._too_slow(task) from error
        except asyncio.CancelledError:
            self._withdraw(one, given)
            raise

    def move(self, slot: Slot, avoid: frozenset[str]) -> None:
        """Choose again, as things are now that the prompt has been read."""
        self._queue.move(slot, avoid)

    def leave(self, slot: Slot) -> None:
        """Give a request's room back."""
        self._queue.leave(slot)

    def _withdraw(self, one: Waiting, given: asyncio.Future[Slot]) -> None:
        """Wait no longer; room that was given in the same moment goes back."""
        if not self._queue.withdraw(one) and given.done() and not given.cancelled():
            self.leave(given.result())

    def _ready(self, task: str) -> list[Worker] | None:
        """The decode workers that may be asked, where somebody can read the task's prompts."""
        return self._pool.decode() if self._pool.prefill(task) else None

    def _check_possible(self, task: str, tokens: int) -> None:
        allowed = self._queue.allowed(task)
        known = [one for one in self._pool.decode() if one.blocks and one.name in allowed]
        if known and all(worker.blocks_for(tokens) > worker.blocks for worker in known):
            most = max(worker.blocks * worker.block_tokens for worker in known)
            raise bad_request(
                "context_length_exceeded",
                f"prompt and answer of {tokens} tokens; a decode worker's KV cache holds {most}",
                "max_tokens",
            )

    def _too_slow(self, task: str) -> Refusal:
        missing = [
            role
            for role, workers in (
                ("prefill", self._pool.prefill(task)),
                ("decode", self._pool.decode()),
            )
            if not workers
        ]
        if missing:
            return unavailable(
                f"no {missing[0]} worker for {task} was ready within {self._queue_s:g} s"
            )
        return overloaded(
            f"no decode worker had room within {self._queue_s:g} s", self._queue_s / 2
        )
