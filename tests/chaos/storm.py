"""A storm of faults over fake workers: many requests, and what became of each."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fake_workers import FakeWorker, answer_token
from tests.routing import TASKS, Routed, brief, routed

PREFILL_FAULTS = (
    *("500", "hang", "reset", "no parameters", "other task", "other bundle", "short", "no json"),
)
DECODE_FAULTS = ("500", "hang", "reset", "empty", "error event", "cut", "stall", "no ending")
FAULTY_SHARE = 0.04  # of what workers are asked, besides those that are killed or frozen
NEW_TOKENS = 6
CLIENTS = 32
LIMITS = brief(
    queue_s=5.0, prefill_s=0.4, first_token_s=0.4, stall_s=0.4, attempts=4, queue_length=1000
)
# Every part of every attempt at its deadline, and a second for the machine.
DEADLINE_S = LIMITS.attempts * (LIMITS.queue_s + LIMITS.prefill_s + 2 * LIMITS.stall_s) + 1


@dataclass
class Figures:
    """What became of the requests."""

    requests: int = 0
    right: int = 0
    wrong: int = 0
    empty: int = 0
    hung: int = 0
    told: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    left_in_flight: int = 0
    left_blocks: int = 0

    def summary(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return vars(self) | {"told": dict(self.told), "faults": dict(self.faults)}


async def storm(tokenizer: Path, requests: int, seed: int) -> Figures:
    """Ask so many requests while workers fail, die, freeze and come back as others."""
    figures, dice = Figures(), random.Random(seed)
    async with routed(tokenizer, LIMITS, prefill=3, decode=3, blocks=200) as here:
        for worker in here.workers.values():
            _make_faulty(worker, figures, dice)
        left = iter(range(requests))
        havoc = asyncio.create_task(_havoc(here, figures, random.Random(seed + 1)))
        clients = [
            _client(here, left, figures, random.Random(seed + 2 + n)) for n in range(CLIENTS)
        ]
        try:
            await asyncio.gather(*clients)
        finally:
            havoc.cancel()
            await asyncio.gather(havoc, return_exceptions=True)
        await asyncio.sleep(LIMITS.stall_s)
        figures.left_in_flight = sum(worker.in_flight for worker in here.pool)
        figures.left_blocks = sum(worker.reserved_blocks for worker in here.pool)
    return figures


def _make_faulty(worker: FakeWorker, figures: Figures, dice: random.Random) -> None:
    worker.keep_seen = False
    faults = PREFILL_FAULTS if worker.role == "prefill" else DECODE_FAULTS

    def fault() -> str | None:
        if dice.random() >= FAULTY_SHARE:
            return None
        chosen = dice.choice(faults)
        figures.faults[f"{worker.role}: {chosen}"] += 1
        return chosen

    worker.fault = fault


async def _client(here: Routed, left: Any, figures: Figures, dice: random.Random) -> None:
    for _ in left:
        task, stream = dice.choice(TASKS), dice.random() < 0.5
        prompt = [dice.randrange(400) for _ in range(dice.randrange(2, 40))]
        body = {"model": task, "prompt": prompt, "max_tokens": NEW_TOKENS, "stream": stream}
        expected = "".join(answer_token(task, prompt, place) for place in range(NEW_TOKENS))
        figures.requests += 1
        begun = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await _ask(here, body, expected, figures)
        except TimeoutError:
            figures.hung += 1
        figures.longest_s = max(figures.longest_s, time.monotonic() - begun)


async def _ask(here: Routed, body: dict[str, Any], expected: str, figures: Figures) -> None:
    async with here.session.post(f"{here.url}/v1/completions", json=body) as response:
        if response.status != 200:
            error = (await response.json())["error"]
            figures.told[f"{response.status} {error['code']}"] += 1
            return
        if not body["stream"]:
            _judge((await response.json())["choices"][0]["text"], expected, True, figures)
            return
        text, ended = "", False
        async for line in response.content:
            if line == b"data: [DONE]\n":
                ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    figures.told[f"stream: {event['error']['code']}"] += 1
                    # What came before the error must be the beginning of the right answer.
                    figures.wrong += not expected.startswith(text)
                    return
                text += event["choices"][0]["text"]
        _judge(text, expected, ended, figures)


def _judge(text: str, expected: str, ended: bool, figures: Figures) -> None:
    if not text or not ended:
        figures.empty += 1
    elif text == expected:
        figures.right += 1
    else:
        figures.wrong += 1


async def _havoc(here: Routed, figures: Figures, dice: random.Random) -> None:
    """Kill, freeze and replace workers, one after another, for as long as it runs."""
    while True:
        await asyncio.sleep(0.2)
        name = dice.choice(sorted(here.workers))
        worker, what = here.workers[name], dice.choice(("kill", "freeze", "replace"))
        figures.faults[f"{worker.role}: {what}"] += 1
        if what == "freeze":
            worker.frozen = True
            await asyncio.sleep(0.6)
            worker.frozen = False
            continue
        await here.kill(name)
        if what == "replace":
            # Another bundle's worker at the same address, then the right one again.
            await here.revive(name, FakeWorker(worker.role, "f" * 64, keep_seen=False))
            await asyncio.sleep(0.4)
            await here.kill(name)
        await asyncio.sleep(0.2)
        await here.revive(name, worker)
