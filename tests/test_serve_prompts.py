"""Prompts: chats and text become the tokens that tuning makes of them, or are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qsun.serve.prompts import Prompts
from qsun.serve.refusals import Refusal
from qsun.serve.requests import ChatRequest
from tests.asking import CHAT, COMPLETION, PATHS, post
from tests.builders import CHAT_TEMPLATE
from tests.routing import VOCABULARY, brief, routed
from tests.serving_tokenizer import TOOL_TEMPLATE, serving_tokenizer

TOOL = {"type": "function", "function": {"name": "weather"}}
# As some models' do: it looks into every function's parameters.
CURIOUS_TEMPLATE = TOOL_TEMPLATE.replace(
    "{{ tool | tojson }}", "{{ tool.function.parameters.properties.items() | list }}"
)
DEVELOPER_TEMPLATE = TOOL_TEMPLATE.replace("('system',", "('system', 'developer',")


def prompts(folder: Path, template: str | None) -> Prompts:
    return Prompts(serving_tokenizer(folder, template), VOCABULARY)


def chat(**changes: Any) -> ChatRequest:
    return ChatRequest.model_validate({**CHAT, **changes})


def refused(made: Prompts, request: ChatRequest) -> Refusal:
    with pytest.raises(Refusal) as caught:
        made.chat(request)
    assert caught.value.status == 400
    return caught.value


def text(made: Prompts, request: ChatRequest) -> str:
    return str(made._tokenizer.decode(made.chat(request)))


def test_without_a_template_there_are_no_chats(tmp_path: Path) -> None:
    made = prompts(tmp_path, None)
    assert (made.takes_chats, made.takes_tools) == (False, False)
    refusal = refused(made, chat())
    assert refusal.code == "no_chat_template"
    assert "use /v1/completions" in str(refusal)


def test_a_template_without_a_place_for_tools_is_not_given_any(tmp_path: Path) -> None:
    made = prompts(tmp_path, CHAT_TEMPLATE)
    assert (made.takes_chats, made.takes_tools) == (True, False)
    assert refused(made, chat(tools=[TOOL])).code == "no_tools"
    assert made.chat(chat(tools=[TOOL], tool_choice="none")) == made.chat(chat())


def test_a_template_that_looks_into_functions_has_a_place_for_them(tmp_path: Path) -> None:
    made = prompts(tmp_path, CURIOUS_TEMPLATE)
    assert made.takes_tools
    parameters = {"type": "object", "properties": {"city": {}}}
    function = {"name": "weather", "parameters": parameters}
    assert "city" in text(made, chat(tools=[{"type": "function", "function": function}]))
    assert refused(made, chat(tools=[TOOL])).code == "chat_template"


def test_a_template_that_knows_developers_keeps_them(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]
    made = prompts(tmp_path / "knows", DEVELOPER_TEMPLATE)
    assert "<|im_start|>developer\nBe brief." in text(made, chat(messages=messages))
    made = prompts(tmp_path / "does-not", TOOL_TEMPLATE)
    assert "<|im_start|>system\nBe brief." in text(made, chat(messages=messages))


def test_a_call_that_is_no_json_is_shown_as_it_was(tmp_path: Path) -> None:
    made = prompts(tmp_path, TOOL_TEMPLATE)
    for arguments, shown in (("{", '"{"'), ("", "{}"), ('{"a": 1}', '{"a": 1}')):
        call = {"id": "1", "function": {"name": "weather", "arguments": arguments}}
        messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]
        assert f'"arguments": {shown}}}' in text(made, chat(messages=messages))


def test_long_prompts_beside_each_other_are_not_mixed_up(tokenizer_folder: Path) -> None:
    """Long bodies are tokenized in threads, with one tokenizer."""

    async def run() -> None:
        async with routed(tokenizer_folder, brief(queue_s=10), prefill=1, decode=1) as here:
            # Spaces keep a body long and its prompt within the context.
            bodies = [
                {**COMPLETION, "prompt": f"Ada {number}", "user": " " * 20_000, "max_tokens": 1}
                for number in range(40)
            ]
            alone = [await post(here, PATHS["completion"], body) for body in bodies]
            asked = (post(here, PATHS["completion"], body) for body in bodies)
            together = await asyncio.gather(*asked)
        texts = [answer["choices"][0]["text"] for _, answer in alone]
        assert len(set(texts)) == len(bodies)
        assert [answer["choices"][0]["text"] for _, answer in together] == texts

    asyncio.run(run())
