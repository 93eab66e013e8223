"""Intake: a request's body, checked, tokenized once, and put as the router works on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from qsun.bundle import Bundle
from qsun.disaggregation import WrittenAs
from qsun.serve.asked import Asked
from qsun.serve.prompts import Prompts
from qsun.serve.refusals import Refusal, bad_request
from qsun.serve.requests import REFUSED, ChatRequest, CompletionRequest, Sampling, given

Model = TypeVar("Model", bound=BaseModel)
LONG_BODY = 16_384  # bytes that are tokenized beside other requests, not between them
SHOWN_PROBLEMS = 10


class Intake:
    """What comes in for a bundle's tasks. `salts` keep each task's caches apart."""

    def __init__(self, bundle: Bundle, salts: Mapping[str, str], prompts: Prompts) -> None:
        self._bundle, self._salts, self._prompts = bundle, salts, prompts
        self._longest = bundle.manifest.max_tokens

    async def completion(self, body: bytes) -> tuple[CompletionRequest, Asked]:
        """`POST /v1/completions`.

        Raises:
            Refusal: it cannot be answered; names every field that is wrong.
        """
        request = checked(CompletionRequest, body)
        prompt = await self._tokens(self._prompts.completion, request, body)
        return request, self._asked(request, prompt, request.max_tokens, request.logprobs)

    async def chat(self, body: bytes) -> tuple[ChatRequest, Asked]:
        """`POST /v1/chat/completions`.

        Raises:
            Refusal: it cannot be answered; names every field that is wrong.
        """
        request = checked(ChatRequest, body)
        if request.top_logprobs and not request.logprobs:
            raise bad_request("invalid_value", "top_logprobs needs logprobs", "top_logprobs")
        prompt = await self._tokens(self._prompts.chat, request, body)
        left = max(self._longest - len(prompt), 1)
        most = request.max_completion_tokens or request.max_tokens or left
        scores = (request.top_logprobs or 0) if request.logprobs else None
        return request, self._asked(request, prompt, most, scores)

    async def _tokens(
        self, tokenize: Callable[[Model], list[int]], request: Model, body: bytes
    ) -> list[int]:
        if len(body) > LONG_BODY:
            return await asyncio.to_thread(tokenize, request)
        return tokenize(request)

    def _asked(
        self, request: Sampling, prompt: list[int], max_tokens: int, logprobs: int | None
    ) -> Asked:
        task = request.model
        if task not in self._salts:
            message = f"no task {task!r}: there are {', '.join(sorted(self._salts))}"
            raise Refusal(404, "model_not_found", message, parameter="model")
        if len(prompt) < 2:
            message = "a prompt needs two tokens: the last is the decode module's to read"
            raise bad_request("prompt_too_short", message, "prompt")
        if len(prompt) + max_tokens > self._longest:
            message = (
                f"a prompt of {len(prompt)} tokens and an answer of {max_tokens}: "
                f"together at most {self._longest}"
            )
            raise bad_request("context_length_exceeded", message, "max_tokens")
        if (request.min_tokens or 0) > max_tokens:
            message = f"min_tokens {request.min_tokens} is more than the {max_tokens} allowed"
            raise bad_request("invalid_value", message, "min_tokens")
        written = WrittenAs(task, self._bundle.digest)
        return Asked(written, prompt, max_tokens, self._salts[task], request.sampling(), logprobs)


def checked(kind: type[Model], body: bytes) -> Model:
    """A body as the model that describes it.

    Raises:
        Refusal: no JSON object, or fields that are wrong, unknown or never served; names them.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request("invalid_json", f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad_request("invalid_json", "the body is no JSON object")
    fields = given(value)
    refused = [key for key in REFUSED if fields.get(key, False) is not False]
    if refused:
        reasons = "; ".join(f"{key}: {REFUSED[key]}" for key in refused)
        raise bad_request("unsupported", f"not served here: {reasons}", refused[0])
    try:
        return kind.model_validate({key: fields[key] for key in fields if key not in REFUSED})
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> Refusal:
    """Every field that is wrong, by its path."""
    errors = error.errors(include_url=False, include_input=False)
    problems = [
        f"{'.'.join(str(part) for part in one['loc']) or 'body'}: {one['msg']}" for one in errors
    ]
    message = "; ".join(problems[:SHOWN_PROBLEMS])
    place = errors[0]["loc"]
    return bad_request("invalid_value", message, str(place[0]) if place else None)
