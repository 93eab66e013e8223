"""The administration of workers: list them, add one, let one end what it has begun."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from aiohttp import web

from qsun.serve.intake import checked
from qsun.serve.json_answers import json_answer
from qsun.serve.openapi import AddWorker
from qsun.serve.pool import Address, Pool, State, Worker
from qsun.serve.refusals import Refusal, bad_request


class Admin:
    """The handlers below `/admin`. `tasks` are the bundle's."""

    def __init__(self, pool: Pool, tasks: Collection[str]) -> None:
        self._pool, self._tasks = pool, frozenset(tasks)

    def routes(self) -> list[web.RouteDef]:
        """What an application adds."""
        return [
            web.get("/admin/workers", self._workers),
            web.post("/admin/workers", self._add),
            web.post("/admin/workers/{name}/drain", self._drain),
        ]

    async def _workers(self, _: web.Request) -> web.Response:
        return json_answer({"workers": [_described(worker) for worker in self._pool]})

    async def _add(self, request: web.Request) -> web.Response:
        body = checked(AddWorker, await request.read())
        if self._pool.get(body.name) is not None:
            message = f"there is a worker {body.name} already"
            raise Refusal(409, "worker_exists", message, parameter="name")
        tasks = self._tasks if body.role == "decode" else frozenset(body.tasks)
        unknown = sorted(tasks - self._tasks)
        if unknown or not tasks:
            missing = "a prefill worker needs tasks"
            message = f"unknown tasks: {', '.join(unknown)}" if unknown else missing
            raise bad_request("invalid_value", message, "tasks")
        worker = self._pool.add(Address(body.name, body.role, tasks, body.url.rstrip("/")))
        return json_answer(_described(worker), status=201)

    async def _drain(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        worker = self._pool.get(name)
        if worker is None:
            raise Refusal(404, "worker_not_found", f"there is no worker {name}")
        self._pool.mark(worker, State.DRAINING, "asked to drain")
        self._pool.retired.add(name)
        return json_answer(_described(worker))


def _described(worker: Worker) -> dict[str, Any]:
    return {
        "name": worker.name,
        "role": worker.address.role,
        "tasks": sorted(worker.address.tasks),
        "url": worker.address.url,
        "state": worker.state.value,
        "problem": worker.problem,
        "in_flight": worker.in_flight,
        "blocks": worker.blocks,
        "reserved_blocks": worker.reserved_blocks,
    }
