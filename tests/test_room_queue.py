"""The queue for room on decode workers: order, who keeps whom waiting, and who no longer waits."""

from __future__ import annotations

from dataclasses import dataclass

from qsun.policy import Load, Policy
from qsun.room_queue import RoomQueue, Slot


@dataclass
class One:
    """A decode worker of so many blocks; a token takes one."""

    name: str
    blocks: int
    in_flight: int = 0
    reserved_blocks: int = 0

    def blocks_for(self, tokens: int) -> int:
        return tokens

    def has_room(self, tokens: int) -> bool:
        return self.reserved_blocks + tokens <= self.blocks

    def load(self) -> Load:
        return Load(self.name, self.in_flight, 256, self.reserved_blocks, self.blocks)


class Room:
    """A queue over workers of ten blocks, and what it gave, in turn."""

    def __init__(self, workers: int, policy: Policy = Policy.SHARED) -> None:
        self.workers = [One(f"decode-{number}", 10) for number in range(workers)]
        self.readable = {"math", "code"}
        self.given: dict[str, Slot[One]] = {}
        self.gone: set[str] = set()
        self.queue: RoomQueue[One] = RoomQueue(
            policy,
            ["math", "code"],
            lambda: [one.name for one in self.workers],
            lambda task: self.workers if task in self.readable else None,
        )

    def ask(self, name: str, tokens: int, task: str = "math") -> None:
        def give(slot: Slot[One]) -> bool:
            if name not in self.gone:
                self.given[name] = slot
            return name not in self.gone

        self.queue.enter(self.queue.waiting(task, tokens, (), give))


def test_nobody_overtakes_who_could_use_the_same_room() -> None:
    room = Room(1)
    room.ask("first", 8)
    room.ask("large", 5)
    room.ask("small", 1)
    assert list(room.given) == ["first"]
    room.queue.leave(room.given["first"])
    assert list(room.given) == ["first", "large", "small"]
    assert room.workers[0].reserved_blocks == 6


def test_other_tasks_workers_are_not_kept_waiting() -> None:
    room = Room(2, Policy.ISOLATED)  # code's is the first, math's the second
    room.ask("first", 10)
    room.ask("waits", 1)
    room.ask("other", 1, "code")
    assert {name: slot.worker.name for name, slot in room.given.items()} == {
        "first": "decode-1",
        "other": "decode-0",
    }


def test_a_prompt_that_nobody_can_read_keeps_nobody_waiting() -> None:
    room = Room(1)
    room.readable = {"math"}
    room.ask("unread", 1, "code")
    room.ask("read", 1)
    assert list(room.given) == ["read"]
    room.readable.add("code")
    room.queue.serve()
    assert list(room.given) == ["read", "unread"]


def test_room_for_one_who_waits_no_longer_goes_to_the_next() -> None:
    room = Room(1)
    room.ask("first", 10)
    room.ask("gone", 10)
    room.ask("next", 10)
    room.gone.add("gone")
    room.queue.leave(room.given["first"])
    assert list(room.given) == ["first", "next"]
    assert room.workers[0].reserved_blocks == 10
    assert room.workers[0].in_flight == 1
    assert len(room.queue) == 0
