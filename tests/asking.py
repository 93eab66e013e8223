"""Requests to a router under test: good ones to start from, and how to send any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.routing import Routed

PROMPT = [5, 6, 7]
COMPLETION: dict[str, Any] = {"model": "math", "prompt": PROMPT, "max_tokens": 4}
CHAT: dict[str, Any] = {
    "model": "tools",
    "messages": [{"role": "user", "content": "Ada?"}],
    "max_tokens": 4,
}
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


async def post(here: Routed, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with here.session.post(f"{here.url}{path}", data=data, headers=headers) as response:
        return response.status, await response.json()


async def get(here: Routed, path: str, **headers: str) -> int:
    async with here.session.get(f"{here.url}{path}", headers=headers) as response:
        return response.status


async def raw(here: Routed, line: str, *headers: bytes) -> bytes:
    """What is answered to a request written byte by byte."""
    host, _, port = here.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"\r\n".join([line.encode(), b"Host: x", b"Connection: close", *headers, b"", b""])
    )
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


async def until(met: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(10):
        while not met():
            await asyncio.sleep(0.005)


async def metrics(here: Routed) -> dict[str, float]:
    """Every sample by its name and labels."""
    async with here.session.get(f"{here.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def is_idle(here: Routed) -> bool:
    """Whether no request is left anywhere."""
    return all(worker.answering == 0 for worker in here.workers.values()) and all(
        worker.in_flight == worker.reserved_blocks == 0 for worker in here.pool
    )
