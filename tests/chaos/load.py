"""Clients that ask without end while things go wrong, and what became of each request."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from qsun.bundle import Bundle
from qsun.config import ServeConfig
from qsun.disaggregation import COMPLETIONS
from tests.chaos.workers import Worker

NEW_TOKENS = 8
LIMITS = ServeConfig(first_token_s=45.0, stall_s=45.0, prefill_s=45.0, queue_s=60.0)
DEADLINE_S = LIMITS.attempts * (LIMITS.queue_s + LIMITS.prefill_s + LIMITS.first_token_s)


@dataclass
class Asked:
    """One request and what came of it."""

    phase: str
    task: str
    place: int
    stream: bool
    outcome: str = "hung"
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Chaos:
    """Everything that the phases share."""

    bundle: Bundle
    workers: dict[str, Worker]
    router: str
    fault_file: Path
    prompts: dict[str, list[list[int]]]
    calm: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    phase: str = "calm"
    going: bool = True

    async def client(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        """Ask again and again until told to stop."""
        while self.going:
            task = dice.choice(sorted(self.prompts))
            place = dice.randrange(len(self.prompts[task]))
            one = Asked(self.phase, task, place, dice.random() < 0.5)
            self.asked.append(one)
            begun = time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE_S):
                    one.outcome, one.tokens = await ask(session, self.router, one, self.prompts)
            one.seconds = time.monotonic() - begun
            if one.outcome != "answered":
                await asyncio.sleep(0.5)  # as a client that was told to come again does

    async def ready(self, name: str | None = None, timeout_s: float = 200) -> None:
        """Wait until the router asks this worker, or every worker."""
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            wanted = [name] if name else list(self.workers)
            while True:
                text = ""
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{self.router}/metrics") as response:
                        text = await response.text()
                if all(is_ready(text, one) for one in wanted):
                    return
                await asyncio.sleep(0.3)


async def ask(
    session: aiohttp.ClientSession, router: str, one: Asked, prompts: dict[str, list[list[int]]]
) -> tuple[str, list[int]]:
    """What became of one request, in a word or two, and its tokens."""
    body = {
        "model": one.task,
        "prompt": prompts[one.task][one.place],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": one.stream,
    }
    tokens: list[int] = []
    async with session.post(router + COMPLETIONS, json=body) as response:
        if response.status != 200:
            return f"{response.status} {(await response.json())['error']['code']}", tokens
        if not one.stream:
            tokens = (await response.json())["choices"][0]["token_ids"]
            return ("answered" if len(tokens) == NEW_TOKENS else "empty"), tokens
        async for line in response.content:
            if line == b"data: [DONE]\n":
                return ("answered" if len(tokens) == NEW_TOKENS else "empty"), tokens
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return f"stream: {event['error']['code']}", tokens
                tokens += event["choices"][0]["token_ids"]
    return "empty", tokens


def is_ready(metrics: str, worker: str) -> bool:
    """Whether the router asks this worker."""
    return says(metrics, f'worker="{worker}@127.0.0.1"', "qsun_worker_ready", 1)


def says(metrics: str, labels: str, name: str, value: float) -> bool:
    return any(
        line.startswith(f"{name}{{") and labels in line and float(line.rpartition(" ")[2]) == value
        for line in metrics.splitlines()
    )
