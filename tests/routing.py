"""A router over fake workers, all in one event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from qsun.bundle import Bundle, Manifest, PrefillModule
from qsun.config import ServeConfig
from qsun.ports import free_ports
from qsun.serve.keys import Keys
from qsun.serve.pool import Address, Pool
from qsun.serve.run import Listening, routing
from tests.fake_workers import FakeWorker, start

TASKS = ("math", "tools")
VOCABULARY, MAX_TOKENS = 512, 1024
QUICK = ServeConfig(
    queue_s=2.0, prefill_s=0.5, first_token_s=0.5, stall_s=0.5, look_s=0.05, drain_s=2.0
)


@dataclass
class Routed:
    """A running router: its address, a client's session, its pool and the workers behind it."""

    url: str
    session: aiohttp.ClientSession
    pool: Pool
    workers: dict[str, FakeWorker]
    urls: dict[str, str]
    runners: dict[str, web.AppRunner]

    async def complete(self, task: str, prompt: list[int], **more: Any) -> tuple[int, Any]:
        """Status and JSON of `POST /v1/completions`."""
        body = {"model": task, "prompt": prompt, "max_tokens": 4, **more}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            return response.status, await response.json()

    async def until_ready(self, count: int | None = None) -> None:
        """Wait until as many workers as there are, or `count`, may be asked."""
        async with asyncio.timeout(20):
            while sum(one.ready for one in self.pool) < (count or len(self.workers)):
                await asyncio.sleep(0.01)

    async def kill(self, name: str) -> None:
        """End a worker as `kill -9` does: connections break, nobody listens any more."""
        runner = self.runners.pop(name)
        for site in list(runner.sites):
            await site.stop()
        if runner.server is not None:
            for connection in runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await runner.cleanup()

    async def revive(self, name: str, worker: FakeWorker | None = None) -> None:
        """Start a worker at its old address, another one if given."""
        self.workers[name] = worker or self.workers[name]
        port = int(self.urls[name].rpartition(":")[2])
        self.runners[name], _ = await start(self.workers[name], port)


def fake_bundle(tokenizer: Path, tasks: tuple[str, ...] = TASKS) -> Bundle:
    """A bundle by its manifest alone: what the router reads of one, beside a tokenizer."""
    modules = tuple(
        PrefillModule(task, f"prefill/{task}", "lora", "sun", "n-1", rank=8) for task in tasks
    )
    manifest = Manifest(
        name="fake",
        base={},
        base_path="base",
        decode_path="decode",
        decode_scheme="W4",
        tokenizer_path=str(tokenizer),
        boundary="n-1",
        kv_layout={"vocabulary": VOCABULARY},
        kv_cache_dtype="auto",
        max_tokens=MAX_TOKENS,
        prefill=modules,
        records=(),
        files={f"prefill/{task}/adapter_model.safetensors": task for task in tasks},
    )
    return Bundle(tokenizer, manifest, hashlib.sha256(b"fake").hexdigest())


@asynccontextmanager
async def routed(
    tokenizer: Path,
    limits: ServeConfig = QUICK,
    prefill: int = 2,
    decode: int = 2,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
    blocks: int | None = None,
    tokens_per_s: float = 0.0,
    ready: bool = True,
) -> AsyncIterator[Routed]:
    """A router over so many fake workers; every prefill worker has all tasks."""
    bundle = fake_bundle(tokenizer)
    names = [f"prefill-{n}" for n in range(prefill)] + [f"decode-{n}" for n in range(decode)]
    workers = {
        name: FakeWorker(name.partition("-")[0], bundle.digest, tokens_per_s) for name in names
    }
    for worker in workers.values():
        worker.blocks = blocks or worker.blocks
    started = {name: await start(worker) for name, worker in workers.items()}
    addresses = [
        Address(name, "decode" if "decode" in name else "prefill", frozenset(TASKS), url)
        for name, (_, url) in started.items()
    ]
    (port,) = free_ports(1)
    listening = Listening("127.0.0.1", port, keys or Keys(), admin_keys or Keys())
    runners = {name: runner for name, (runner, _) in started.items()}
    urls = {name: url for name, (_, url) in started.items()}
    try:
        async with (
            routing(bundle, addresses, listening, limits) as (_, pool),
            aiohttp.ClientSession() as session,
        ):
            here = Routed(f"http://127.0.0.1:{port}", session, pool, workers, urls, runners)
            if ready:
                await here.until_ready()
                for worker in workers.values():
                    worker.seen.clear()
            yield here
    finally:
        for runner in runners.values():
            await runner.cleanup()


def brief(**changed: Any) -> ServeConfig:
    """The quick limits, some changed."""
    return replace(QUICK, **changed)
