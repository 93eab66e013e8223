"""Admission: a request begins when its prompt can be read and some decode worker has room for it.

A decode worker that runs out of KV blocks preempts, and would have to read the prompt again by
itself. So blocks for prompt and longest answer are set aside before the prompt is read; what finds
none waits in a queue, in the order of arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count

from qsun.policy import Policy, choose, eligible
from qsun.serve.pool import Pool, Worker
from qsun.serve.refusals import Refusal, bad_request, overloaded, unavailable


@dataclass
class Slot:
    """Room for one request: its blocks on a decode worker."""

    task: str
    tokens: int
    turn: int
    worker: Worker
    blocks: int


@dataclass(eq=False)
class _Waiting:
    task: str
    tokens: int
    turn: int
    avoid: frozenset[str]
    slot: asyncio.Future[Slot] = field(default_factory=asyncio.Future)


class Admission:
    """Room on the decode workers, given out by a policy."""

    def __init__(
        self, pool: Pool, policy: Policy, tasks: Collection[str], queue_length: int, queue_s: float
    ) -> None:
        self._pool, self._policy, self._tasks = pool, policy, sorted(tasks)
        self._queue_length, self._queue_s = queue_length, queue_s
        self._queue: list[_Waiting] = []
        self._turns = count()
        pool.changed.append(lambda _: self._serve_queue())

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
        one = _Waiting(task, tokens, next(self._turns), avoid)
        if len(self._queue) >= self._queue_length and not self._queue_is_movable(one):
            raise overloaded(f"{len(self._queue)} requests are waiting already", self._queue_s / 2)
        self._queue.append(one)
        self._serve_queue()
        try:
            async with asyncio.timeout(self._queue_s):
                return await one.slot
        except TimeoutError as error:
            self._withdraw(one)
            raise self._too_slow(task) from error
        except asyncio.CancelledError:
            self._withdraw(one)
            raise

    def move(self, slot: Slot, avoid: frozenset[str]) -> None:
        """Choose again, as things are now that the prompt has been read."""
        self._release(slot)
        worker = self._room(slot, avoid, frozenset())
        self._reserve(slot, worker or slot.worker)
        self._serve_queue()

    def leave(self, slot: Slot) -> None:
        """Give a request's room back."""
        self._release(slot)
        self._serve_queue()

    def _withdraw(self, one: _Waiting) -> None:
        """Wait no longer; room that was given in the same moment goes back."""
        if one in self._queue:
            self._queue.remove(one)
            self._serve_queue()
        elif one.slot.done() and not one.slot.cancelled():
            self.leave(one.slot.result())

    def _queue_is_movable(self, one: _Waiting) -> bool:
        return not self._queue and self._room(one, one.avoid, frozenset()) is not None

    def _serve_queue(self) -> None:
        """Give room to those who wait, nobody ahead of an earlier one who could use the same."""
        spoken_for: set[str] = set()
        for one in [one for one in self._queue if not one.slot.cancelled()]:
            worker = self._room(one, one.avoid, spoken_for)
            if worker is None:
                # Without anybody to read its prompt, it keeps nobody else from a decode worker.
                spoken_for |= self._allowed(one.task) if self._pool.prefill(one.task) else set()
                continue
            self._queue.remove(one)
            slot = Slot(one.task, one.tokens, one.turn, worker, 0)
            self._reserve(slot, worker)
            one.slot.set_result(slot)

    def _room(
        self, wanted: Slot | _Waiting, avoid: Collection[str], spoken_for: Collection[str]
    ) -> Worker | None:
        can_begin = bool(self._pool.prefill(wanted.task))
        allowed = self._allowed(wanted.task) - set(spoken_for) if can_begin else ()
        fitting = [
            worker
            for worker in self._pool.decode()
            if worker.name in allowed and worker.has_room(wanted.tokens)
        ]
        # A worker that failed this request is asked again only where there is no other.
        fitting = [worker for worker in fitting if worker.name not in avoid] or fitting
        if not fitting:
            return None
        name = choose(self._policy, [worker.load() for worker in fitting], wanted.turn)
        return next(worker for worker in fitting if worker.name == name)

    def _allowed(self, task: str) -> frozenset[str]:
        return eligible(self._policy, self._pool.decode_names(), self._tasks, task)

    def _reserve(self, slot: Slot, worker: Worker) -> None:
        slot.worker, slot.blocks = worker, worker.blocks_for(slot.tokens)
        worker.in_flight += 1
        worker.reserved_blocks += slot.blocks

    def _release(self, slot: Slot) -> None:
        slot.worker.in_flight -= 1
        slot.worker.reserved_blocks -= slot.blocks

    def _check_possible(self, task: str, tokens: int) -> None:
        allowed = self._allowed(task)
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
