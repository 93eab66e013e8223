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

    A batch's requests are at work together for `steps` tokens at least, `rounds` times; prompts are
    read `rounds` times, one after another.
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
        tpot = [
            await curves.tpot(batch, context)
            for context, batch in product(settings.contexts, settings.batches)
        ]
        prefill = [await curves.prefill(tokens) for tokens in settings.prompts]
    # The first token takes a decode step, too.
    alone_s = min(one["tpot_s"] for one in tpot)
    return {
        "bundle": target.bundle,
        "decode": target.decode,
        "tpot": tpot,
        "prefill": [{"prompt_tokens": one[0], "seconds": one[1]} for one in prefill],
        "hand_off_s": max(0.0, median(one[2] for one in prefill) - alone_s),
    }


class _Curves:
    def __init__(
        self, session: aiohttp.ClientSession, target: Target, settings: CurveConfig, seed: int
    ) -> None:
        self._session, self._target, self._settings = session, target, settings
        self._client = Client(session, target.url, time.perf_counter, seed)

    async def tpot(self, batch: int, context: int) -> dict[str, Any]:
        """Time per output token while `batch` requests of about `context` tokens are at work."""
        steps = self._settings.steps
        announce(f"TPOT of {batch} at once, {context} tokens before them")
        output = 2 * steps
        for _ in range(ATTEMPTS):
            prompt = max(2, context - output // 2)
            gaps: list[float] = []
            for _ in range(self._settings.rounds):
                answers = await self._at_once(batch, prompt, output)
                gaps += gaps_together(answers)
            if len(gaps) >= batch * steps * self._settings.rounds // 2:
                return {
                    "format": self._target.decode,
                    "batch": batch,
                    "context_tokens": prompt + output // 2,
                    "tpot_s": float(np.median(gaps)),
                }
            output *= LONGER
        raise ServingEnvironmentError(
            f"{batch} requests of {prompt} + {output} tokens were hardly at work together: "
            "their prompts are read more slowly than they are answered"
        )

    async def prefill(self, tokens: int) -> tuple[int, float, float]:
        """Of a prompt alone: tokens, the prefill worker's seconds, and those of the hand-off."""
        announce(f"prefill of {tokens} tokens")
        await self._at_once(1, tokens, 2)
        before = await self._totals()
        for _ in range(self._settings.rounds):
            await self._at_once(1, tokens, 2)
        after = await self._totals()
        spent = [
            (after[name][0] - before[name][0]) / (after[name][1] - before[name][1])
            for name in (PREFILL, HAND_OFF)
        ]
        return tokens, spent[0], spent[1]

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
