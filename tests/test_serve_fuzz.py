"""Whatever is sent: never a status 500 or a hang, and always an answer or OpenAI's error object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qsun.serve.keys import read_keys
from qsun.serve.openapi import REFERENCE, openapi
from qsun.serve.requests import REFUSED
from qsun.serve.requests import given as what_is_given
from tests.asked_anything import Target, answer_of
from tests.asking import CHAT, COMPLETION
from tests.described import described
from tests.routing import TASKS, VOCABULARY, brief, routed

KEY = "a-key-for-administrators"
ADMIN = {"Authorization": f"Bearer {KEY}"}
PATHS = {"CompletionRequest": "/v1/completions", "ChatRequest": "/v1/chat/completions"}
KINDS = st.sampled_from(sorted(PATHS))
# What a request may be refused for although it is as described.
BEYOND_THE_SCHEMA = {"chat_template", "context_length_exceeded", "invalid_value"}


def often(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# The router's own description, as it gives it away.
DEFINITIONS = openapi("fuzz", list(TASKS))["components"]["schemas"]
AS_DESCRIBED = {kind: described(DEFINITIONS[kind], DEFINITIONS) for kind in (*PATHS, "AddWorker")}
VALIDATORS = {
    kind: Draft202012Validator(
        {"$ref": REFERENCE.format(model=kind), "components": {"schemas": DEFINITIONS}}
    )
    for kind in PATHS
}
# What lets a request be answered, beyond its schema: a task, tokens that there are, room.
SENSIBLE = {
    "CompletionRequest": st.fixed_dictionaries(
        {
            "model": st.sampled_from(TASKS),
            "prompt": st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=20)
            | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
            "max_tokens": st.integers(1, 6),
            "min_tokens": st.none() | st.just(1),
        }
    ),
    "ChatRequest": st.fixed_dictionaries(
        {
            "model": st.sampled_from(TASKS),
            "max_tokens": st.integers(1, 6),
            "max_completion_tokens": st.none() | st.integers(1, 6),
            "min_tokens": st.none() | st.just(1),
        }
    ),
}
TEXTS = st.sampled_from(["", "x", "\x00", "\ud800", "\U0001f642", "x" * 3000, "<|im_end|>", "1"])
NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 3.5, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
        *(2**31, 2**63, -(2**63) - 1, 2**64, 10**40, True, False),
    ]
)
JUNK = st.recursive(
    st.none() | TEXTS | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
DEEP = st.sampled_from([50, 500, 1500]).map(lambda depth: "[" * depth + "]" * depth)
FIELDS = st.sampled_from(
    [
        *(
            "model",
            "prompt",
            "messages",
            "max_tokens",
            "tools",
            "stop",
            "logit_bias",
            "n",
            "stream",
        ),
        *("logprobs", "top_logprobs", "stream_options", "response_format", "functions", "", "\x00"),
        *(*REFUSED, "x" * 5000),
    ]
)


@pytest.fixture(scope="module")
def target(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"ada {KEY}\n")
    # Looks are far apart, for the loop stands still between requests.
    limits = brief(look_s=0.5, lost_looks=1000, prefill_s=5.0, first_token_s=5.0, stall_s=5.0)
    with asyncio.Runner() as runner:
        routing = routed(tokenizer_folder, limits, prefill=1, decode=1, admin_keys=read_keys(path))
        made = Target(runner, runner.run(routing.__aenter__()))
        for worker in made.routed.workers.values():
            worker.keep_seen = False
        yield made
        runner.run(routing.__aexit__(None, None, None))


@often(400)
@given(data=st.data(), kind=KINDS)
def test_what_is_as_described_is_answered(target: Target, data: st.DataObject, kind: str) -> None:
    body = data.draw(AS_DESCRIBED[kind]) | data.draw(SENSIBLE[kind])
    status, said = target.ask("POST", PATHS[kind], json.dumps(body).encode())
    if status == 200:
        answer_of(said)
    else:
        assert status == 400
        assert said["code"] in BEYOND_THE_SCHEMA, said
        # A description that promises more than there is would be no description.
        if said["code"] == "invalid_value":
            assert said["message"] == "top_logprobs needs logprobs"


@often(60)
@given(data=st.data(), kind=KINDS)
def test_what_is_as_described_but_senseless_is_refused(
    target: Target, data: st.DataObject, kind: str
) -> None:
    body = data.draw(AS_DESCRIBED[kind])
    status, said = target.ask("POST", PATHS[kind], json.dumps(body).encode())
    assert status in (400, 404)
    assert said["code"] != "invalid_json"


def mutate(data: st.DataObject, body: Any) -> Any:
    """Something in it replaced, added or taken away."""
    where = body
    while isinstance(where, dict | list) and where:
        keys = sorted(where) if isinstance(where, dict) else range(len(where))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(where[key], dict | list) or data.draw(st.booleans()):
            break
        where = where[key]
    if not isinstance(where, dict | list) or not where:
        return body
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "replace":
        where[key] = data.draw(JUNK)
    elif kind == "remove":
        del where[key]
    elif isinstance(where, dict):
        where[data.draw(FIELDS)] = data.draw(JUNK)
    else:
        where.append(data.draw(JUNK))
    return body


GOOD = {
    "CompletionRequest": [
        COMPLETION,
        {
            **COMPLETION,
            "stop": ["a", "b"],
            "logit_bias": {"5": 1},
            "stream_options": {"include_usage": True},
            "stop_token_ids": [2],
            "logprobs": 2,
            "n": 1,
            "metadata": {"a": "b"},
        },
    ],
    "ChatRequest": [
        CHAT,
        {
            **CHAT,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Ada?"}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "?", "parameters": {"type": "object"}},
                }
            ],
            "stream": True,
        },
    ],
}


@often(1500)
@given(data=st.data(), kind=KINDS)
def test_what_is_not_as_described_is_refused(
    target: Target, data: st.DataObject, kind: str
) -> None:
    body = deepcopy(data.draw(st.sampled_from(GOOD[kind])))
    for _ in range(data.draw(st.integers(1, 3))):
        body = mutate(data, body)
    status, said = target.ask("POST", PATHS[kind], json.dumps(body).encode())
    if status == 200:
        answer_of(said)
        assert VALIDATORS[kind].is_valid(without_nulls(body)), body
    else:
        assert status in (400, 404)


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """What the router takes a body for: what says nothing is not there."""
    body = {
        key: value
        for key, value in what_is_given(body).items()
        if value is not False or key not in REFUSED
    }
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [
            what_is_given(one) if isinstance(one, dict) else one for one in messages
        ]
    return body


@often(150)
@given(
    kind=KINDS,
    body=st.binary(max_size=200)
    | JUNK.map(lambda value: json.dumps(value).encode())
    | DEEP.map(lambda deep: f'{{"model": "math", "prompt": [1, 2], "metadata": {deep}}}'.encode())
    | DEEP.map(lambda deep: deep.encode()),
)
def test_what_is_no_request_is_refused(target: Target, kind: str, body: bytes) -> None:
    status, _ = target.ask("POST", PATHS[kind], body)
    assert status == 400


@often(40)
@given(depth=st.integers(1, 1200))
def test_deep_schemas_of_tools_do_no_harm(target: Target, depth: int) -> None:
    deep = '{"a": ' * depth + "1" + "}" * depth
    body = json.dumps({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]})
    body = body.replace('{"name": "f"}', f'{{"name": "f", "parameters": {deep}}}')
    status, said = target.ask("POST", PATHS["ChatRequest"], body.encode())
    assert (status, said.get("code")) in (
        *((200, None), (400, "chat_template"), (400, "invalid_json")),
        (400, "context_length_exceeded"),
    )


SEGMENTS = st.sampled_from(
    [
        *("v1", "completions", "chat", "models", "math", "admin", "workers", "decode-0", "drain"),
        *("health", "ready", "metrics", "openapi.json", "..", ".", "", "%2e%2e", "%00", "%ff", "*"),
    ]
) | st.text(max_size=6).map(lambda text: quote(text.encode(errors="replace")))
HEADER_VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30).filter(
    lambda text: text == text.strip() and "\x7f" not in text
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *(
                "Authorization",
                "Content-Type",
                "Accept",
                "Accept-Encoding",
                "X-Request-Id",
                "Cookie",
            ),
            *("Origin", "Range", "If-None-Match", "OpenAI-Organization", "Idempotency-Key"),
        ]
    ),
    HEADER_VALUES | HEADER_VALUES.map(lambda text: f"Bearer {text}"),
    max_size=3,
)
METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])


@often(600)
@given(
    method=METHODS,
    path=st.lists(SEGMENTS, max_size=5).map(lambda parts: "/" + "/".join(parts)),
    query=st.sampled_from(["", "?", "?a=%ff", "?stream=true"]),
    headers=HEADERS,
    body=st.sampled_from([b"", b"{}", json.dumps(COMPLETION).encode()]),
)
def test_other_methods_paths_and_headers_do_no_harm(
    target: Target, method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> None:
    status, said = target.ask(method, path + query, body, headers)
    assert status in (200, 400, 401, 404, 405)
    if status == 200 and method == "POST":
        answer_of(said)


# What the description's pattern lets through, and leads nowhere.
NOWHERE = st.sampled_from(
    [
        *("http://127.0.0.1:9", "http://127.0.0.1:99999", "http://[::1"),
        *("http://[", "http://]", "http://:80", "http://-", "http://[::1]:x", "http://:"),
        *("http://[1.2.3.4]:9", "http://127.0.0.1:-1"),
    ]
)


@often(40)
@given(body=AS_DESCRIBED["AddWorker"], url=NOWHERE, tasks=st.lists(st.sampled_from(TASKS)))
def test_any_worker_that_is_taken_can_be_drained(
    target: Target, body: dict[str, Any], url: str, tasks: list[str]
) -> None:
    body |= {"url": url, **({"tasks": tasks} if tasks else {})}
    status, said = target.ask("POST", "/admin/workers", json.dumps(body).encode(), ADMIN)
    if status != 201:
        assert status in (400, 409)
        return
    target.runner.run(asyncio.sleep(0.01))  # It is looked at, in vain.
    path = f"/admin/workers/{said['name']}/drain"
    assert target.ask("POST", path, headers=ADMIN)[0] == 200


def test_nothing_is_left_of_all_this(target: Target) -> None:
    assert target.runner.run(target.left()) == set()
    status, said = target.ask("POST", PATHS["CompletionRequest"], json.dumps(COMPLETION).encode())
    assert status == 200
    answer_of(said)
