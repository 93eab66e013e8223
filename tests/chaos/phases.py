"""What goes wrong, one phase after another."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import aiohttp

from qsun.launch_arguments import LEASE_S
from qsun.vllm_server import ServerCommand
from tests.chaos.impostors import other_bundle, stock_decode, stock_prefill
from tests.chaos.load import Chaos
from tests.chaos.workers import Worker

# Longer than a cache is kept, so that a frozen worker goes on with what is no longer its own.
FREEZE_S = 36.0


Phase = Callable[[Chaos], Awaitable[None]]


async def kill_decode(chaos: Chaos) -> None:
    await _kill_and_start(chaos, "decode-0")


async def kill_prefill(chaos: Chaos) -> None:
    await _kill_and_start(chaos, "prefill-0")


async def _kill_and_start(chaos: Chaos, name: str, instead: ServerCommand | None = None) -> None:
    worker = chaos.workers[name]
    await asyncio.to_thread(worker.kill)
    await asyncio.sleep(3)
    if instead is not None:
        # Another at the same address: it must be up, and asked for nothing but to join.
        worker.start(instead)
        await _until_up(worker)
        await asyncio.sleep(12)
        await asyncio.to_thread(worker.kill)
    worker.start()
    await chaos.ready(name)


async def _until_up(worker: Worker) -> None:
    async with asyncio.timeout(200), aiohttp.ClientSession() as session:
        while True:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{worker.url}/health") as response:
                    if response.ok:
                        return
            await asyncio.sleep(0.3)


async def freeze_decode(chaos: Chaos) -> None:
    await _freeze(chaos, "decode-1")


async def freeze_prefill(chaos: Chaos) -> None:
    await _freeze(chaos, "prefill-1")


async def _freeze(chaos: Chaos, name: str) -> None:
    chaos.workers[name].signal(signal.SIGSTOP)
    await asyncio.sleep(FREEZE_S)
    chaos.workers[name].signal(signal.SIGCONT)
    await chaos.ready(name)


async def failed_transfers(chaos: Chaos) -> None:
    await _fault(chaos, "fail", 10)


async def expired_leases(chaos: Chaos) -> None:
    """Caches get lost on their way until nobody keeps them any more, and are then fetched."""
    await _fault(chaos, "lose", LEASE_S + 3)


async def _fault(chaos: Chaos, what: str, seconds: float) -> None:
    chaos.fault_file.write_text(what, encoding="utf-8")
    await asyncio.sleep(seconds)
    chaos.fault_file.write_text("", encoding="utf-8")
    await chaos.ready()


async def another_prefill_without_guard(chaos: Chaos) -> None:
    await _kill_and_start(chaos, "prefill-0", stock_prefill(chaos.workers["prefill-0"].command))


async def another_decode_without_guard(chaos: Chaos) -> None:
    await _kill_and_start(chaos, "decode-0", stock_decode(chaos.workers["decode-0"].command))


async def another_bundles_prefill(chaos: Chaos) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = other_bundle(chaos.bundle, Path(folder) / "other")
        command = chaos.workers["prefill-0"].command
        await _kill_and_start(chaos, "prefill-0", _moved(command, chaos.bundle.folder, other))


def _moved(command: ServerCommand, old: Path, new: Path) -> ServerCommand:
    return replace(command, folder=new / command.folder.relative_to(old))


PHASES: Sequence[Phase] = (
    kill_decode,
    kill_prefill,
    freeze_decode,
    freeze_prefill,
    failed_transfers,
    expired_leases,
    another_prefill_without_guard,
    another_decode_without_guard,
    another_bundles_prefill,
)
