"""The serving process: router and local workers together, from their start to a clean end."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from qsun.bundle import Bundle, Manifest
from qsun.config import ServeConfig
from qsun.disaggregation import WrittenAs
from qsun.errors import ConfigError
from qsun.policy import Policy
from qsun.serve.admission import Admission
from qsun.serve.app import Parts, Service
from qsun.serve.asked import Asked
from qsun.serve.hops import LONGEST_LINE, Hops
from qsun.serve.intake import Intake
from qsun.serve.keys import Keys
from qsun.serve.metrics import Metrics
from qsun.serve.pool import Address, Pool
from qsun.serve.prompts import Prompts
from qsun.serve.router import Router
from qsun.serve.watch import Watch

PROBE_PROMPT = [1, 2]
SHUTDOWN_S = 1.0  # answers that a drain did not wait for end
KEEP_ALIVE_S = 2.0  # vLLM closes kept connections after 5
Background = Callable[[Pool], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Listening:
    """Where the router listens, and who may ask."""

    host: str
    port: int
    keys: Keys
    admin_keys: Keys


async def serve(
    bundle: Bundle,
    addresses: list[Address],
    background: Background,
    listening: Listening,
    limits: ServeConfig,
    ready: Callable[[Pool], None],
) -> None:
    """Route requests until a first signal to stop, then drain until done or a second one.

    `background` runs beside it. `ready` is called whenever a worker may be asked, or may no longer.

    Raises:
        ConfigError: the port is taken.
        ServingEnvironmentError: what runs in the background failed.
    """
    loop, signals = asyncio.get_running_loop(), asyncio.Semaphore(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.release)
    async with routing(bundle, addresses, listening, limits) as (service, pool):
        pool.changed.append(lambda _: ready(pool))
        beside = asyncio.create_task(background(pool))
        try:
            await _first(beside, signals.acquire())
            await _first(asyncio.create_task(service.drain()), signals.acquire())
        finally:
            pool.close()
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)


async def _first(task: asyncio.Task[Any], signalled: Coroutine[Any, Any, Any]) -> None:
    """Wait for the task's end or a signal; the task goes on after the latter.

    Raises:
        Exception: what the task has raised.
    """
    signal_ = asyncio.create_task(signalled)
    await asyncio.wait({task, signal_}, return_when=asyncio.FIRST_COMPLETED)
    signal_.cancel()
    if task.done():
        task.result()


@asynccontextmanager
async def routing(
    bundle: Bundle, addresses: list[Address], listening: Listening, limits: ServeConfig
) -> AsyncIterator[tuple[Service, Pool]]:
    """A router that listens, over workers that need not be there yet.

    Raises:
        ConfigError: the port is taken.
    """
    manifest = bundle.manifest
    salts = salts_of(manifest)
    pool = Pool()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=LONGEST_LINE
    ) as session:
        prompts = Prompts(bundle.tokenizer, manifest.kv_layout["vocabulary"])
        about = {
            "bundle": bundle.digest,
            "decode": manifest.decode_scheme,
            "policy": limits.policy,
        }
        hops, metrics = Hops(session, limits), Metrics(pool, about)
        admission = Admission(
            pool, Policy(limits.policy), salts, limits.queue_length, limits.queue_s
        )
        parts = Parts(
            bundle=bundle,
            pool=pool,
            admission=admission,
            router=Router(pool, admission, hops, metrics, limits),
            metrics=metrics,
            intake=Intake(bundle, salts, prompts),
            keys=listening.keys,
            admin_keys=listening.admin_keys,
            limits=limits,
        )
        probes = {
            task: Asked(WrittenAs(task, bundle.digest), PROBE_PROMPT, 1, f"{salt}.probe")
            for task, salt in salts.items()
        }
        service = Service(parts)
        # Else a full collection looks through all that transformers has loaded, again and again,
        # and whatever comes in meanwhile waits.
        gc.collect()
        gc.freeze()
        watch = Watch(pool, hops, session, probes, limits)
        runner = web.AppRunner(
            service.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
        )
        await runner.setup()
        try:
            await _listen(runner, listening)
            for address in addresses:
                pool.add(address)
            yield service, pool
        finally:
            await watch.stop()
            await runner.cleanup()


async def _listen(runner: web.AppRunner, listening: Listening) -> None:
    site = web.TCPSite(runner, listening.host, listening.port)
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {listening.host}:{listening.port}: {error.strerror}. "
            "Give another --host or --port."
        ) from error


def salts_of(manifest: Manifest) -> dict[str, str]:
    """What keeps each task's caches apart from others', and from those of its earlier modules."""
    return {
        one.task: f"{one.task}.{module_version(manifest, one.path)}" for one in manifest.prefill
    }


def module_version(manifest: Manifest, path: str) -> str:
    """What tells a prefill module from every other: digests of its files and of the base's."""
    folders = [f"{path}/"] + ([] if manifest.base_path is None else [f"{manifest.base_path}/"])
    files = sorted(
        f"{name} {digest}"
        for name, digest in manifest.files.items()
        if name.startswith(tuple(folders))
    )
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
