"""A router that is asked anything, and what must hold of whatever it says."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tests.routing import TASKS, Routed

LONGEST_S = 10.0


@dataclass
class Target:
    """A router that stays for all examples; its loop runs while it is asked."""

    runner: asyncio.Runner
    routed: Routed

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and what was said, which must be right whatever it was."""
        return self.runner.run(self._ask(method, path, body, headers or {}))

    async def _ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, Any]:
        session, url = self.routed.session, f"{self.routed.url}{path}"
        async with asyncio.timeout(LONGEST_S):
            async with session.request(method, url, data=body, headers=headers) as response:
                said = await response.read()
        if method == "HEAD":
            assert response.status < 500
            return response.status, None
        if response.status >= 300:
            return response.status, error_of(response.status, said)
        if response.content_type == "text/event-stream":
            return response.status, streamed(said)
        return response.status, json.loads(said) if path != "/metrics" else said

    async def left(self) -> set[str]:
        """What does not go away by itself: requests and drained workers."""
        here = self.routed
        for _ in range(500):
            busy = {
                worker.name for worker in here.pool if worker.in_flight or worker.reserved_blocks
            }
            busy |= {name for name, worker in here.workers.items() if worker.answering}
            busy |= {worker.name for worker in here.pool} - here.workers.keys()
            if not busy:
                break
            await asyncio.sleep(0.01)
        return busy


def error_of(status: int, said: bytes) -> dict[str, Any]:
    """OpenAI's error object, and nothing beside it."""
    assert status < 500, said
    answer = json.loads(said)
    assert answer.keys() == {"error"}
    error: dict[str, Any] = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 3000
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert error["code"].isidentifier()
    assert error["param"] is None or isinstance(error["param"], str)
    return error


def streamed(said: bytes) -> dict[str, Any]:
    """A stream's events as one answer."""
    events = said.removesuffix(b"\n\n").split(b"\n\n")
    assert events[-1] == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (
        len(choices) - 1
    ) + [False]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
    return {**chunks[0], "choices": [{"text": "".join(text or "" for text in texts)}]}


def answer_of(said: dict[str, Any]) -> str:
    """What an answer says, which is something."""
    (choice,) = said["choices"]
    text = choice.get("text") or choice.get("message", {}).get("content")
    assert isinstance(text, str)
    assert text != ""
    assert said["model"] in TASKS
    return text
