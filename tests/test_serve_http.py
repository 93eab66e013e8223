"""The router's HTTP surface: who may ask, what workers are asked in turn, what is told of it."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qsun.errors import ConfigError
from qsun.evaluate.router_address import RouterAddress, require_router
from qsun.serve.keys import Keys, read_keys
from tests.asking import CHAT, COMPLETION, PATHS, PROMPT, get, post, raw
from tests.routing import TASKS, Routed, fake_bundle, routed

KEY, ADMIN_KEY = "a-key-for-those-who-ask", "a-key-for-administrators"


@dataclass
class Locked:
    """A router that asks for keys."""

    tokenizer: Path
    keys: Keys
    admin_keys: Keys

    def routed(self) -> AbstractAsyncContextManager[Routed]:
        return routed(self.tokenizer, keys=self.keys, admin_keys=self.admin_keys)


@pytest.fixture
def locked(tokenizer_folder: Path, tmp_path: Path) -> Locked:
    made = []
    for key in (KEY, ADMIN_KEY):
        (tmp_path / "keys").write_text(f"ada {key}\n")
        made.append(read_keys(tmp_path / "keys"))
    return Locked(tokenizer_folder, *made)


def test_only_who_has_a_key_may_ask(locked: Locked) -> None:
    async def run() -> None:
        opens, admin = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with locked.routed() as here:
            for headers in ({}, admin, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}):
                status, answer = await post(here, PATHS["completion"], COMPLETION, **headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/admin/workers"):
                assert await get(here, path) == 401, path
            # Load balancers have no key.
            assert [await get(here, path) for path in ("/health", "/ready")] == [200, 200]
            assert (await post(here, PATHS["completion"], COMPLETION, **opens))[0] == 200
            assert await get(here, "/admin/workers", **opens) == 401
            assert await get(here, "/admin/workers", **admin) == 200
            async with here.session.get(f"{here.url}/v1/models") as response:
                assert response.headers["WWW-Authenticate"] == "Bearer"

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/admin/workers", "/%61dmin/workers", "//admin/workers"])
def test_no_spelling_of_a_path_gets_around_the_keys(locked: Locked, path: str) -> None:
    async def run() -> None:
        async with locked.routed() as here:
            answer = await raw(here, f"GET {path} HTTP/1.1")
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 404"))
        assert b"prefill-0" not in answer

    asyncio.run(run())


def test_a_header_of_other_bytes_is_no_key(locked: Locked) -> None:
    async def run() -> None:
        async with locked.routed() as here:
            answer = await raw(here, "GET /v1/models HTTP/1.1", b"Authorization: Bearer \xff\xfe")
        assert answer.startswith(b"HTTP/1.1 401")

    asyncio.run(run())


def test_without_admin_keys_there_is_no_administration(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder) as here:
            for path in ("/admin/workers", "/admin/workers/decode-0/drain", "/admin/other"):
                status, answer = await post(here, path, {})
                assert (status, answer["error"]["code"]) == (403, "no_admin")
            assert len(list(here.pool)) == 4

    asyncio.run(run())


def test_the_prefill_worker_reads_and_the_decode_worker_answers(tokenizer_folder: Path) -> None:
    async def run() -> None:
        sampling = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "seed": -3,
            "stop": ["\n", "END"],
            "stop_token_ids": [2],
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"5": -100},
            "min_tokens": 1,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        unused = {"user": "ada", "metadata": {"a": "b"}, "n": 1, "return_token_ids": True}
        async with routed(tokenizer_folder, prefill=1, decode=1) as here:
            salts, prompts = set(), set()
            for kind, good in (
                ("completion", COMPLETION),
                ("chat", CHAT),
                ("completion", {**COMPLETION, "model": "tools"}),
            ):
                body = {**good, **sampling, **unused}
                status, answer = await post(here, PATHS[kind], body)
                assert status == 200, answer
                assert answer["choices"][0]["token_ids"] == [0, 1, 2, 3]
                read = here.workers["prefill-0"].seen[-1]
                answered = here.workers["decode-0"].seen[-1]
                assert read == {
                    "model": body["model"],
                    "prompt": read["prompt"],
                    "max_tokens": 1,
                    "temperature": 0,
                    "cache_salt": read["cache_salt"],
                    "return_token_ids": True,
                    "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
                }
                parameters = answered.pop("kv_transfer_params")
                assert parameters["remote_request_id"].startswith(f"{body['model']}-")
                assert answered == {
                    **sampling,
                    "model": "decode",
                    "prompt": read["prompt"],
                    "max_tokens": 4,
                    "cache_salt": read["cache_salt"],
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "return_token_ids": True,
                }
                salts.add((body["model"], read["cache_salt"]))
                prompts.add(tuple(read["prompt"]))
            assert tuple(PROMPT) in prompts
            # One salt for each task, whichever way it was asked.
            assert len(salts) == len({salt for _, salt in salts}) == 2

    asyncio.run(run())


def test_a_packed_body_is_unpacked_up_to_the_limit(tokenizer_folder: Path) -> None:
    async def run() -> None:
        packed = {"Content-Encoding": "gzip"}
        async with routed(tokenizer_folder) as here:
            body = gzip.compress(json.dumps(COMPLETION).encode())
            assert (await post(here, PATHS["completion"], body, **packed))[0] == 200
            bomb = gzip.compress(b" " * 100_000_000)
            status, answer = await post(here, PATHS["completion"], bomb, **packed)
            assert (status, answer["error"]["code"]) == (413, "too_large")

    asyncio.run(run())


def test_a_body_that_is_not_packed_as_it_says_is_the_clients_fault(
    tokenizer_folder: Path,
) -> None:
    async def run() -> None:
        packed = {"Content-Encoding": "gzip"}
        async with routed(tokenizer_folder) as here:
            status, answer = await post(here, PATHS["completion"], b"no gzip", **packed)
        assert (status, answer["error"]["code"]) == (400, "invalid_body")

    asyncio.run(run())


def test_an_evaluation_finds_the_served_bundle_and_no_other(tokenizer_folder: Path) -> None:
    bundle = fake_bundle(tokenizer_folder)
    other = replace(bundle, digest="0" * 64)

    async def run() -> None:
        async with routed(tokenizer_folder, prefill=1, decode=1) as here:
            address = RouterAddress(here.url)
            await asyncio.to_thread(require_router, address, bundle, list(TASKS))
            with pytest.raises(ConfigError) as refused:
                await asyncio.to_thread(require_router, address, other, list(TASKS))
        for task in TASKS:
            assert f"- {task}: bundle {bundle.digest}" in str(refused.value)
        assert f"bundle {other.digest}:" in str(refused.value)

    asyncio.run(run())


def test_the_description_tells_every_path(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with (
            routed(tokenizer_folder) as here,
            here.session.get(f"{here.url}/openapi.json") as response,
        ):
            document = await response.json()
            told = [
                (method, path.format(task="math", name="decode-0"))
                for path, operations in document["paths"].items()
                for method in operations
            ]
            for method, path in told:
                async with here.session.request(method, f"{here.url}{path}") as answer:
                    # Refused for what it lacks, not because it is not there.
                    assert answer.status in (200, 400, 403), path
            assert ("post", "/v1/completions") in told
        for schema in document["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)
        assert "math, tools" in document["info"]["description"]

    asyncio.run(run())
