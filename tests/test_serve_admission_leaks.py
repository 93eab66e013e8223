"""Room that is given is never lost: whoever goes away, gives up, moves or fails."""

from __future__ import annotations

import asyncio
import random

import pytest

from qsun.policy import Policy
from qsun.serve.admission import Slot
from qsun.serve.pool import State
from qsun.serve.refusals import Refusal
from tests.gate import BLOCKS, NOBODY, TASKS, Gate, refused, settled, tokens


def test_who_goes_away_while_waiting_leaves_nothing() -> None:
    async def run() -> None:
        gate = Gate()
        slot = await gate.gets(BLOCKS)
        waiting = await gate.asks(2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert gate.admission.waiting == 0
        gate.admission.leave(slot)
        assert gate.reserved == {"w0": (0, 0)}

    asyncio.run(run())


@pytest.mark.parametrize("first", ["room", "end"])
def test_who_goes_away_as_room_is_given_leaves_nothing(first: str) -> None:
    async def run() -> None:
        gate = Gate()
        slot = await gate.gets(BLOCKS)
        waiting, next_one = await gate.asks(2), await gate.asks(BLOCKS)
        # Both before the one who waits could do anything.
        if first == "room":
            gate.admission.leave(slot)
            waiting.cancel()
        else:
            waiting.cancel()
            gate.admission.leave(slot)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.admission.leave(await next_one)
        assert gate.admission.waiting == 0
        assert gate.reserved == {"w0": (0, 0)}

    asyncio.run(run())


def test_a_wait_that_ends_as_room_is_given_leaves_nothing() -> None:
    async def run() -> None:
        gate = Gate(queue_s=0.0)
        slot = await gate.gets(BLOCKS)
        waiting = asyncio.create_task(gate.admission.enter("math", 1))
        # Runs after the wait has begun, and before its end, which is due at once, is noticed.
        asyncio.get_running_loop().call_soon(gate.admission.leave, slot)
        assert (await refused(waiting)).status == 429
        assert gate.reserved == {"w0": (0, 0)}

    asyncio.run(run())


@pytest.mark.parametrize("way", ["gone", "too late"])
def test_who_waits_behind_one_who_gives_up_goes_on(way: str) -> None:
    async def run() -> None:
        gate = Gate(queue_s=0.1)
        await gate.gets(6)
        large = await gate.asks(8)
        await asyncio.sleep(0.05)
        small = await gate.asks(1)
        if way == "gone":
            large.cancel()
            await asyncio.wait([large])
        else:
            await refused(large)
        await settled()
        assert small.done()

    asyncio.run(run())


@pytest.mark.parametrize("policy", list(Policy))
def test_workers_may_all_leave_while_somebody_waits(policy: Policy) -> None:
    async def run() -> None:
        gate = Gate(policy=policy)
        slot = await gate.gets(BLOCKS)
        waiting = await gate.asks(1)
        worker = gate.worker()
        gate.pool.mark(worker, State.DRAINING)
        gate.admission.leave(slot)
        gate.pool.remove(worker)
        await settled()
        assert not waiting.done()
        gate.joins("w1")
        assert (await waiting).worker.name == "w1"

    asyncio.run(run())


def test_room_that_a_move_frees_is_given_on() -> None:
    async def run() -> None:
        gate = Gate(workers=2, queue_s=0.5)
        avoided = await gate.gets(5)
        other = await gate.gets(BLOCKS)
        waiting = await gate.asks(BLOCKS, task="tools")
        late = gate.joins("w2", blocks=5)
        assert not waiting.done()
        gate.admission.move(avoided, frozenset({"w0"}))
        assert avoided.worker is late
        await settled()
        assert other.worker.name == "w1"
        assert (await waiting).worker.name == "w0"

    asyncio.run(run())


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_no_block_is_lost_or_given_twice(policy: Policy, seed: int) -> None:
    """A few hundred requests that come, wait, move, go and are cancelled, while workers fail."""

    statuses: set[int] = set()

    async def request(gate: Gate, rng: random.Random, held: dict[int, Slot]) -> None:
        blocks, task = rng.randint(1, BLOCKS), rng.choice(TASKS)
        try:
            slot = await gate.admission.enter(task, tokens(blocks))
        except Refusal as refusal:
            statuses.add(refusal.status)
            return
        held[id(slot)] = slot
        try:
            await asyncio.sleep(rng.choice([0, 0.001]))
            if rng.random() < 0.5:
                gate.admission.move(slot, rng.choice([NOBODY, frozenset({"w1"})]))
            await asyncio.sleep(rng.choice([0, 0.001]))
        finally:
            del held[id(slot)]
            gate.admission.leave(slot)

    def check(gate: Gate, held: dict[int, Slot]) -> None:
        for worker in gate.pool.decode():
            here = [slot for slot in held.values() if slot.worker is worker]
            assert worker.in_flight >= len(here)
            assert worker.in_flight <= worker.streams
            assert sum(slot.blocks for slot in here) <= worker.reserved_blocks <= worker.blocks

    async def run() -> None:
        rng, held = random.Random(seed), dict[int, Slot]()
        gate = Gate(workers=3, policy=policy, queue_length=20, queue_s=0.005)
        requests = []
        for _ in range(300):
            requests.append(asyncio.create_task(request(gate, rng, held)))
            if rng.random() < 0.3:
                rng.choice(requests).cancel()
            if rng.random() < 0.1:
                worker = gate.worker(rng.choice(["w0", "w1", "w2"]))
                gate.pool.mark(worker, rng.choice([State.DOWN, State.READY]))
            await asyncio.sleep(rng.choice([0, 0, 0.0005]))
            check(gate, held)
        await asyncio.wait(requests)
        failed = [one.exception() for one in requests if not one.cancelled()]
        assert [error for error in failed if error is not None] == []
        assert statuses
        assert statuses <= {429, 503}
        assert gate.admission.waiting == 0
        assert set(gate.reserved.values()) == {(0, 0)}

    asyncio.run(run())
