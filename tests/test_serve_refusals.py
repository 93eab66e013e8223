"""Refusals: every mistake in a request is told with its status, code, field and reason."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.asking import CHAT, COMPLETION, PATHS, post
from tests.routing import MAX_TOKENS, VOCABULARY, brief, routed

ABSENT = object()

# What is changed in a good request, and the status, code, parameter and words of the refusal.
Case = tuple[dict[str, Any], int, str, str | None, str]


def invalid(field: str, value: Any, words: str) -> Case:
    return {field: value}, 400, "invalid_value", field, words


def unsupported(field: str, value: Any, words: str) -> Case:
    return {field: value}, 400, "unsupported", field, f"not served here: {field}: {words}"


BOTH: list[Case] = [
    ({"model": "poems"}, 404, "model_not_found", "model", "no task 'poems': there are math, tools"),
    invalid("model", ABSENT, "model: Field required"),
    invalid("model", 3, "model: Input should be a valid string"),
    invalid("model", "", "model: String should have at least 1 character"),
    invalid("max_tokens", 0, "max_tokens: Input should be greater than or equal to 1"),
    invalid("max_tokens", "5", "max_tokens: Input should be a valid integer"),
    invalid("max_tokens", True, "max_tokens: Input should be a valid integer"),
    invalid("temperature", 2.5, "temperature: Input should be less than or equal to 2"),
    invalid("temperature", True, "temperature: Input should be a valid number"),
    invalid("top_p", 0, "top_p: Input should be greater than 0"),
    invalid("top_k", -1, "top_k: Input should be greater than or equal to 0"),
    invalid("seed", 2**63, "seed: Input should be less than or equal to"),
    invalid("stream", "yes", "stream: Input should be a valid boolean"),
    invalid("stream_options", {"include_usage": True, "x": 1}, "stream_options.x: Extra inputs"),
    invalid("stop", "", "at least 1 character"),
    invalid("stop", "x" * 257, "at most 256 characters"),
    invalid("stop_token_ids", [2**31], "stop_token_ids.0: Input should be less than"),
    invalid("logit_bias", {"five": 1}, "logit_bias.five"),
    invalid("logit_bias", {"5": 101}, "logit_bias.5: Input should be less than or equal to 100"),
    invalid("min_tokens", 5, "min_tokens 5 is more than the 4 allowed"),
    invalid("n", 2, "n: Input should be less than or equal to 1"),
    invalid("temprature", 1, "temprature: Extra inputs are not permitted"),
    ({"max_tokens": MAX_TOKENS}, 400, "context_length_exceeded", "max_tokens", "at most 1024"),
    unsupported("kv_transfer_params", {}, "the router alone says where a cache lies"),
    unsupported("ec_transfer_params", {"a": 1}, "the router alone says where a cache lies"),
    unsupported("cache_salt", "math", "the router alone keeps tasks' caches apart"),
    unsupported("prompt_logprobs", 0, "the prompt is read by the prefill module"),
    unsupported("prompt_logprobs", 5, "the prompt is read by the prefill module"),
    unsupported("echo", True, "the prompt is read by the prefill module and not repeated"),
    unsupported("suffix", "end", "prefill modules read from left to right"),
    unsupported("best_of", 2, "one answer a request"),
]
COMPLETIONS: list[Case] = [
    invalid("prompt", ABSENT, "prompt: Field required"),
    invalid("prompt", [], "prompt: Field required"),
    invalid("prompt", "", "at least 1 character"),
    invalid("prompt", [-1, 2], "greater than or equal to 0"),
    invalid("prompt", [True, 2], "valid integer"),
    invalid("prompt", ["a", "b"], "valid integer"),
    invalid("prompt", [[1, 2], [3, 4]], "valid integer"),
    ({"prompt": [5]}, 400, "prompt_too_short", "prompt", "a prompt needs two tokens"),
    ({"prompt": [5, VOCABULARY]}, 400, "invalid_token", "prompt", f"token ids [{VOCABULARY}]"),
    invalid("logprobs", 21, "logprobs: Input should be less than or equal to 20"),
    invalid("logprobs", False, "logprobs: Input should be a valid integer"),
]
CHATS: list[Case] = [
    invalid("messages", ABSENT, "messages: Field required"),
    invalid("messages", [], "messages: Field required"),
    invalid("messages", "Hello", "messages: Input should be a valid list"),
    invalid("messages", [{"role": "robot", "content": "?"}], "messages.0.role: Input should be"),
    invalid("messages", [{"role": "user", "content": 3}], "messages.0.content"),
    invalid(
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages.0.content.list[TextPart].0.type: Input should be 'text'",
    ),
    (
        {"messages": [{"role": "tool", "content": "42"}]},
        *(400, "chat_template", "messages"),
        "the chat template refuses these messages: a result comes after a call",
    ),
    invalid("tools", [{"type": "function", "function": {"name": "a b"}}], "tools.0.function.name"),
    invalid("tool_choice", "required", "tool_choice: Input should be 'none' or 'auto'"),
    invalid("parallel_tool_calls", False, "parallel_tool_calls: Input should be True"),
    invalid("response_format", {"type": "json_object"}, "response_format: Extra inputs"),
    invalid("logprobs", 1, "logprobs: Input should be a valid boolean"),
    invalid("top_logprobs", 2, "top_logprobs needs logprobs"),
]
CASES = [
    *(("completion", case) for case in [*BOTH, *COMPLETIONS]),
    *(("chat", case) for case in [*BOTH, *CHATS]),
]
BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "no UTF-8": b'{"model": "\xff"}',
    "half a character": b'{"model": "\\ud800"}',
    "no number": b'{"model": "math", "temperature": NaN}',
    "no end": b'{"model": ' + b"[" * 100_000,
    "depth": b'{"model": ' + b"[" * 2000 + b"]" * 2000 + b"}",
}


def changed(good: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**good, **changes}.items() if value is not ABSENT}


def test_every_mistake_is_refused_with_its_field_and_reason(tokenizer_folder: Path) -> None:
    async def run() -> None:
        wrong = []
        async with routed(tokenizer_folder) as here:
            for kind, (changes, status, code, parameter, words) in CASES:
                body = changed(COMPLETION if kind == "completion" else CHAT, changes)
                found, answer = await post(here, PATHS[kind], body)
                error = answer.get("error", {})
                expected = (status, code, parameter, "invalid_request_error")
                said = (found, error.get("code"), error.get("param"), error.get("type"))
                if said != expected or words not in error["message"]:
                    wrong.append((kind, changes, answer))
            assert all(not worker.seen for worker in here.workers.values())
        assert wrong == []

    asyncio.run(run())


def test_all_mistakes_are_named_at_once(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder) as here:
            body = {**COMPLETION, "temperature": -1, "top_q": 1, "seed": "x"}
            _, answer = await post(here, PATHS["completion"], body)
            assert all(
                part in answer["error"]["message"] for part in ("temperature", "top_q", "seed")
            )
            _, answer = await post(here, PATHS["chat"], {**CHAT, "echo": True, "cache_salt": "x"})
            assert all(part in answer["error"]["message"] for part in ("echo:", "cache_salt:"))
            # However much is wrong, what is said stays readable.
            body = {**COMPLETION, **{f"{'x' * 10_000}{number}": 1 for number in range(50)}}
            _, answer = await post(here, PATHS["completion"], body)
            assert len(answer["error"]["message"]) < 3000

    asyncio.run(run())


@pytest.mark.parametrize("kind", PATHS)
def test_what_is_no_json_object_is_refused(tokenizer_folder: Path, kind: str) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder) as here:
            found = {name: await post(here, PATHS[kind], body) for name, body in BODIES.items()}
        told = {name: (status, body["error"]["code"]) for name, (status, body) in found.items()}
        assert told == dict.fromkeys(BODIES, (400, "invalid_json"))

    asyncio.run(run())


def test_what_is_null_is_as_if_it_was_not_said(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder) as here:
            unsaid = dict.fromkeys(("temperature", "stop", "n", "suffix", "cache_salt", "seed"))
            body = {**COMPLETION, **unsaid, "echo": False, "stop_token_ids": []}
            assert (await post(here, PATHS["completion"], body))[0] == 200
            assert (await post(here, PATHS["chat"], {**CHAT, **unsaid, "tools": []}))[0] == 200
            asked = [body for worker in here.workers.values() for body in worker.seen]
            assert all(
                not body.keys() & unsaid.keys() - {"temperature", "cache_salt"} for body in asked
            )

    asyncio.run(run())


def test_other_paths_methods_and_sizes_are_refused(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, brief(max_body_bytes=2048)) as here:
            for path in ("/", "/v1", "/v1/completion", "/v2/completions", "/v1/models/", "/docs"):
                status, answer = await post(here, path, COMPLETION)
                assert (status, answer["error"]["code"]) == (404, "not_found"), path
            async with here.session.get(f"{here.url}/v1/completions") as response:
                assert response.status == 405
                assert response.headers["Allow"] == "POST"
                assert (await response.json())["error"]["code"] == "method_not_allowed"
            body = {**COMPLETION, "prompt": "x" * 2048}
            status, answer = await post(here, PATHS["completion"], body)
            assert (status, answer["error"]["code"]) == (413, "too_large")
            assert "at most 2048 bytes" in answer["error"]["message"]

    asyncio.run(run())
