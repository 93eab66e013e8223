"""Prefill workers: each reads one prompt at a time, in the order in which they come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import simpy

from qsun.simulate.curves import Line
from qsun.simulate.decode_worker import Process
from qsun.simulate.window import Window


class PrefillWorker:
    """One that reads the prompts of `tasks`. `busy_s` counts within the window."""

    def __init__(self, env: simpy.Environment, name: str, tasks: frozenset[str]) -> None:
        self.name, self.tasks = name, tasks
        self.in_flight = 0
        self.busy_s = 0.0
        self.desk = simpy.Resource(env, capacity=1)


class PrefillPool:
    """All prefill workers; a task's least loaded one reads, as in the router."""

    def __init__(
        self, env: simpy.Environment, workers: Sequence[PrefillWorker], line: Line, window: Window
    ) -> None:
        self.workers = workers
        self._env, self._line, self._window = env, line, window
        self._turns = count()

    def read(self, task: str, prompt_tokens: int) -> Process:
        """Wait for a worker and for the prompt to be read."""
        worker = self._reader(task)
        worker.in_flight += 1
        with worker.desk.request() as turn:
            yield turn
            began_s = self._env.now
            yield self._env.timeout(self._line(prompt_tokens))
            worker.busy_s += self._window.overlap_s(began_s, self._env.now)
        worker.in_flight -= 1

    def _reader(self, task: str) -> PrefillWorker:
        workers = [one for one in self.workers if task in one.tasks]
        turn = next(self._turns) % len(workers)
        return min(workers[turn:] + workers[:turn], key=lambda one: one.in_flight)
