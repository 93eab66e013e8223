"""A cluster: requests come, wait for room, are read, handed over and answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import simpy

from qsun.config import ServeConfig
from qsun.policy import Policy
from qsun.room_queue import Slot
from qsun.simulate.admission import Admission
from qsun.simulate.curves import Timing
from qsun.simulate.decode_worker import DecodeWorker, Process, Room
from qsun.simulate.journey import Journey, Outcome
from qsun.simulate.pool import Pool
from qsun.simulate.pool_sizing import Seen, Sizing
from qsun.simulate.prefill_worker import PrefillPool, PrefillWorker
from qsun.simulate.window import Gauge, Window
from qsun.workload import Request

ATTEMPTS = ServeConfig().attempts
REFUSED_S = 1.0  # until a user whose request was too long asks for something else


@dataclass(frozen=True)
class Layout:
    """Workers and who may use them. `prefill` says how many read the prompts of which tasks."""

    policy: Policy
    tasks: tuple[str, ...]
    decode_workers: int
    room: Room
    prefill: Mapping[tuple[str, ...], int]


@dataclass(frozen=True)
class Load:
    """Who asks: `requests` as they come, or `users`, each again once answered, of `endless`."""

    requests: Sequence[Request] = ()
    users: int = 0
    endless: Iterator[Request] = field(default_factory=lambda: iter(()))


@dataclass(frozen=True)
class Change:
    """What happens to the decode pool at `at_s`: `loss`, `growth` or `shrink` by `workers`."""

    at_s: float
    kind: str
    workers: int
    start_s: float | None = None
    """Until a new worker, or one that died, is ready; one that died for good has none."""


@dataclass(frozen=True)
class Run:
    """What a simulation left behind. `ended_s` is when it stopped.

    `in_system` and `paid_workers` are means over the window, requests and decode workers;
    `steps` those that each decode worker had made when the window began and when it ended.
    """

    window: Window
    ended_s: float
    journeys: Sequence[Journey]
    in_system: float
    paid_workers: float
    sizes: Sequence[tuple[float, int]]
    decode: Sequence[DecodeWorker]
    prefill: Sequence[PrefillWorker]
    steps: Mapping[DecodeWorker, tuple[int, int]]


def simulate(
    layout: Layout,
    timing: Timing,
    load: Load,
    window: Window,
    changes: Sequence[Change] = (),
    sizing: Sizing | None = None,
) -> Run:
    """Run a load until what came within the window has ended, or its time to settle is over."""
    return _Cluster(layout, timing, window).run(load, changes, sizing)


class _Cluster:
    def __init__(self, layout: Layout, timing: Timing, window: Window) -> None:
        self._env = env = simpy.Environment()
        self._window, self._timing = window, timing
        self._pool = Pool(env, timing.step_s, layout.room, window)
        for _ in range(layout.decode_workers):
            self._pool.add()
        self._prefill = PrefillPool(env, _prefill_workers(env, layout), timing.prefill_s, window)
        self._admission = Admission(env, self._pool, layout.policy, layout.tasks)
        self._journeys: list[Journey] = []
        self._in_system = Gauge(window)
        self._open = 0  # of those that came within the window
        self._settled = env.event()
        self._begin_steps: dict[DecodeWorker, int] = {}
        self._end_steps: dict[DecodeWorker, int] | None = None

    def run(self, load: Load, changes: Sequence[Change], sizing: Sizing | None) -> Run:
        env, window = self._env, self._window
        env.process(self._arrivals(load.requests))
        for _ in range(load.users):
            env.process(self._user(load.endless))
        for change in changes:
            env.process(self._change(change))
        if sizing is not None:
            env.process(self._resize(sizing))
        env.process(self._note_steps())
        env.run(until=self._settled | env.timeout(window.end_s + window.settle_s))
        return Run(
            window=window,
            ended_s=env.now,
            journeys=self._journeys,
            in_system=self._in_system.mean(env.now),
            paid_workers=self._pool.paid.mean(env.now),
            sizes=self._pool.sizes,
            decode=self._pool.workers,
            prefill=self._prefill.workers,
            steps={one: self._steps(one) for one in self._pool.workers},
        )

    def _steps(self, worker: DecodeWorker) -> tuple[int, int]:
        """Steps when the window began and when it ended; none where the worker came later."""
        begin = self._begin_steps.get(worker, 0)
        return begin, worker.steps if self._end_steps is None else self._end_steps.get(worker, 0)

    def _arrivals(self, requests: Sequence[Request]) -> Process:
        for request in requests:
            yield self._env.timeout(max(0.0, request.at_s - self._env.now))
            self._env.process(self._live(request))

    def _user(self, requests: Iterator[Request]) -> Process:
        for request in requests:
            yield self._env.process(self._live(request))

    def _live(self, request: Request) -> Process:
        """One request, from its arrival to its end."""
        journey = Journey(request, self._env.now)
        self._journeys.append(journey)
        if not self._pool.room.holds(request.prompt_tokens + request.output_tokens):
            journey.outcome, journey.ended_s = Outcome.TOO_LONG, self._env.now
            yield self._env.timeout(REFUSED_S)
            return
        self._count(journey, 1)
        tried: set[str] = set()
        while journey.outcome is None:
            yield from self._attempt(journey, tried)
        journey.ended_s = self._env.now
        self._count(journey, -1)

    def _attempt(self, journey: Journey, tried: set[str]) -> Process:
        """Queue, prefill, hand-off, answer; again where it failed before its first token."""
        request, avoid = journey.request, frozenset(tried)
        journey.attempts += 1
        tokens = request.prompt_tokens + request.output_tokens
        slot = yield self._admission.enter(request.task, tokens, avoid)
        assert isinstance(slot, Slot), "admission gives slots"
        journey.admitted_s = self._env.now
        yield from self._prefill.read(request.task, request.prompt_tokens)
        self._admission.move(slot, avoid)
        yield self._env.timeout(self._timing.hand_off_s)
        whole = yield slot.worker.answer(journey)
        self._admission.leave(slot)
        if whole:
            journey.outcome = Outcome.ANSWERED
        elif journey.first_s is not None:
            journey.outcome = Outcome.BROKEN
        elif journey.attempts == ATTEMPTS:
            journey.outcome = Outcome.UNAVAILABLE
        else:
            tried.add(slot.worker.name)

    def _count(self, journey: Journey, change: int) -> None:
        self._in_system.add(change, self._env.now)
        if self._window.holds(journey.began_s):
            self._open += change
            self._look_whether_settled()

    def _look_whether_settled(self) -> None:
        over = self._env.now >= self._window.end_s
        if over and not self._open and not self._settled.triggered:
            self._settled.succeed()

    def _note_steps(self) -> Process:
        yield self._env.timeout(self._window.begin_s)
        self._begin_steps = {one: one.steps for one in self._pool.workers}
        yield self._env.timeout(self._window.length_s)
        self._end_steps = {one: one.steps for one in self._pool.workers}
        self._look_whether_settled()

    def _change(self, change: Change) -> Process:
        yield self._env.timeout(change.at_s)
        names: Sequence[str | None] = ()
        if change.kind == "shrink":
            self._pool.drain(change.workers)
        elif change.kind == "loss":
            names = self._pool.lose(change.workers)
        else:
            names = [None] * change.workers
        if change.start_s is not None:
            for name in names:
                self._env.process(self._pool.start(change.start_s, name))

    def _resize(self, sizing: Sizing) -> Process:
        while True:
            yield self._env.timeout(sizing.limits.look_s)
            wanted = sizing.clamped(self._seen())
            ready = len(self._pool.ready())
            for _ in range(wanted - ready - self._pool.starting):
                self._env.process(self._pool.start(sizing.limits.start_s))
            if not self._pool.starting and wanted < ready:
                self._pool.drain(ready - wanted)

    def _seen(self) -> Seen:
        ready = self._pool.ready()
        return Seen(
            now_s=self._env.now,
            ready=len(ready),
            starting=self._pool.starting,
            in_flight=sum(one.in_flight for one in ready),
            waiting=self._admission.waiting,
            streams=self._pool.room.streams,
            journeys=self._journeys,
        )


def _prefill_workers(env: simpy.Environment, layout: Layout) -> list[PrefillWorker]:
    return [
        PrefillWorker(env, f"prefill-{group[0]}-{number}", frozenset(group))
        for group, workers in layout.prefill.items()
        for number in range(workers)
    ]
