"""A decode worker: continuous batching, in steps whose time the curves say."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import simpy

from qsun.policy import Load
from qsun.simulate.curves import StepTimes
from qsun.simulate.journey import Journey

Process = Generator[simpy.Event, object, None]


@dataclass(frozen=True)
class Room:
    """What a decode worker takes at once: requests, and KV blocks for prompts and answers.

    Without `blocks`, KV is no limit.
    """

    streams: int
    blocks: int | None = None
    block_tokens: int = 16

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold so many tokens; 0 where they are no limit."""
        return 0 if self.blocks is None else -(-tokens // self.block_tokens)

    def holds(self, tokens: int) -> bool:
        """Whether an empty worker has room for so many tokens."""
        return self.blocks is None or self.blocks_for(tokens) <= self.blocks


@dataclass(eq=False, slots=True)
class Stay:
    """A request on a decode worker. `left_step` less `joined_step` tokens came out of it.

    `ended` says whether the answer is whole.
    """

    journey: Journey
    ended: simpy.Event
    joined_step: int | None = None
    left_step: int | None = None


class DecodeWorker:
    """Requests join at the beginning of a step; a step gives each of them one token.

    `in_flight` and `reserved_blocks` are the router's: room is set aside before a prompt is read.
    """

    def __init__(self, env: simpy.Environment, name: str, step_s: StepTimes, room: Room) -> None:
        self.name, self.room = name, room
        self.in_flight = self.reserved_blocks = 0
        self.alive, self.draining = True, False
        self.steps = 0
        self.stays: list[Stay] = []
        self._env, self._step_s = env, step_s
        self._joining: list[Stay] = []
        self._running: list[tuple[int, int, Stay]] = []  # by their last step
        self._first_ones: list[Stay] = []
        self._context_tokens = 0
        self._numbers = count()
        self._wake = env.event()
        self._process = env.process(self._decode())

    @property
    def ready(self) -> bool:
        """Whether it may be given requests."""
        return self.alive and not self.draining

    def load(self) -> Load:
        """What it has to do, for a policy."""
        blocks = self.room.blocks or 1
        return Load(self.name, self.in_flight, self.room.streams, self.reserved_blocks, blocks)

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold so many tokens; 0 where they are no limit."""
        return self.room.blocks_for(tokens)

    def has_room(self, tokens: int) -> bool:
        """Whether it can take one more request of so many tokens, prompt and answer."""
        if self.in_flight >= self.room.streams:
            return False
        blocks = self.room.blocks
        return blocks is None or self.reserved_blocks + self.room.blocks_for(tokens) <= blocks

    def answer(self, journey: Journey) -> simpy.Event:
        """Go on with a request whose cache has arrived; tells whether the answer came whole."""
        stay = Stay(journey, self._env.event())
        if not self.alive:
            return stay.ended.succeed(False)
        self.stays.append(stay)
        self._joining.append(stay)
        if not self._wake.triggered:
            self._wake.succeed()
        return stay.ended

    def die(self) -> None:
        """Lose everything that is under way."""
        self.alive = False
        for stay in [*(stay for _, _, stay in self._running), *self._joining]:
            stay.left_step = None if stay.joined_step is None else self.steps
            stay.ended.succeed(False)
        self._running, self._joining = [], []
        self._process.interrupt()

    def _decode(self) -> Process:
        try:
            while True:
                if not self._joining and not self._running:
                    self._wake = self._env.event()
                    yield self._wake
                self._join()
                batch = len(self._running)
                seconds = self._step_s(batch, self._context_tokens / batch)
                yield self._env.timeout(seconds)
                self._step(batch)
        except simpy.Interrupt:
            return

    def _join(self) -> None:
        for stay in self._joining:
            request = stay.journey.request
            stay.joined_step = self.steps
            last = self.steps + request.output_tokens
            heappush(self._running, (last, next(self._numbers), stay))
            self._context_tokens += request.prompt_tokens
        self._first_ones, self._joining = self._joining, []

    def _step(self, batch: int) -> None:
        self.steps += 1
        self._context_tokens += batch
        for stay in self._first_ones:
            stay.journey.first_s = self._env.now
        while self._running and self._running[0][0] == self.steps:
            _, _, stay = heappop(self._running)
            request = stay.journey.request
            self._context_tokens -= request.prompt_tokens + request.output_tokens
            stay.left_step = self.steps
            stay.ended.succeed(True)
