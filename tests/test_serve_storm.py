"""Faults of every kind over fake workers: `python -m tests.chaos` has many more of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.chaos.storm import DECODE_FAULTS, PREFILL_FAULTS, storm

REQUESTS, SEED = 1500, 7


def test_no_fault_makes_an_answer_wrong_empty_or_late(tokenizer_folder: Path) -> None:
    found = asyncio.run(storm(tokenizer_folder, REQUESTS, SEED))
    assert found.requests == REQUESTS
    assert (found.wrong, found.empty, found.hung) == (0, 0, 0)
    assert found.right + sum(found.told.values()) == REQUESTS
    assert found.right >= 0.9 * REQUESTS
    assert (found.left_in_flight, found.left_blocks) == (0, 0)
    kinds = {f"prefill: {one}" for one in PREFILL_FAULTS}
    kinds |= {f"decode: {one}" for one in DECODE_FAULTS}
    assert found.faults.keys() >= kinds
    assert {name.partition(": ")[2] for name in found.faults} & {"kill", "freeze", "replace"}
