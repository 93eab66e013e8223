"""Clients that leave: what was begun for them ends, and its room is free again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.asking import CHAT, COMPLETION, PATHS, is_idle, metrics, until
from tests.routing import routed


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_worker(
    tokenizer_folder: Path, kind: str, stream: bool
) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, decode=1, tokens_per_s=50) as here:
            body = {**(COMPLETION if kind == "completion" else CHAT), "max_tokens": 400}
            request = here.session.post(f"{here.url}{PATHS[kind]}", json=body | {"stream": stream})
            asking = asyncio.ensure_future(request)
            await until(lambda: here.workers["decode-0"].answering == 1)
            worker = here.pool.get("decode-0")
            assert worker is not None
            assert worker.reserved_blocks > 25
            if stream:
                response = await asking
                assert (await response.content.readline()).startswith(b"data: ")
                response.close()
            else:
                asking.cancel()
            await until(lambda: is_idle(here))
            assert (await here.complete("math", [1, 2], max_tokens=1))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize("hold", ["queue", "prefill"])
def test_a_client_that_leaves_before_its_first_token_leaves_nothing(
    tokenizer_folder: Path, hold: str
) -> None:
    async def run() -> None:
        async with routed(
            tokenizer_folder, prefill=1, decode=1, blocks=40, tokens_per_s=40
        ) as here:
            if hold == "queue":
                first = asyncio.create_task(here.complete("math", [1, 2], max_tokens=600))
                await until(lambda: here.workers["decode-0"].answering == 1)
            else:
                here.workers["prefill-0"].faults.append("hang")
            leaving = asyncio.create_task(here.complete("math", [3, 4], max_tokens=100))
            if hold == "queue":
                await asyncio.sleep(0.05)
                assert (await metrics(here))["qsun_queue_length"] == 1
                leaving.cancel()
                await asyncio.sleep(0.05)
                assert (await metrics(here))["qsun_queue_length"] == 0
                first.cancel()
            else:
                await until(lambda: here.workers["prefill-0"].answering == 1)
                leaving.cancel()
            await until(lambda: is_idle(here))
            assert [3, 4] not in [body["prompt"] for body in here.workers["decode-0"].seen]

    asyncio.run(run())
