"""Admission: room is set aside before it is used, and given in order of arrival."""

from __future__ import annotations

import asyncio

import pytest

from qsun.policy import Policy
from qsun.serve.pool import Address, State
from tests.gate import BLOCKS, NOBODY, STREAMS, Gate, refused, settled, tokens


def test_room_is_counted_in_whole_blocks() -> None:
    async def run() -> None:
        gate = Gate()
        slot = await gate.admission.enter("math", 17)
        assert (slot.worker.name, slot.blocks) == ("w0", 2)
        assert gate.reserved == {"w0": (1, 2)}
        other = await gate.admission.enter("tools", 16)
        assert gate.reserved == {"w0": (2, 3)}
        gate.admission.leave(slot)
        gate.admission.leave(other)
        assert gate.reserved == {"w0": (0, 0)}

    asyncio.run(run())


def test_who_finds_no_blocks_waits_for_them() -> None:
    async def run() -> None:
        gate = Gate()
        first = await gate.gets(7)
        waiting = await gate.asks(4)
        assert not waiting.done()
        assert gate.admission.waiting == 1
        assert gate.reserved == {"w0": (1, 7)}
        gate.admission.leave(first)
        assert (await waiting).blocks == 4
        assert gate.admission.waiting == 0
        assert gate.reserved == {"w0": (1, 4)}

    asyncio.run(run())


def test_a_worker_takes_as_many_requests_as_it_answers_at_once() -> None:
    async def run() -> None:
        gate = Gate()
        slots = [await gate.gets(1) for _ in range(STREAMS)]
        waiting = await gate.asks(1)
        assert not waiting.done()
        gate.admission.leave(slots[0])
        await waiting

    asyncio.run(run())


def test_nobody_goes_ahead_of_an_earlier_one() -> None:
    async def run() -> None:
        gate = Gate()
        first = await gate.gets(6)
        large, small = await gate.asks(8), await gate.asks(1)
        # There is room for the small one; but then the large one might wait for ever.
        assert not small.done()
        gate.admission.leave(first)
        await settled()
        assert large.done()
        assert small.done()
        assert gate.reserved == {"w0": (2, 9)}

    asyncio.run(run())


def test_an_isolated_task_does_not_wait_for_another() -> None:
    async def run() -> None:
        gate = Gate(workers=2, policy=Policy.ISOLATED)
        held = await gate.gets(BLOCKS)
        waiting = await gate.asks(2)
        passing = await gate.gets(2, "tools")
        assert (held.worker.name, passing.worker.name) == ("w0", "w1")
        behind = await gate.asks(1)
        gate.admission.leave(passing)
        assert not waiting.done()
        assert not behind.done()
        gate.admission.leave(held)
        assert (await waiting).worker.name == (await behind).worker.name == "w0"

    asyncio.run(run())


def test_a_full_queue_refuses_and_says_when_to_ask_again() -> None:
    async def run() -> None:
        gate = Gate(queue_length=2, queue_s=5.0)
        first = await gate.gets(BLOCKS)
        waiting = [await gate.asks(1), await gate.asks(1)]
        refusal = await refused(gate.admission.enter("math", 1))
        assert (refusal.status, refusal.code) == (429, "overloaded")
        assert "2 requests are waiting already" in str(refusal)
        assert refusal.headers == {"Retry-After": "2"}
        assert refusal.body()["error"]["type"] == "rate_limit_error"
        gate.admission.leave(first)
        await asyncio.gather(*waiting)
        assert gate.reserved == {"w0": (2, 2)}

    asyncio.run(run())


def test_without_a_queue_only_room_that_is_there_is_given() -> None:
    async def run() -> None:
        gate = Gate(queue_length=0)
        slot = await gate.gets(BLOCKS)
        assert (await refused(gate.admission.enter("math", 1))).status == 429
        gate.admission.leave(slot)
        await gate.gets(1)

    asyncio.run(run())


def test_a_wait_has_an_end() -> None:
    async def run() -> None:
        gate = Gate(queue_s=0.05)
        slot = await gate.gets(BLOCKS)
        refusal = await refused(gate.admission.enter("math", 1))
        assert (refusal.status, refusal.code) == (429, "overloaded")
        assert "no decode worker had room within 0.05 s" in str(refusal)
        assert refusal.headers == {"Retry-After": "1"}
        assert gate.admission.waiting == 0
        gate.admission.leave(slot)
        assert gate.reserved == {"w0": (0, 0)}

    asyncio.run(run())


def test_what_no_worker_could_ever_hold_is_refused_at_once() -> None:
    async def run() -> None:
        gate = Gate(workers=0)
        gate.joins("small", blocks=4)
        gate.joins("large", blocks=6)
        refusal = await refused(gate.admission.enter("math", tokens(6) + 1))
        assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
        assert f"a decode worker's KV cache holds {tokens(6)}" in str(refusal)
        assert (await gate.gets(6)).worker.name == "large"

    asyncio.run(run())


def test_a_prompt_that_nobody_can_read_waits_and_holds_nobody_up() -> None:
    async def run() -> None:
        gate = Gate(queue_s=0.2)
        reader = gate.worker("reader")
        gate.pool.mark(reader, State.DOWN)
        gate.pool.mark(
            gate.pool.add(Address("other", "prefill", frozenset({"tools"}), "http://127.0.0.1:1")),
            State.READY,
        )
        waiting, too_late = await gate.asks(2), await gate.asks(2)
        assert (await gate.gets(2, "tools")).worker.name == "w0"
        assert not waiting.done()
        waiting.cancel()
        refusal = await refused(too_late)
        assert (refusal.status, refusal.code) == (503, "unavailable")
        assert "no prefill worker for math was ready within 0.2 s" in str(refusal)
        waiting = await gate.asks(2)
        gate.pool.mark(reader, State.READY)
        assert (await waiting).worker.name == "w0"

    asyncio.run(run())


@pytest.mark.parametrize("state", [State.DOWN, State.DRAINING, State.JOINING])
def test_only_ready_workers_get_something(state: State) -> None:
    async def run() -> None:
        gate = Gate(workers=2)
        gate.pool.mark(gate.worker("w0"), state)
        slots = [await gate.gets(1) for _ in range(STREAMS)]
        assert {slot.worker.name for slot in slots} == {"w1"}
        waiting = await gate.asks(1)
        gate.pool.mark(gate.worker("w1"), State.DOWN)
        gate.admission.leave(slots[0])
        await settled()
        assert not waiting.done()
        gate.pool.mark(gate.worker("w1"), State.READY)
        assert (await waiting).worker.name == "w1"

    asyncio.run(run())


def test_a_worker_that_failed_a_request_comes_last() -> None:
    async def run() -> None:
        gate = Gate(workers=2)
        held = await gate.gets(1, avoid=frozenset({"w0"}))
        assert held.worker.name == "w1"
        assert (await gate.gets(1, avoid=frozenset({"w0", "w1"}))).worker.name == "w0"
        await gate.gets(BLOCKS - 1, avoid=frozenset({"w0"}))
        # The other one is full: better there than not at all.
        assert (await gate.gets(1, avoid=frozenset({"w1"}))).worker.name == "w0"

    asyncio.run(run())


def test_after_the_prompt_was_read_the_worker_is_chosen_again() -> None:
    async def run() -> None:
        gate = Gate(workers=2)
        slot = await gate.gets(3)
        assert slot.worker.name == "w0"
        gate.worker("w0").reserved_blocks += 5
        gate.admission.move(slot, NOBODY)
        assert slot.worker.name == "w1"
        assert gate.reserved == {"w0": (0, 5), "w1": (1, 3)}
        gate.worker("w0").reserved_blocks -= 5
        gate.admission.leave(slot)
        assert gate.reserved == {"w0": (0, 0), "w1": (0, 0)}

    asyncio.run(run())


def test_who_finds_no_better_worker_keeps_its_own() -> None:
    async def run() -> None:
        gate = Gate(workers=2)
        slot, other = await gate.gets(BLOCKS), await gate.gets(BLOCKS)
        gate.admission.move(slot, frozenset({slot.worker.name}))
        assert (slot.worker.name, other.worker.name) == ("w0", "w1")
        assert gate.reserved == {"w0": (1, BLOCKS), "w1": (1, BLOCKS)}

    asyncio.run(run())


def test_round_robin_goes_round_although_workers_are_chosen_twice() -> None:
    async def run() -> None:
        gate = Gate(workers=2, policy=Policy.ROUND_ROBIN)
        answered_by = []
        for _ in range(4):
            slot = await gate.gets(1)
            gate.admission.move(slot, NOBODY)
            answered_by.append(slot.worker.name)
            gate.admission.leave(slot)
        assert sorted(answered_by) == ["w0", "w0", "w1", "w1"]

    asyncio.run(run())
