"""The pool: every worker, what it is doing, and whether it may be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from qsun.launch_arguments import DECODE_NAME, DECODE_STREAMS
from qsun.policy import Load

Role = Literal["prefill", "decode"]


class State(Enum):
    """Whether a worker may be asked."""

    JOINING = "joining"
    """Not yet: no hand-off has gone through it since it was started, or was lost."""
    READY = "ready"
    """A hand-off went through it."""
    DOWN = "down"
    """It does not answer, or answered wrongly. It joins again once it does."""
    DRAINING = "draining"
    """It ends what it has begun and gets nothing new."""


@dataclass(frozen=True)
class Address:
    """Where a worker is, and whose prompts it reads. A decode worker's `tasks` are all."""

    name: str
    role: Role
    tasks: frozenset[str]
    url: str


@dataclass
class Worker:
    """A worker as the router knows it. Blocks are KV blocks; 0 as long as it was not asked.

    `was_ready` says that it has been at least once.
    """

    address: Address
    state: State = State.JOINING
    problem: str = "starting"
    was_ready: bool = False
    in_flight: int = 0
    streams: int = DECODE_STREAMS
    blocks: int = 0
    block_tokens: int = 0
    reserved_blocks: int = 0
    used: float = 0.0
    failures: int = 0
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name among all workers."""
        return self.address.name

    @property
    def ready(self) -> bool:
        """Whether it may be asked."""
        return self.state is State.READY

    def model(self, task: str) -> str:
        """What the task's model is called there."""
        return task if self.address.role == "prefill" else DECODE_NAME

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and answer, is sure to find its blocks."""
        free = self.blocks - self.reserved_blocks
        return self.in_flight < self.streams and self.blocks_for(tokens) <= free

    def load(self) -> Load:
        """What it has to do, for a policy."""
        return Load(self.name, self.in_flight, self.streams, self.reserved_blocks, self.blocks)


class Pool:
    """All workers by name. `changed` is called when one may be asked, or may no longer.

    `retired` are the names of workers that an administrator has taken out.
    """

    def __init__(self, addresses: Iterable[Address] = ()) -> None:
        self._workers: dict[str, Worker] = {}
        self.changed: list[Callable[[Worker], None]] = []
        self.retired: set[str] = set()
        self._closed = False
        for address in addresses:
            self.add(address)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def get(self, name: str) -> Worker | None:
        """The worker of that name."""
        return self._workers.get(name)

    def add(self, address: Address) -> Worker:
        """A new worker, which may not be asked yet."""
        self.retired.discard(address.name)
        worker = self._workers[address.name] = Worker(address)
        self._tell(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        """Forget a worker."""
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]
        self._tell(worker)

    def close(self) -> None:
        """Note no state any more: workers are about to be ended, which is no loss."""
        self._closed = True

    def mark(self, worker: Worker, state: State, problem: str = "") -> None:
        """Note a worker's state. One that drains stays so until it is removed."""
        if worker.state is State.DRAINING or self._closed:
            return
        changed = worker.state is not state
        worker.state, worker.problem = state, problem
        if state is State.READY:
            worker.was_ready, worker.failures = True, 0
        if changed:
            self._tell(worker)

    def prefill(self, task: str) -> list[Worker]:
        """The prefill workers that may be asked to read the task's prompts."""
        return [one for one in self._of("prefill") if one.ready and task in one.address.tasks]

    def decode(self) -> list[Worker]:
        """The decode workers that may be asked."""
        return [one for one in self._of("decode") if one.ready]

    def decode_names(self) -> list[str]:
        """All decode workers that are not on their way out, whether they answer or not."""
        return [one.name for one in self._of("decode") if one.state is not State.DRAINING]

    def _of(self, role: Role) -> list[Worker]:
        return [one for one in self._workers.values() if one.address.role == role]

    def _tell(self, worker: Worker) -> None:
        for listener in self.changed:
            listener(worker)
