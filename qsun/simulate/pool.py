"""The decode pool: workers that start, serve, drain and die."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import simpy

from qsun.simulate.curves import StepTimes
from qsun.simulate.decode_worker import DecodeWorker, Process, Room
from qsun.simulate.window import Gauge, Window


class Pool:
    """All decode workers that are or were, in the order in which they became ready.

    `sizes` are the ready ones by time: seconds and number at each change. `paid` are those that
    occupy a machine: starting, ready and draining. `changed` is called at each change.
    """

    def __init__(
        self, env: simpy.Environment, step_s: StepTimes, room: Room, window: Window
    ) -> None:
        self.room = room
        self.workers: list[DecodeWorker] = []
        self.starting = 0
        self.sizes: list[tuple[float, int]] = []
        self.paid = Gauge(window)
        self.changed: Callable[[], None] = lambda: None
        self._env, self._step_s = env, step_s
        self._numbers = count()

    def ready(self) -> list[DecodeWorker]:
        """Those that may be given requests."""
        return [one for one in self.workers if one.ready]

    def names(self) -> list[str]:
        """Those that are not on their way out, whether they answer or not."""
        latest = {one.name: one for one in self.workers}  # one that died may be back by its name
        return [name for name, one in latest.items() if not one.draining]

    def add(self, name: str | None = None) -> None:
        """One more, ready now."""
        self.paid.add(1, self._env.now)
        self._put(name)

    def start(self, start_s: float, name: str | None = None) -> Process:
        """One more, ready after `start_s`."""
        self.starting += 1
        self.paid.add(1, self._env.now)
        yield self._env.timeout(start_s)
        self.starting -= 1
        self._put(name)

    def drain(self, number: int) -> None:
        """The least loaded get nothing new, and go once they are empty; one at least stays."""
        ready = sorted(self.ready(), key=lambda one: (one.in_flight, one.name))
        for worker in ready[: max(0, min(number, len(ready) - 1))]:
            worker.draining = True
            self.retire(worker)
        self._tell()

    def retire(self, worker: DecodeWorker) -> None:
        """A draining worker without requests is gone."""
        if worker.draining and worker.alive and not worker.in_flight:
            worker.alive = False
            self.paid.add(-1, self._env.now)

    def lose(self, number: int) -> list[str]:
        """The first ready ones die; gives their names."""
        lost = sorted(self.ready(), key=lambda one: one.name)[:number]
        for worker in lost:
            worker.die()
            self.paid.add(-1, self._env.now)
        self._tell()
        return [worker.name for worker in lost]

    def _put(self, name: str | None) -> None:
        name = name or f"decode-{next(self._numbers):03d}"
        self.workers.append(DecodeWorker(self._env, name, self._step_s, self.room))
        self._tell()

    def _tell(self) -> None:
        size = self._env.now, len(self.ready())
        if self.sizes and self.sizes[-1][0] == size[0]:
            self.sizes.pop()
        if not self.sizes or self.sizes[-1][1] != size[1]:
            self.sizes.append(size)
        self.changed()
