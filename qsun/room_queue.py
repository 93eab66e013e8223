"""Who gets room on which decode worker, and when: the queue of the router, and of its simulation.

Room is given out by a policy in the order of arrival. Nothing here waits or keeps time: a request
that gets room is told by a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Generic, Protocol, TypeVar

from qsun.policy import Load, Policy, choose, eligible


class Decoder(Protocol):
    """A decode worker. `in_flight` requests and `reserved_blocks` KV blocks are the queue's."""

    in_flight: int
    reserved_blocks: int

    @property
    def name(self) -> str:
        """Its name among all workers."""

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold so many tokens."""

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and answer, is sure to find its blocks."""

    def load(self) -> Load:
        """What it has to do, for a policy."""


Worker = TypeVar("Worker", bound=Decoder)


@dataclass
class Slot(Generic[Worker]):
    """Room for one request: its blocks on a decode worker. `turn` counts requests."""

    task: str
    tokens: int
    turn: int
    worker: Worker
    blocks: int = 0


@dataclass(eq=False)
class Waiting(Generic[Worker]):
    """A request in the queue. `give` is told its room, and says whether anybody still wants it.

    Workers to `avoid` have failed it: they are asked again only where there is no other.
    """

    task: str
    tokens: int
    turn: int
    avoid: Collection[str]
    give: Callable[[Slot[Worker]], bool]


class RoomQueue(Generic[Worker]):
    """Requests that wait for room, nobody ahead of an earlier one who could use the same.

    `names` gives all decode workers that are not on their way out, by which isolated tasks are
    dealt to them; `ready` those that a task's request may be given to now, None where nobody could
    read its prompt. Whoever changes either calls `serve`.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: Collection[str],
        names: Callable[[], Sequence[str]],
        ready: Callable[[str], Sequence[Worker] | None],
    ) -> None:
        self._policy, self._tasks = policy, sorted(tasks)
        self._names, self._ready = names, ready
        self._queues: dict[str, deque[Waiting[Worker]]] = {task: deque() for task in self._tasks}
        self._turns = count()
        self._known: tuple[tuple[str, ...], dict[str, frozenset[str]]] = ((), {})

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def waiting(
        self,
        task: str,
        tokens: int,
        avoid: Collection[str],
        give: Callable[[Slot[Worker]], bool],
    ) -> Waiting[Worker]:
        """A request with the next turn, not in the queue yet."""
        return Waiting(task, tokens, next(self._turns), avoid, give)

    def enter(self, one: Waiting[Worker]) -> None:
        """Wait for room; where there is some, it is given before this returns."""
        self._queues[one.task].append(one)
        self.serve()

    def withdraw(self, one: Waiting[Worker]) -> bool:
        """Wait no longer; False where it does not any more."""
        if one not in self._queues[one.task]:
            return False
        self._queues[one.task].remove(one)
        self.serve()
        return True

    def move(self, slot: Slot[Worker], avoid: Collection[str]) -> None:
        """Choose again, as things are now that the prompt has been read."""
        self._release(slot)
        worker = self._room(slot.task, slot.tokens, slot.turn, avoid, frozenset())
        self._reserve(slot, worker or slot.worker)
        self.serve()

    def leave(self, slot: Slot[Worker]) -> None:
        """Give a request's room back."""
        self._release(slot)
        self.serve()

    def finds_room(self, one: Waiting[Worker]) -> bool:
        """Whether it would get room at once."""
        return not len(self) and self._room_for(one, frozenset()) is not None

    def allowed(self, task: str) -> frozenset[str]:
        """The decode workers that may take the task, whatever they have to do."""
        names = tuple(self._names())
        if self._known[0] != names:
            self._known = (names, {})
        found = self._known[1]
        if task not in found:
            found[task] = eligible(self._policy, names, self._tasks, task)
        return found[task]

    def serve(self) -> None:
        """Give room to those who wait.

        Of a task, the first in the queue stands for all: where it finds no room, its workers are
        spoken for, and the others of the task could use no other.
        """
        heads = {task: queue[0].turn for task, queue in self._queues.items() if queue}
        spoken_for: set[str] = set()
        while heads and not (spoken_for and spoken_for.issuperset(self._names())):
            task = min(heads, key=heads.__getitem__)
            one = self._queues[task][0]
            worker = self._room_for(one, spoken_for)
            if worker is None:
                # Without anybody to read its prompt, it keeps nobody else from a decode worker.
                spoken_for |= self.allowed(task) if self._ready(task) is not None else set()
                del heads[task]
                continue
            self._queues[task].popleft()
            slot = Slot(one.task, one.tokens, one.turn, worker)
            self._reserve(slot, worker)
            if not one.give(slot):
                self._release(slot)
            if self._queues[task]:
                heads[task] = self._queues[task][0].turn
            else:
                del heads[task]

    def _room_for(self, one: Waiting[Worker], spoken_for: Collection[str]) -> Worker | None:
        return self._room(one.task, one.tokens, one.turn, one.avoid, spoken_for)

    def _room(
        self,
        task: str,
        tokens: int,
        turn: int,
        avoid: Collection[str],
        spoken_for: Collection[str],
    ) -> Worker | None:
        allowed = self.allowed(task)
        fitting = [
            worker
            for worker in self._ready(task) or ()
            if worker.name in allowed and worker.name not in spoken_for and worker.has_room(tokens)
        ]
        fitting = [worker for worker in fitting if worker.name not in avoid] or fitting
        if not fitting:
            return None
        name = choose(self._policy, [worker.load() for worker in fitting], turn)
        return next(worker for worker in fitting if worker.name == name)

    def _reserve(self, slot: Slot[Worker], worker: Worker) -> None:
        slot.worker, slot.blocks = worker, worker.blocks_for(slot.tokens)
        worker.in_flight += 1
        worker.reserved_blocks += slot.blocks

    def _release(self, slot: Slot[Worker]) -> None:
        slot.worker.in_flight -= 1
        slot.worker.reserved_blocks -= slot.blocks
