"""The router: one request from its admission to the last piece of its answer.

Queue, prefill worker, then a decode worker chosen anew, over all tasks. What fails before the
client got anything is tried again from the start, on other workers, with a new prefill: used KV
parameters are never sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from qsun.config import ServeConfig
from qsun.serve.admission import Admission, Slot
from qsun.serve.asked import Asked, Piece, Timeline
from qsun.serve.hops import HopError, Hops, RefusedByWorker
from qsun.serve.metrics import Metrics
from qsun.serve.pool import Pool, State, Worker
from qsun.serve.refusals import Refusal, bad_request, unavailable

FAILURES_IN_A_ROW = 3  # of a worker that answers otherwise, until it has to join again


class BrokenAnswer(Exception):
    """An answer that ended before its end, after the client got a part of it."""


@dataclass
class _Tried:
    """The workers that failed this request, and what was the last to go wrong."""

    workers: set[str] = field(default_factory=set)
    attempts: int = 0
    last: HopError | None = None


class Router:
    """Requests over a pool of workers."""

    def __init__(
        self, pool: Pool, admission: Admission, hops: Hops, metrics: Metrics, limits: ServeConfig
    ) -> None:
        self._pool, self._admission, self._hops = pool, admission, hops
        self._metrics, self._limits = metrics, limits
        self._turns = count()
        self._releases: set[asyncio.Task[None]] = set()

    async def whole(self, asked: Asked, times: Timeline) -> list[Piece]:
        """All pieces of an answer; an attempt that fails at any place is made again.

        Raises:
            Refusal: no answer; says why.
        """
        tried = _Tried()
        async with _Outcome(self._metrics, asked, times):
            while True:
                try:
                    async with aclosing(self._attempt(asked, times, tried)) as pieces:
                        return [piece async for piece in pieces]
                except HopError as error:
                    self._note(asked, tried, error)

    async def stream(self, asked: Asked, times: Timeline) -> AsyncGenerator[Piece, None]:
        """An answer's pieces as they come; attempts are made again up to the first.

        Raises:
            Refusal: no answer; says why.
            BrokenAnswer: the rest of it will not come.
        """
        tried, begun = _Tried(), False
        async with _Outcome(self._metrics, asked, times):
            while True:
                try:
                    async with aclosing(self._attempt(asked, times, tried)) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                    return
                except HopError as error:
                    if begun:
                        self._judge(error)
                        raise BrokenAnswer(str(error)) from error
                    self._note(asked, tried, error)

    async def _attempt(
        self, asked: Asked, times: Timeline, tried: _Tried
    ) -> AsyncGenerator[Piece, None]:
        times.attempts += 1
        times.generated = 0
        avoid = frozenset(tried.workers)
        slot = await self._admission.enter(asked.task, asked.tokens, avoid)
        try:
            reader = self._reader(asked.task, avoid)
            times.admitted = times.admitted or time.monotonic()
            begun = time.monotonic()
            reader.in_flight += 1
            try:
                parameters = await self._hops.prefill(reader, asked)
            finally:
                reader.in_flight -= 1
            reader.failures = 0
            times.prefilled = time.monotonic()
            times.prefill_worker = reader.name
            self._metrics.prefill.labels(asked.task, reader.name).observe(times.prefilled - begun)
            self._admission.move(slot, avoid)
            times.decode_worker = slot.worker.name
            async with aclosing(self._answer(asked, slot, parameters, times)) as pieces:
                async for piece in pieces:
                    yield piece
            slot.worker.failures = 0
        finally:
            self._admission.leave(slot)

    async def _answer(
        self, asked: Asked, slot: Slot, parameters: dict[str, Any], times: Timeline
    ) -> AsyncGenerator[Piece, None]:
        """The decode worker's pieces, each timed."""
        fetched = False
        labels = asked.task, slot.worker.name
        between = self._metrics.between.labels(*labels)
        try:
            async with aclosing(self._hops.decode(slot.worker, asked, parameters)) as pieces:
                async for piece in pieces:
                    now = time.monotonic()
                    if not fetched:
                        fetched, times.first = True, now
                        self._metrics.hand_off.labels(
                            asked.task, times.prefill_worker, slot.worker.name
                        ).observe(now - times.prefilled)
                    elif piece.token_ids:
                        between.observe((now - times.last) / len(piece.token_ids))
                    times.last = now
                    times.generated += len(piece.token_ids)
                    yield piece
        except HopError as error:
            if not fetched and not error.lost:
                self._release(slot.worker, asked, parameters)
            raise

    def _reader(self, task: str, avoid: frozenset[str]) -> Worker:
        """The least loaded prefill worker of the task."""
        workers = self._pool.prefill(task)
        workers = [one for one in workers if one.name not in avoid] or workers
        if not workers:
            raise unavailable(f"no prefill worker for {task} is ready")
        turn = next(self._turns) % len(workers)
        return min(workers[turn:] + workers[:turn], key=lambda one: one.in_flight)

    def _note(self, asked: Asked, tried: _Tried, error: HopError) -> None:
        """Learn from a failed attempt, or give up."""
        if isinstance(error, RefusedByWorker):
            raise bad_request("refused", error.message) from error
        self._judge(error)
        tried.attempts += 1
        tried.workers.add(error.worker.name)
        self._metrics.retries.labels(asked.task, error.worker.name, error.reason).inc()
        if tried.attempts >= self._limits.attempts:
            message = f"{tried.attempts} attempts failed, the last with {error}"
            raise unavailable(message) from error

    def _judge(self, error: HopError) -> None:
        """Whether the worker may be asked again before it has joined anew."""
        worker = error.worker
        worker.failures += 1
        if error.lost or worker.failures >= FAILURES_IN_A_ROW:
            self._pool.mark(worker, State.DOWN, str(error))

    def _release(self, worker: Worker, asked: Asked, parameters: dict[str, Any]) -> None:
        task = asyncio.create_task(self._hops.release(worker, asked, parameters))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


class _Outcome:
    """Counts how a request ended, whichever way."""

    def __init__(self, metrics: Metrics, asked: Asked, times: Timeline) -> None:
        self._metrics, self._asked, self._times = metrics, asked, times

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        outcome = "answered" if kind is None else _OUTCOMES.get(kind.__name__, "failed")
        if isinstance(error, Refusal):
            outcome = _REFUSALS.get(error.status, "refused")
        self._metrics.finished(self._asked.task, len(self._asked.prompt), self._times, outcome)


_REFUSALS = {429: "overloaded", 503: "unavailable"}
_OUTCOMES = {
    BrokenAnswer.__name__: "broken",
    asyncio.CancelledError.__name__: "cancelled",
    GeneratorExit.__name__: "cancelled",
}
