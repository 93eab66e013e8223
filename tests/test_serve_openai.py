"""OpenAI's own client against the router: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from transformers import AutoTokenizer

from tests.fake_workers import answer_token
from tests.openai_client import MESSAGES, answer, asking, chat_tokens, says
from tests.routing import MAX_TOKENS, brief, fake_bundle

PROMPT = [5, 6, 7]


def test_a_completion(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            found = await client.completions.create(model="math", prompt=PROMPT, max_tokens=4)
        assert (found.object, found.model) == ("text_completion", "math")
        assert found.id.startswith("cmpl-")
        (choice,) = found.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert choice.text == answer("math", PROMPT, 4)
        assert found.usage is not None
        assert found.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
            "prompt_tokens": 3,
            "completion_tokens": 4,
        }
        assert found.usage.total_tokens == 7

    asyncio.run(run())


def test_a_completion_as_a_stream(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            stream = await client.completions.create(
                model="tools",
                prompt=PROMPT,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
            )
            *chunks, last = [chunk async for chunk in stream]
        assert {chunk.model for chunk in [*chunks, last]} == {"tools"}
        assert len({chunk.id for chunk in [*chunks, last]}) == 1
        assert [chunk.choices[0].text for chunk in chunks] == [
            answer_token("tools", PROMPT, place) for place in range(4)
        ]
        # The client's types have no null here; what servers send has.
        reasons: list[Any] = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None, None, None, "length"]
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 4)

    asyncio.run(run())


def test_usage_in_a_stream_is_for_those_who_ask(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            stream = await client.completions.create(model="math", prompt=PROMPT, stream=True)
            chunks = [chunk async for chunk in stream]
        assert len(chunks) == 16  # what OpenAI's completions give where nothing is said
        assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)

    asyncio.run(run())


def test_text_is_tokenized_as_the_model_was_trained(tokenizer_folder: Path) -> None:
    async def run() -> None:
        text = "Ada has 2 apples. Zürich 🙂 <|im_end|>"
        tokens = list(AutoTokenizer.from_pretrained(tokenizer_folder)(text).input_ids)
        async with asking(tokenizer_folder) as (_, client):
            found = await client.completions.create(model="math", prompt=text, max_tokens=1)
        assert found.choices[0].text == answer("math", tokens, 1)

    asyncio.run(run())


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat(tokenizer_folder: Path, limit: str) -> None:
    async def run() -> None:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": "Be brief."},
            *MESSAGES,
            {"role": "assistant", "content": "Yes."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2?"}],
            },
        ]
        tokens = chat_tokens(
            tokenizer_folder, [*messages[:-1], {"role": "user", "content": "And 2?"}]
        )
        async with asking(tokenizer_folder) as (_, client):
            arguments: Any = {"model": "math", "messages": messages, limit: 4}
            found = await client.chat.completions.create(**arguments)
        assert (found.object, found.model) == ("chat.completion", "math")
        assert found.id.startswith("chatcmpl-")
        (choice,) = found.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == answer("math", tokens, 4)
        assert choice.message.tool_calls is None
        assert (choice.finish_reason, choice.logprobs) == ("length", None)
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(tokens), 4)

    asyncio.run(run())


def test_a_chat_without_a_limit_may_fill_the_context(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            await says(here, "Yes.")
            found = await client.chat.completions.create(model="math", messages=MESSAGES)
            asked = here.workers["decode-0"].seen[-1]
        assert found.choices[0].finish_reason == "stop"
        assert len(asked["prompt"]) + asked["max_tokens"] == 1024

    asyncio.run(run())


def test_a_chat_as_a_stream(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            stream = await client.chat.completions.create(
                model="math",
                messages=MESSAGES,
                max_tokens=3,
                stream=True,
                stream_options={"include_usage": True},
            )
            *chunks, last = [chunk async for chunk in stream]
        tokens = chat_tokens(tokenizer_folder, MESSAGES)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert [delta.role for delta in deltas] == ["assistant", None, None]
        assert "".join(delta.content or "" for delta in deltas) == answer("math", tokens, 3)
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.total_tokens == len(tokens) + 3

    asyncio.run(run())


def test_log_probabilities_of_completions(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            worker = await says(here, "a", "é")
            whole = await client.completions.create(model="math", prompt=PROMPT, logprobs=2)
            stream = await client.completions.create(
                model="math", prompt=PROMPT, logprobs=0, stream=True
            )
            chunks = [chunk async for chunk in stream]
        scores = whole.choices[0].logprobs
        assert scores is not None
        assert (scores.tokens, scores.token_logprobs) == (["a", "é"], [-9.5, -9.5])
        # As OpenAI says of completions: the chosen token comes on top of those asked for.
        assert scores.top_logprobs == [
            {"a": -9.5, "~1": -1.0, "~2": -2.0},
            {"é": -9.5, "~1": -1.0, "~2": -2.0},
        ]
        each = [chunk.choices[0].logprobs for chunk in chunks]
        assert [one.tokens if one else None for one in each] == [["a"], ["é"]]
        assert [body.get("logprobs") for body in worker.seen[-2:]] == [2, 0]

    asyncio.run(run())


def test_log_probabilities_of_chats(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            await says(here, "a", "é")
            plain = await client.chat.completions.create(
                model="math", messages=MESSAGES, logprobs=True
            )
            whole = await client.chat.completions.create(
                model="math", messages=MESSAGES, logprobs=True, top_logprobs=2
            )
            stream = await client.chat.completions.create(
                model="math", messages=MESSAGES, logprobs=True, top_logprobs=1, stream=True
            )
            chunks = [chunk async for chunk in stream]
        assert plain.choices[0].logprobs is not None
        assert [one.top_logprobs for one in plain.choices[0].logprobs.content or ()] == [[], []]
        assert whole.choices[0].logprobs is not None
        first, second = whole.choices[0].logprobs.content or []
        assert (first.token, first.logprob, first.bytes) == ("a", -9.5, [97])
        assert (second.token, second.bytes) == ("é", [0xC3, 0xA9])
        # The two likeliest, and not a third for the chosen one.
        likeliest = [(one.token, one.logprob) for one in second.top_logprobs]
        assert likeliest == [("~1", -1.0), ("~2", -2.0)]
        each = [chunk.choices[0].logprobs for chunk in chunks]
        assert [
            [len(one.top_logprobs) for one in scores.content or ()] for scores in each if scores
        ] == [[1], [1]]

    asyncio.run(run())


def test_tasks_are_models(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            models = [model async for model in client.models.list()]
            one = await client.models.retrieve("math")
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.retrieve("poems")
        assert [model.id for model in models] == ["math", "tools"]
        assert one in models
        assert (one.object, one.owned_by) == ("model", "fake")
        assert one.model_extra == {
            "max_model_len": MAX_TOKENS,
            "bundle": fake_bundle(tokenizer_folder).digest,
        }
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    asyncio.run(run())


def test_refusals_are_the_clients_own_errors(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder, limits=brief(attempts=1)) as (here, client):

            async def fails(kind: type[openai.APIStatusError], **changes: Any) -> Any:
                body = {"model": "math", "prompt": PROMPT, "max_tokens": 2, **changes}
                with pytest.raises(kind) as caught:
                    await client.completions.create(**body)
                return caught.value

            error = await fails(openai.NotFoundError, model="poems")
            assert error.code == "model_not_found"
            assert "there are math, tools" in error.message
            error = await fails(openai.BadRequestError, max_tokens=10**6)
            assert (error.code, error.param) == ("context_length_exceeded", "max_tokens")
            assert error.type == "invalid_request_error"
            here.workers["decode-0"].faults.append("500")
            error = await fails(openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "unavailable")
            assert error.type == "server_error"
            assert error.response.headers["Retry-After"] == "5"

    asyncio.run(run())


def test_an_answer_that_breaks_off_is_an_error(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            here.workers["decode-0"].faults.append("cut")
            stream = await client.completions.create(
                model="math", prompt=PROMPT, max_tokens=8, stream=True
            )
            chunks = aiter(stream)
            texts = [(await anext(chunks)).choices[0].text for _ in range(4)]
            with pytest.raises(openai.APIError, match="the rest of this answer is lost"):
                await anext(chunks)
        assert texts == [answer_token("math", PROMPT, place) for place in range(4)]

    asyncio.run(run())


def test_an_answer_tells_its_request(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (_, client):
            found = await client.completions.create(model="math", prompt=PROMPT, max_tokens=1)
        assert found._request_id is not None
        assert found.id == f"cmpl-{found._request_id}"

    asyncio.run(run())
