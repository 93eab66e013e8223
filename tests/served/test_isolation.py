"""Tasks on one prefill worker with its prefix cache on: nobody gets another task's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest

from qsun.bundle import Bundle
from qsun.references import read_references
from qsun.verify.served.in_process import InProcess
from qsun.worker_counts import counts_of
from tests.served.conftest import TASKS, TIE_NATS
from tests.serving import Serving

PROMPTS, ROUNDS, NEW_TOKENS, AT_ONCE = 50, 3, 5, 12
BLOCK_TOKENS = 128

Answers = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def prompts(bundle: Bundle) -> list[list[int]]:
    """Prompts that begin alike for more than a block, as few-shot prompts do, and end apart."""
    vocabulary = bundle.manifest.kv_layout["vocabulary"]
    rows = read_references(bundle.folder / "verification/math.jsonl", vocabulary)
    words = [token for row in rows for token in (*row.prompt, *row.response)]
    shared = (words * 2)[: BLOCK_TOKENS + 8]
    return [[*shared, *words[place : place + 12]] for place in range(PROMPTS)]


async def ask_all(url: str, wanted: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
    """The tokens of every answer, a few asked at once."""
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(session: aiohttp.ClientSession, task: str, prompt: list[int]) -> list[int]:
        body: dict[str, Any] = {"model": task, "prompt": prompt, "max_tokens": NEW_TOKENS}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        async with places, session.post(f"{url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens

    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(ask(session, *one) for one in wanted)))


@pytest.fixture(scope="module")
def solo(served: Serving, prompts: list[list[int]]) -> Answers:
    """Every task's answers while it is the only one asked."""
    found: Answers = {}
    for task in TASKS:
        answers = asyncio.run(ask_all(served.url, [(task, prompt) for prompt in prompts]))
        found |= {(task, place): tokens for place, tokens in enumerate(answers)}
    return found


def test_interleaved_tasks_get_their_own_answers(
    served: Serving, prompts: list[list[int]], solo: Answers, in_process: InProcess
) -> None:
    differing = [place for place in range(PROMPTS) if solo["math", place] != solo["tools", place]]
    assert len(differing) > PROMPTS / 2, "the tasks answer too much alike to be told apart"
    reader = served.server("prefill")
    before, same = counts_of(reader), 0
    for turn in range(ROUNDS):
        tasks = [TASKS[(place + turn) % len(TASKS)] for place in range(PROMPTS)]
        answers = asyncio.run(ask_all(served.url, list(zip(tasks, prompts, strict=True))))
        assert wrong(tasks, answers, solo, in_process, prompts) == []
        same += sum(
            tokens == solo[task, place]
            for place, (task, tokens) in enumerate(zip(tasks, answers, strict=True))
        )
    assert same >= 0.95 * ROUNDS * PROMPTS
    counts = counts_of(reader) - before
    assert counts.cached >= ROUNDS * PROMPTS * BLOCK_TOKENS / 2, "the prefix cache was not used"


def wrong(
    tasks: Sequence[str], answers: Sequence[list[int]], solo: Answers, own: InProcess, prompts: Any
) -> list[str]:
    """The answers that are not their task's, in words.

    Batches of other sizes are computed in another order, and bfloat16 rounds: where an answer
    differs from the solo one, its task's own modules must find every token as likely as the
    likeliest, but for rounding.
    """
    return [
        f"{task}, prompt {place}: {tokens} instead of {solo[task, place]}"
        for place, (task, tokens) in enumerate(zip(tasks, answers, strict=True))
        if tokens != solo[task, place]
        and max(own.score(task, prompts[place], tokens).gaps) > TIE_NATS
    ]
