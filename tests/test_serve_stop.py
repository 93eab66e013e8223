"""The end of a router: it takes nothing new, lets answers end, and does not wait for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from qsun.config import ServeConfig
from qsun.errors import ConfigError, ServingEnvironmentError
from qsun.ports import free_ports
from qsun.serve.keys import Keys
from qsun.serve.pool import Address, Pool
from qsun.serve.run import Listening, serve
from tests.fake_workers import FakeWorker, start
from tests.routing import TASKS, brief, fake_bundle

BODY = {"model": "math", "prompt": [1, 2, 3], "stream": True}


@dataclass
class Served:
    """`serve` as `qsun serve` calls it, in this process, and a client."""

    url: str
    session: aiohttp.ClientSession
    serving: asyncio.Task[None]

    async def stream(self, count: int) -> list[bytes]:
        """The lines of an answer of so many tokens."""
        body = {**BODY, "max_tokens": count}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            return [line async for line in response.content]

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(f"{self.url}{path}") as response:
            return response.status, await response.json()


@asynccontextmanager
async def served(
    tokenizer: Path, limits: ServeConfig, tokens_per_s: float, port: int = 0
) -> AsyncIterator[Served]:
    """A router with one worker of each role; the signal that ends it is the test's to send."""
    bundle = fake_bundle(tokenizer)
    workers = {
        role: FakeWorker(role, bundle.digest, tokens_per_s) for role in ("prefill", "decode")
    }
    started = {role: await start(worker) for role, worker in workers.items()}
    addresses = [
        Address("prefill", "prefill", frozenset(TASKS), started["prefill"][1]),
        Address("decode", "decode", frozenset(TASKS), started["decode"][1]),
    ]
    port = port or free_ports(1)[0]
    ready = asyncio.Event()

    def changed(pool: Pool) -> None:
        if len(list(pool)) == 2 and all(worker.ready for worker in pool):
            ready.set()

    async def background(_: Pool) -> None:
        await asyncio.Event().wait()

    listening = Listening("127.0.0.1", port, Keys(), Keys())
    serving = asyncio.create_task(serve(bundle, addresses, background, listening, limits, changed))
    try:
        await asyncio.wait(
            [serving, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if serving.done():
            serving.result()
        async with aiohttp.ClientSession() as session:
            yield Served(f"http://127.0.0.1:{port}", session, serving)
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        for runner, _ in started.values():
            await runner.cleanup()


def test_answers_end_before_the_router_does(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with served(tokenizer_folder, brief(drain_s=5), tokens_per_s=40) as here:
            answering = asyncio.create_task(here.stream(20))
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            status, answer = await here.get("/ready")
            assert (status, answer["ready"], answer["draining"]) == (503, False, True)
            assert (await here.get("/health"))[0] == 200
            async with here.session.post(f"{here.url}/v1/completions", json=BODY) as response:
                assert response.status == 503
                assert response.headers["Connection"] == "close"
                assert (await response.json())["error"]["code"] == "draining"
            async with asyncio.timeout(5):
                await here.serving
            lines = await answering
            assert sum(line.startswith(b"data: {") for line in lines) == 20
            assert b"data: [DONE]\n" in lines
            with pytest.raises(aiohttp.ClientConnectionError):
                await here.get("/health")

    asyncio.run(run())


@pytest.mark.parametrize(("drain_s", "signals"), [(0.2, 1), (60.0, 2)])
def test_an_answer_without_end_does_not_keep_the_router(
    tokenizer_folder: Path, drain_s: float, signals: int
) -> None:
    async def run() -> None:
        async with served(tokenizer_folder, brief(drain_s=drain_s), tokens_per_s=50) as here:
            answering = asyncio.create_task(here.stream(1000))
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.05)
            async with asyncio.timeout(30):
                await here.serving
            waited_s = time.monotonic() - begun
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        # 20 s of tokens are left; aiohttp takes up to two of the router's to end connections.
        assert waited_s < 5

    asyncio.run(run())


def test_a_port_that_is_taken_is_told(tokenizer_folder: Path) -> None:
    async def run() -> None:
        worker = FakeWorker("decode", "0" * 64)
        runner, url = await start(worker)
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
            async with served(tokenizer_folder, brief(), tokens_per_s=0, port=port):
                pass
        await runner.cleanup()

    asyncio.run(run())


def test_what_fails_in_the_background_ends_the_router(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async def background(_: Pool) -> None:
            raise ServingEnvironmentError("worker decode ended with code 1 while starting")

        listening = Listening("127.0.0.1", free_ports(1)[0], Keys(), Keys())
        with pytest.raises(ServingEnvironmentError, match="while starting"):
            await serve(
                fake_bundle(tokenizer_folder), [], background, listening, brief(), lambda _: None
            )

    asyncio.run(run())
