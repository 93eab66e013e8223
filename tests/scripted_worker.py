"""A fake decode worker that says what a test wrote for it, in vLLM's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.fake_workers import FakeWorker


@dataclass
class ScriptedWorker(FakeWorker):
    """Answers each request with `texts`, one token each, whatever it was asked.

    Where log-probabilities are asked for, the n-th of the likeliest tokens is `~n` and scores -n;
    the chosen one scores -9.5, and comes beside them as vLLM's completions have it.
    """

    texts: Sequence[str] = ()
    ending: str = "stop"

    async def _decode(
        self, request: web.Request, body: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        if body["kv_transfer_params"].get("qsun_release"):
            return await super()._decode(request, body, fault)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for place, text in enumerate(self.texts):
            choice = {
                "index": 0,
                "text": text,
                "logprobs": _scores(text, body["logprobs"]) if "logprobs" in body else None,
                "finish_reason": self.ending if place + 1 == len(self.texts) else None,
                "token_ids": [place],
            }
            event = {"id": "x", "model": "decode", "choices": [choice]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


def _scores(text: str, likeliest: int) -> dict[str, Any]:
    others = {f"~{place}": -float(place) for place in range(1, likeliest + 1)}
    return {
        "text_offset": [0],
        "tokens": [text],
        "token_logprobs": [-9.5],
        "top_logprobs": [{text: -9.5, **others}],
    }
