"""Tools by OpenAI's own client: shown to the model, called whole and streamed, and gone on from."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.openai_client import MESSAGES, asking, decoded, says

TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How it is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = ('<tool_call>\n{"name": "weather", ', '"arguments": {"city": "Bern"}}', "\n</tool_call>")


def test_tools_are_shown_and_called(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            worker = await says(here, *CALL)
            found = await client.chat.completions.create(
                model="tools", messages=MESSAGES, tools=TOOLS, tool_choice="auto"
            )
            shown = decoded(tokenizer_folder, worker.seen[-1]["prompt"])
        assert json.dumps(TOOLS[0]) in shown
        (choice,) = found.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Bern"}

    asyncio.run(run())


def test_tools_are_called_in_a_stream(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            await says(here, *CALL)
            # The client's own accumulation, which is strict about indices and roles.
            async with client.chat.completions.stream(
                model="tools", messages=MESSAGES, tools=TOOLS
            ) as stream:
                events = [event.type async for event in stream]
                found = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in events
        assert {"content.delta", "content.done"}.isdisjoint(events)
        assert found.choices[0].finish_reason == "tool_calls"
        (call,) = found.choices[0].message.tool_calls or []
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Bern"}

    asyncio.run(run())


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_text_stays_text_beside_tools(tokenizer_folder: Path, choice: Any) -> None:
    async def run() -> None:
        texts = CALL if choice == "none" else ("It", " is", " warm.")
        async with asking(tokenizer_folder) as (here, client):
            worker = await says(here, *texts)
            arguments: Any = {
                "model": "tools",
                "messages": MESSAGES,
                "tools": TOOLS,
                "tool_choice": choice,
            }
            whole = await client.chat.completions.create(**arguments)
            stream = await client.chat.completions.create(**arguments, stream=True)
            deltas = [chunk.choices[0].delta async for chunk in stream]
            shown = decoded(tokenizer_folder, worker.seen[-1]["prompt"])
        assert whole.choices[0].message.content == "".join(texts)
        assert whole.choices[0].finish_reason == "stop"
        assert [delta.content for delta in deltas] == list(texts)
        assert ("weather" in shown) == (choice == "auto")

    asyncio.run(run())


def test_a_call_and_its_result_go_on_as_a_chat(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with asking(tokenizer_folder) as (here, client):
            worker = await says(here, *CALL)
            found = await client.chat.completions.create(
                model="tools", messages=MESSAGES, tools=TOOLS
            )
            message = found.choices[0].message
            assert message.tool_calls is not None
            shown = []
            # As people send it back: the object itself, and all its fields, most of them null.
            for again in (message, message.model_dump()):
                arguments: Any = [
                    *MESSAGES,
                    again,
                    {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "warm"},
                ]
                await client.chat.completions.create(model="tools", messages=arguments, tools=TOOLS)
                shown.append(decoded(tokenizer_folder, worker.seen[-1]["prompt"]))
        assert shown[0] == shown[1]
        # Values, not text in quotes: as the model itself had written it.
        assert (
            '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>' in shown[0]
        )
        assert "<|im_start|>tool\nwarm<|im_end|>" in shown[0]

    asyncio.run(run())


def test_a_developers_message_is_not_left_out(tokenizer_folder: Path) -> None:
    async def run() -> None:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "developer", "content": "Be brief."},
            *MESSAGES,
        ]
        async with asking(tokenizer_folder) as (here, client):
            await client.chat.completions.create(model="math", messages=messages, max_tokens=1)
            shown = decoded(tokenizer_folder, here.workers["decode-0"].seen[-1]["prompt"])
        assert "<|im_start|>system\nBe brief.<|im_end|>" in shown

    asyncio.run(run())
