"""Workers that come and go: administration, and readiness."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qsun.serve.keys import Keys, read_keys
from tests.asking import is_idle, post, until
from tests.fake_workers import FakeWorker, start
from tests.routing import TASKS, Routed, brief, routed

KEY = "a-key-for-administrators"
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def admin_keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text(f"ada {KEY}\n")
    return read_keys(tmp_path / "keys")


async def told(here: Routed, path: str) -> tuple[int, Any]:
    """Status and JSON, as an administrator."""
    async with here.session.get(f"{here.url}{path}", headers=ADMIN) as response:
        return response.status, await response.json()


async def states(here: Routed) -> dict[str, str]:
    _, answer = await told(here, "/admin/workers")
    return {one["name"]: one["state"] for one in answer["workers"]}


async def metrics(here: Routed) -> dict[str, float]:
    """Every sample by its name and labels."""
    async with here.session.get(f"{here.url}/metrics", headers=ADMIN) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def test_workers_are_listed(tokenizer_folder: Path, admin_keys: Keys) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, admin_keys=admin_keys) as here:
            _, answer = await told(here, "/admin/workers")
            assert [one["name"] for one in answer["workers"]] == [
                *("prefill-0", "prefill-1", "decode-0", "decode-1")
            ]
            assert answer["workers"][2] == {
                "name": "decode-0",
                "role": "decode",
                "tasks": ["math", "tools"],
                "url": here.urls["decode-0"],
                "state": "ready",
                "problem": "",
                "in_flight": 0,
                "blocks": 4096,
                "reserved_blocks": 0,
            }

    asyncio.run(run())


def test_an_added_worker_is_tried_and_then_asked(tokenizer_folder: Path, admin_keys: Keys) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, decode=1, admin_keys=admin_keys) as here:
            added = FakeWorker("decode", here.workers["decode-0"].bundle)
            runner, url = await start(added)
            body = {"name": "added", "role": "decode", "url": f"{url}/"}
            status, answer = await post(here, "/admin/workers", body, **ADMIN)
            assert (status, answer["state"], answer["url"]) == (201, "joining", url)
            assert answer["tasks"] == list(TASKS)
            await here.until_ready(4)
            here.workers["added"], here.runners["added"] = added, runner
            # What it was tried with is kept apart from every task's prompts.
            assert [one["cache_salt"].endswith(".probe") for one in added.seen] == [True]
            await here.kill("decode-0")
            assert (await here.complete("math", [1, 2, 3]))[0] == 200
            assert len(added.seen) == 2

    asyncio.run(run())


UNFIT: list[tuple[dict[str, Any], int, str, str]] = [
    ({"name": "decode-0"}, 409, "worker_exists", "there is a worker decode-0 already"),
    ({"name": "a/b"}, 400, "invalid_value", "name: String should match pattern"),
    ({"role": "both"}, 400, "invalid_value", "role: Input should be 'prefill' or 'decode'"),
    ({"url": "ftp://x"}, 400, "invalid_value", "url: String should match pattern"),
    ({"url": "http://x/path"}, 400, "invalid_value", "url: String should match pattern"),
    ({"tasks": ["poems", "math"]}, 400, "invalid_value", "unknown tasks: poems"),
    ({"tasks": []}, 400, "invalid_value", "a prefill worker needs tasks"),
    ({"colour": "red"}, 400, "invalid_value", "colour: Extra inputs are not permitted"),
]


def test_a_worker_that_cannot_be_is_not_added(tokenizer_folder: Path, admin_keys: Keys) -> None:
    async def run() -> None:
        good = {"name": "new", "role": "prefill", "url": "http://127.0.0.1:1", "tasks": ["math"]}
        async with routed(tokenizer_folder, admin_keys=admin_keys) as here:
            for changes, status, code, words in UNFIT:
                found, answer = await post(here, "/admin/workers", {**good, **changes}, **ADMIN)
                assert (found, answer["error"]["code"]) == (status, code)
                assert words in answer["error"]["message"]
            assert len(list(here.pool)) == 4

    asyncio.run(run())


def test_a_drained_worker_ends_what_it_has_begun(tokenizer_folder: Path, admin_keys: Keys) -> None:
    async def run() -> None:
        async with routed(
            tokenizer_folder, decode=2, admin_keys=admin_keys, tokens_per_s=100
        ) as here:
            begun = [asyncio.create_task(here.complete("math", [1, 2, n])) for n in range(4)]
            # Chosen anew once the prompt has been read: only then is it known who answers.
            await until(lambda: all(here.workers[f"decode-{n}"].answering for n in range(2)))
            path = "/admin/workers/decode-0/drain"
            status, answer = await post(here, path, {}, **ADMIN)
            assert (status, answer["state"]) == (200, "draining")
            asked = here.workers["decode-0"].asked
            for _ in range(3):
                assert (await here.complete("tools", [4, 5], max_tokens=1))[0] == 200
            assert here.workers["decode-0"].asked == asked
            assert {status for status, _ in await asyncio.gather(*begun)} == {200}
            await until(lambda: here.pool.get("decode-0") is None)
            assert (await post(here, path, {}, **ADMIN))[1]["error"]["code"] == "worker_not_found"
            assert await states(here) == dict.fromkeys(
                ("prefill-0", "prefill-1", "decode-1"), "ready"
            )
            assert is_idle(here)

    asyncio.run(run())


def test_a_worker_whose_name_cannot_resolve_can_be_drained(
    tokenizer_folder: Path, admin_keys: Keys
) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, admin_keys=admin_keys) as here:
            body = {"name": "typo", "role": "decode", "url": "http://pods..cluster:8000"}
            assert (await post(here, "/admin/workers", body, **ADMIN))[0] == 201
            await asyncio.sleep(0.2)
            assert (await post(here, "/admin/workers/typo/drain", {}, **ADMIN))[0] == 200
            async with asyncio.timeout(1):
                await until(lambda: here.pool.get("typo") is None)

    asyncio.run(run())


def test_ready_is_said_as_long_as_every_task_can_be_answered(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, brief(queue_s=0.1), prefill=1) as here:
            ready = {
                "ready": True,
                "draining": False,
                "decode_workers": 2,
                "tasks_without_prefill_worker": [],
            }
            assert await told(here, "/ready") == (200, ready)
            await here.kill("decode-0")
            await until(lambda: len(here.pool.decode()) == 1)
            assert await told(here, "/ready") == (200, {**ready, "decode_workers": 1})
            await here.kill("decode-1")
            await until(lambda: not here.pool.decode())
            lost = {**ready, "ready": False, "decode_workers": 0}
            assert await told(here, "/ready") == (503, lost)
            status, answer = await here.complete("math", [1, 2])
            assert (status, answer["error"]["code"]) == (503, "unavailable")
            assert "no decode worker for math was ready within 0.1 s" in answer["error"]["message"]
            assert (await told(here, "/health"))[0] == 200
            await here.kill("prefill-0")
            await until(lambda: not here.pool.prefill("math"))
            lost["tasks_without_prefill_worker"] = list(TASKS)
            assert await told(here, "/ready") == (503, lost)
            status, answer = await here.complete("math", [1, 2])
            assert (status, answer["error"]["code"]) == (503, "unavailable")
            assert "no prefill worker for math was ready within 0.1 s" in answer["error"]["message"]
            for name in ("prefill-0", "decode-0", "decode-1"):
                await here.revive(name)
            await here.until_ready()
            assert await told(here, "/ready") == (200, ready)
            assert (await here.complete("math", [1, 2]))[0] == 200

    asyncio.run(run())
