"""The router's HTTP surface: OpenAI's endpoints, health and metrics, behind keys."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError
from loguru import logger

from qsun.bundle import Bundle
from qsun.config import ServeConfig
from qsun.serve.admin import Admin
from qsun.serve.admission import Admission
from qsun.serve.answers import ChatForm, CompletionForm, Form, event
from qsun.serve.asked import Asked, Timeline
from qsun.serve.intake import Intake
from qsun.serve.json_answers import json_answer
from qsun.serve.keys import Keys
from qsun.serve.metrics import Metrics
from qsun.serve.openapi import openapi
from qsun.serve.pool import Pool
from qsun.serve.refusals import Refusal, bad_request
from qsun.serve.router import BrokenAnswer, Router

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = {"/health", "/ready"}  # for load balancers, which have no key
ADMIN = "/admin/"


@dataclass(frozen=True)
class Parts:
    """What the application is put together from."""

    bundle: Bundle
    pool: Pool
    admission: Admission
    router: Router
    metrics: Metrics
    intake: Intake
    keys: Keys
    admin_keys: Keys
    limits: ServeConfig


class Service:
    """The handlers of one router."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tasks = sorted(parts.bundle.prefill)
        self._draining = False
        self._answering = 0
        self._started = int(time.time())
        self._document = openapi(parts.bundle.manifest.name, self._tasks)

    def application(self) -> web.Application:
        """The application, ready to be run."""
        application = web.Application(
            middlewares=[self._errors, self._keys],
            client_max_size=self._parts.limits.max_body_bytes,
        )
        application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{task}", self._model),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chats),
                *Admin(self._parts.pool, self._tasks).routes(),
            ]
        )
        return application

    async def drain(self) -> None:
        """Take nothing new, and wait until what was begun has ended, or `drain_s` are over."""
        self._draining = True
        try:
            async with asyncio.timeout(self._parts.limits.drain_s):
                while self._answering:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logger.warning(f"{self._answering} answers had not ended after the drain's time")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        times = Timeline()
        body, asked = await self._parts.intake.completion(await self._read(request))
        form = CompletionForm(asked, body)
        return await self._answer(request, body.stream, asked, form, times)

    async def _chats(self, request: web.Request) -> web.StreamResponse:
        times = Timeline()
        body, asked = await self._parts.intake.chat(await self._read(request))
        return await self._answer(request, body.stream, asked, ChatForm(asked, body), times)

    async def _read(self, request: web.Request) -> bytes:
        if self._draining:
            headers = {"Connection": "close"}
            raise Refusal(503, "draining", "this router is stopping", headers=headers)
        try:
            async with asyncio.timeout(self._parts.limits.stall_s):
                return await request.read()
        except TimeoutError as error:
            raise Refusal(408, "slow_request", "the request did not come to an end") from error
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise bad_request("invalid_body", f"the body cannot be read: {error}") from error

    async def _answer(
        self, request: web.Request, stream: bool, asked: Asked, form: Form, times: Timeline
    ) -> web.StreamResponse:
        if stream:
            return await self._stream(request, asked, form, times)
        pieces = await self._parts.router.whole(asked, times)
        return json_answer(form.whole(pieces), headers={"X-Request-Id": asked.id})

    async def _stream(
        self, request: web.Request, asked: Asked, form: Form, times: Timeline
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": asked.id,
            }
        )
        async with aclosing(self._parts.router.stream(asked, times)) as pieces:
            try:
                async for piece in pieces:
                    if not response.prepared:
                        await response.prepare(request)
                    await self._send(response, b"".join(form.events(piece)))
                await self._send(response, b"".join(form.ending()))
            except BrokenAnswer as error:
                logger.error(f"{asked.id} {asked.task}: {error}")
                broken = Refusal(502, "broken_answer", f"the rest of this answer is lost: {error}")
                # Without an ending: an answer that broke off must not look like a whole one.
                await self._send(response, event(broken.body()))
        await response.write_eof()
        return response

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        """A client that reads nothing must not keep its room on a decode worker for ever."""
        try:
            async with asyncio.timeout(self._parts.limits.stall_s):
                await response.write(data)
        except TimeoutError as error:
            raise ConnectionResetError("the client reads nothing") from error

    async def _health(self, _: web.Request) -> web.Response:
        return json_answer({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        pool = self._parts.pool
        lacking = [task for task in self._tasks if not pool.prefill(task)]
        ready = bool(pool.decode()) and not lacking and not self._draining
        body = {
            "ready": ready,
            "draining": self._draining,
            "decode_workers": len(pool.decode()),
            "tasks_without_prefill_worker": lacking,
        }
        return json_answer(body, status=200 if ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self._parts.metrics.exposition(self._parts.admission.waiting)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _openapi(self, _: web.Request) -> web.Response:
        return json_answer(self._document)

    async def _models(self, _: web.Request) -> web.Response:
        return json_answer({"object": "list", "data": [self._task(task) for task in self._tasks]})

    async def _model(self, request: web.Request) -> web.Response:
        task = request.match_info["task"]
        if task not in self._tasks:
            raise Refusal(404, "model_not_found", f"no task {task!r}", parameter="model")
        return json_answer(self._task(task))

    def _task(self, task: str) -> dict[str, Any]:
        bundle = self._parts.bundle
        return {
            "id": task,
            "object": "model",
            "created": self._started,
            "owned_by": bundle.manifest.name,
            "max_model_len": bundle.manifest.max_tokens,
            "bundle": bundle.digest,
        }

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._answering += 1
        try:
            return await handler(request)
        except Refusal as error:
            refusal = error
        except web.HTTPRequestEntityTooLarge:
            most = self._parts.limits.max_body_bytes
            refusal = Refusal(413, "too_large", f"a request has at most {most} bytes")
        except web.HTTPException as error:
            code = re.sub(r"\W+", "_", error.reason.lower())
            allow = {key: value for key, value in error.headers.items() if key == "Allow"}
            refusal = Refusal(error.status, code, error.reason, headers=allow)
        finally:
            self._answering -= 1
        return json_answer(refusal.body(), status=refusal.status, headers=refusal.headers)

    @web.middleware
    async def _keys(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path, given = request.path, request.headers.get("Authorization")
        is_admin = path.startswith(ADMIN)
        keys = self._parts.admin_keys if is_admin else self._parts.keys
        if is_admin and not keys.required:
            raise Refusal(403, "no_admin", "administration is off: start with --admin-keys")
        if keys.required and path not in OPEN_PATHS and keys.name_of(given) is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, "invalid_api_key", "a valid key is needed", headers=headers)
        return await handler(request)
