"""Curves of one served bundle, for the simulator: TPOT by decode batch and context, prefill time.

Both are taken through the router, with one decode worker: a batch is as many requests as were sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import aiohttp
import numpy as np

from qsun.bench.client import Answer, Client
from qsun.bench.target import Target, samples
from qsun.errors import ConfigError, ServingEnvironmentError
from qsun.progress import announce
from qsun.workload import Request

PREFILL, HAND_OFF = "qsun_prefill_seconds", "qsun_hand_off_seconds"
LONGER = 2  # times as many tokens where requests were not at work together for long enough
ATTEMPTS = 5


@dataclass(frozen=True)
class CurveConfig:
    """What is measured: TPOT at `batches` x `contexts`, prefill of `prompts` tokens.

    A batch's requests are at work together for half of `steps` tokens at least, `rounds` times, and
    prompts are read as often, one after another. All points are measured once before any a second
    time, so that a machine that becomes slower or faster bends no curve; a first round warms up.
    Where prompts are read too slowly for a batch to come together, answers become longer: a row's
    `mean_context_tokens` then are more than the `context_tokens` that were asked for.
    """

    batches: tuple[int, ...] = field(default=(1, 2, 4, 8), metadata={"minimum": 1})
    contexts: tuple[int, ...] = field(default=(256,), metadata={"minimum": 16})
    prompts: tuple[int, ...] = field(default=(64, 256, 512), metadata={"minimum": 2})
    steps: int = field(default=32, metadata={"minimum": 4})
    rounds: int = field(default=3, metadata={"minimum": 1})


async def measure_curves(target: Target, settings: CurveConfig, seed: int) -> dict[str, Any]:
    """A latency record's result; seconds.

    Raises:
        ConfigError: not one decode worker.
        ServingEnvironmentError: requests failed, or a batch was never at work together.
    """
    if target.count("decode") != 1:
        raise ConfigError(
            f"curves are of one decode worker, {target.url} has {target.count('decode')}: "
            "start it with --decode 1"
        )
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=target.headers,
    ) as session:
        curves = _Curves(session, target, settings, seed)
        points = [
            _Point(batch, context, 2 * settings.steps)
            for context, batch in product(settings.contexts, settings.batches)
        ]
        read: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in settings.prompts}
        for number in range(settings.rounds + 1):
            announce(f"round {number} of {settings.rounds}" if number else "warming up")
            for point in points:
                gaps = await curves.gaps(point)
                point.gaps += gaps if number else []
            for tokens, spent in read.items():
                one = await curves.prefill(tokens)
                spent += [one] if number else []
    tpot = [
        {
            "format": target.decode,
            "batch": point.batch,
            "context_tokens": point.context,
            "mean_context_tokens": point.prompt + point.output // 2,
            "tpot_s": median(point.gaps),
        }
        for point in points
    ]
    # The first token takes a decode step, too.
    alone_s = min(median(point.gaps) for point in points)
    hand_off_s = median(one[1] for spent in read.values() for one in spent)
    return {
        "bundle": target.bundle,
        "decode": target.decode,
        "tpot": tpot,
        "prefill": [
            {"prompt_tokens": tokens, "seconds": median(one[0] for one in spent)}
            for tokens, spent in read.items()
        ],
        "hand_off_s": max(0.0, hand_off_s - alone_s),
    }


@dataclass
class _Point:
    """A batch at a context: answers of `output` tokens, around whose middle the context lies."""

    batch: int
    context: int
    output: int
    gaps: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> int:
        return max(2, self.context - self.output // 2)


class _Curves:
    def __init__(
        self, session: aiohttp.ClientSession, target: Target, settings: CurveConfig, seed: int
    ) -> None:
        self._session, self._target, self._settings = session, target, settings
        self._client = Client(session, target.url, time.perf_counter, seed)

    async def gaps(self, point: _Point) -> list[float]:
        """Seconds between tokens while all of a batch were answered; longer answers where few."""
        for _ in range(ATTEMPTS):
            answers = await self._at_once(point.batch, point.prompt, point.output)
            found = gaps_together(answers)
            if len(found) >= point.batch * self._settings.steps // 2:
                return found
            point.output *= LONGER
            point.gaps.clear()
        raise ServingEnvironmentError(
            f"{point.batch} requests of {point.prompt} + {point.output} tokens were hardly at work "
            "together: their prompts are read more slowly than they are answered"
        )

    async def prefill(self, tokens: int) -> tuple[float, float]:
        """Of a prompt alone: the prefill worker's seconds, and those of the hand-off."""
        before = await self._totals()
        await self._at_once(1, tokens, 2)
        after = await self._totals()
        found = [
            (after[name][0] - before[name][0]) / (after[name][1] - before[name][1])
            for name in (PREFILL, HAND_OFF)
        ]
        return found[0], found[1]

    async def _at_once(self, batch: int, prompt: int, output: int) -> Sequence[Answer]:
        tasks = self._target.tasks
        requests = [Request(0, tasks[one % len(tasks)], prompt, output) for one in range(batch)]
        answers = await asyncio.gather(*(self._client.ask(request) for request in requests))
        failures = [one.failure for one in answers if one.failure is not None]
        if failures:
            raise ServingEnvironmentError(
                f"{len(failures)} of {batch} requests of {prompt} + {output} tokens failed: "
                f"{', '.join(sorted(set(failures)))}"
            )
        return answers

    async def _totals(self) -> dict[str, tuple[float, float]]:
        """Seconds and number of all prefills and hand-offs so far."""
        async with self._session.get(f"{self._target.url}/metrics") as response:
            response.raise_for_status()
            text = await response.text()
        return {
            name: (
                sum(value for _, value in samples(text, f"{name}_sum")),
                sum(value for _, value in samples(text, f"{name}_count")),
            )
            for name in (PREFILL, HAND_OFF)
        }


def gaps_together(answers: Sequence[Answer]) -> list[float]:
    """Seconds between tokens while all requests were being answered, the first ones aside.

    Tokens that came together share the time since those before.
    """
    begin = max(one.token_s[0] for one in answers)
    end = min(one.token_s[-1] for one in answers)
    found: list[float] = []
    for one in answers:
        times, counts = np.unique(
            [at for at in one.token_s if begin <= at <= end], return_counts=True
        )
        for gap, count in zip(np.diff(times), counts[1:], strict=True):
            found += [float(gap) / int(count)] * int(count)
    return found
