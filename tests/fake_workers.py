"""Workers that only pretend: vLLM's HTTP surface with a guard's seals, and faults on demand.

A fake decode worker's answer names the task that sealed the prompt's cache and the prompt itself:
an answer by the wrong module, or on another prompt's cache, shows.

    python -m tests.fake_workers ROLE BUNDLE_DIGEST PORT [TOKENS_A_SECOND]
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from qsun.disaggregation import SEAL, SEAL_DIGITS, SEPARATOR

BLOCK_TOKENS, BLOCKS = 16, 4097
METRICS = """\
vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="{blocks}"}} 1.0
vllm:kv_cache_usage_perc{{engine="0"}} {used}
vllm:prompt_tokens_by_source_total{{engine="0",source="local_compute"}} 0.0
vllm:prompt_tokens_by_source_total{{engine="0",source="local_cache_hit"}} 0.0
vllm:prompt_tokens_by_source_total{{engine="0",source="external_kv_transfer"}} 0.0
vllm:generation_tokens_total{{engine="0"}} {generated}
vllm:num_preemptions_total{{engine="0"}} 0.0
vllm:iteration_tokens_total_count{{engine="0"}} {steps}
"""


def answer_token(task: str, prompt: Sequence[int], place: int) -> str:
    """What a decode worker says at `place` of the answer to a prompt that `task` has read."""
    return f"{task}.{zlib.crc32(json.dumps(list(prompt)).encode()):08x}.{place} "


@dataclass
class FakeWorker:
    """One worker. `faults` holds what goes wrong with the next requests, one fault each.

    `fault` decides for every request anew; where neither says anything, all goes well.
    """

    role: str
    bundle: str
    tokens_per_s: float = 0.0
    faults: deque[str] = field(default_factory=deque)
    fault: Callable[[], str | None] = lambda: None
    seen: list[dict[str, Any]] = field(default_factory=list)
    keep_seen: bool = True
    answering: int = 0
    frozen: bool = False
    blocks: int = BLOCKS
    caches: set[str] = field(default_factory=set)
    released: int = 0
    asked: int = 0
    generated: int = 0
    steps: float = 0.0

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/v1/completions", self._completions)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/health", self._health)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        await self._thaw()
        return web.json_response({})

    async def _metrics(self, _: web.Request) -> web.Response:
        await self._thaw()
        return web.Response(
            text=METRICS.format(
                size=BLOCK_TOKENS,
                blocks=self.blocks,
                used=0.0,
                generated=self.generated,
                steps=self.steps,
            )
        )

    async def _thaw(self) -> None:
        while self.frozen:
            await asyncio.sleep(0.05)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked += 1
        if self.keep_seen:
            self.seen.append(body)
        fault = self.faults.popleft() if self.faults else self.fault()
        await self._thaw()
        self.answering += 1
        try:
            if fault == "500":
                return web.json_response({"error": {"message": "told to"}}, status=500)
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault == "reset":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if self.role == "prefill":
                return self._prefill(body, fault)
            return await self._decode(request, body, fault)
        finally:
            self.answering -= 1

    def _prefill(self, body: dict[str, Any], fault: str | None) -> web.Response:
        bundle = "0" * 64 if fault == "other bundle" else self.bundle
        task = "another" if fault == "other task" else body["model"]
        cache = f"{task}-{self.asked}"
        self.caches.add(cache)
        parameters = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1]],
            "remote_engine_id": SEPARATOR.join((SEAL, bundle[:SEAL_DIGITS], task, "engine")),
            "remote_request_id": cache,
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "remote_num_tokens": len(body["prompt"]) - (fault == "short"),
        }
        choice: Any = {"index": 0, "text": "x", "prompt_token_ids": body["prompt"]}
        answer: dict[str, Any] = {"choices": [choice], "kv_transfer_params": parameters}
        if fault == "no parameters":
            del answer["kv_transfer_params"]
        if fault == "no json":
            return web.Response(text="<html>")
        return web.json_response(answer)

    async def _decode(
        self, request: web.Request, body: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        parameters = body.get("kv_transfer_params") or {}
        sealed = str(parameters.get("remote_engine_id")).split(SEPARATOR)
        if sealed[:2] != [SEAL, self.bundle[:SEAL_DIGITS]] or parameters.get("qsun_release"):
            self.released += bool(parameters.get("qsun_release"))
            return web.json_response({"error": {"message": "refused"}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if fault == "empty":
            return response
        if fault == "error event":
            await response.write(b'data: {"error": {"message": "told to"}}\n\ndata: [DONE]\n\n')
            return response
        count = body["max_tokens"]
        for place in range(count):
            if self.tokens_per_s:
                await asyncio.sleep(1 / self.tokens_per_s)
            await self._thaw()
            self.generated += 1
            self.steps += 1 / self.answering
            last = place + 1 == count
            choice: dict[str, Any] = {
                "index": 0,
                "text": answer_token(sealed[2], body["prompt"], place),
                "logprobs": None,
                "finish_reason": "length" if last and fault != "no ending" else None,
                "token_ids": [place],
            }
            event: dict[str, Any] = {"id": "x", "model": "decode", "choices": [choice]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if place + 1 == (count + 1) // 2:
                if fault == "stall":
                    await asyncio.sleep(3600)
                if fault == "cut" and request.transport is not None:
                    request.transport.abort()
                    return response
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        event = {"id": "x", "model": "decode", "choices": [], "usage": usage}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


async def start(worker: FakeWorker, port: int = 0) -> tuple[web.AppRunner, str]:
    """Start a worker in this process; its runner, for an end, and its address."""
    runner = web.AppRunner(
        worker.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _forever(worker: FakeWorker, port: int) -> None:
    await start(worker, port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    role, bundle, port, *rest = sys.argv[1:]
    fake = FakeWorker(role, bundle, float(rest[0]) if rest else 0.0, keep_seen=False)
    asyncio.run(_forever(fake, int(port)))
