"""A router over fake workers in a thread of its own, for whoever asks it from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tests.routing import Routed, routed


@contextmanager
def router(tokenizer: Path, ends_after_s: float | None = None, **how: Any) -> Iterator[Routed]:
    """`routed`, while the block runs, or for `ends_after_s` seconds."""
    found: list[Routed] = []
    ready, ended = Event(), Event()

    async def run() -> None:
        async with routed(tokenizer, **how) as here:
            found.append(here)
            ready.set()
            await asyncio.to_thread(ended.wait, ends_after_s)

    thread = Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(30)
        yield found[0]
    finally:
        ended.set()
        thread.join()
