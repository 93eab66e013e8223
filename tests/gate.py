"""Admission over decode workers that are made up, and those who ask for room there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from qsun.policy import Policy
from qsun.serve.admission import Admission, Slot
from qsun.serve.pool import Address, Pool, State, Worker
from qsun.serve.refusals import Refusal

BLOCK_TOKENS, BLOCKS, STREAMS = 16, 10, 4
TASKS = ("math", "tools")
NOBODY: frozenset[str] = frozenset()


def tokens(blocks: int) -> int:
    """Tokens that just fill so many blocks."""
    return blocks * BLOCK_TOKENS


@dataclass
class Gate:
    """An admission over `workers` decode workers and one that reads all prompts."""

    workers: int = 1
    policy: Policy = Policy.SHARED
    queue_length: int = 8
    queue_s: float = 5.0
    pool: Pool = field(init=False)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self.pool = Pool()
        self.admission = Admission(self.pool, self.policy, TASKS, self.queue_length, self.queue_s)
        reader = self.pool.add(Address("reader", "prefill", frozenset(TASKS), "http://127.0.0.1:1"))
        self.pool.mark(reader, State.READY)
        for number in range(self.workers):
            self.joins(f"w{number}")

    def joins(self, name: str, blocks: int = BLOCKS) -> Worker:
        worker = self.pool.add(Address(name, "decode", frozenset(TASKS), "http://127.0.0.1:1"))
        worker.streams, worker.blocks, worker.block_tokens = STREAMS, blocks, BLOCK_TOKENS
        self.pool.mark(worker, State.READY)
        return worker

    def worker(self, name: str = "w0") -> Worker:
        found = self.pool.get(name)
        assert found is not None
        return found

    async def asks(self, blocks: int, task: str = "math", **how: Any) -> asyncio.Task[Slot]:
        """Somebody asks for room, and has come as far as is possible at once."""
        asking = asyncio.create_task(self.admission.enter(task, tokens(blocks), **how))
        await settled()
        return asking

    async def gets(self, blocks: int, task: str = "math", **how: Any) -> Slot:
        """Room that must be there at once."""
        asking = await self.asks(blocks, task, **how)
        assert asking.done()
        return asking.result()

    @property
    def reserved(self) -> dict[str, tuple[int, int]]:
        """Requests and blocks on each worker."""
        return {
            one.name: (one.in_flight, one.reserved_blocks)
            for one in self.pool
            if one.address.role == "decode"
        }


async def settled() -> None:
    """Let everything go on that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def refused(asking: Coroutine[Any, Any, Slot] | asyncio.Task[Slot]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await asking
    return caught.value
