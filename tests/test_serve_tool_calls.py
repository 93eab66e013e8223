"""Calls in an answer's text: the forms that models are taught, and all that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun.disaggregation import WrittenAs
from qsun.serve.answers import ChatForm
from qsun.serve.asked import Asked, Piece
from qsun.serve.requests import ChatRequest
from qsun.serve.tool_calls import may_be_call, parse_calls

FUNCTIONS = {"weather", "time.now"}
WEATHER = '{"name": "weather", "arguments": {"city": "Zürich"}}'
TIME = '{"name": "time.now", "arguments": {}}'


def called(text: str) -> list[tuple[str, Any]] | None:
    """Names and arguments of the calls that an answer makes."""
    calls = parse_calls(text, FUNCTIONS)
    if calls is None:
        return None
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    functions = [call["function"] for call in calls]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{WEATHER}\n</tool_call>",  # Hermes, Qwen
        f"\n <tool_call>{WEATHER}</tool_call>\n",
        f"<tool_call>{WEATHER}",  # the closing tag was the stop
        f"<tool_call>[{WEATHER}]</tool_call>",  # SmolLM2
        f"[{WEATHER}]",
        WEATHER,
        WEATHER.replace("arguments", "parameters"),  # Llama 3
        f"<|python_tag|>{WEATHER.replace('arguments', 'parameters')}",
    ],
)
def test_a_call_in_every_form(text: str) -> None:
    assert called(text) == [("weather", {"city": "Zürich"})]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>",
        f"<tool_call>{WEATHER}</tool_call><tool_call>{TIME}",
        f"<tool_call>[{WEATHER}, {TIME}]</tool_call>",
        f"[{WEATHER},\n {TIME}]",
    ],
)
def test_several_calls_keep_their_order(text: str) -> None:
    assert called(text) == [("weather", {"city": "Zürich"}), ("time.now", {})]


def test_a_call_without_arguments_has_none() -> None:
    assert called('{"name": "time.now"}') == [("time.now", {})]


def test_large_numbers_stay_what_they_are() -> None:
    number = 12345678901234567890123
    assert called(f'{{"name": "weather", "arguments": {{"id": {number}}}}}') == [
        ("weather", {"id": number})
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "It is warm.", "[]", "{}", "[1, 2]", "null", "3", "<tool_call></tool_call>"),
        f"I would call {WEATHER}",
        f"Let me see. <tool_call>{WEATHER}</tool_call>",
        f"<tool_call>{WEATHER}</tool_call> Done.",
        f"<tool_call>{WEATHER}</tool_call> and <tool_call>{TIME}</tool_call>",
        WEATHER.replace("weather", "rm"),
        f"[{WEATHER}, {WEATHER.replace('weather', 'rm')}]",
        f"[{WEATHER}, 3]",
        WEATHER[:-1],
        f"<tool_call>{WEATHER[:-2]}</tool_call>",
        f"{WEATHER}{TIME}",
        '{"name": "weather", "arguments": "{}"}',
        '{"name": "weather", "arguments": null}',
        '{"name": ["weather"], "arguments": {}}',
        '{"name": {"weather": 1}, "arguments": {}}',
        '{"name": null}',
        '{"arguments": {"city": "Zürich"}}',
        # What Python's parser takes, and no client could read.
        '{"name": "weather", "arguments": {"degrees": NaN}}',
        '{"name": "weather", "arguments": {"degrees": -Infinity}}',
        '{"name": "weather", "arguments": {"city": "\\ud800"}}',
        "[" * 5000,
        f"{'[' * 1010}{']' * 1010}",
        f'{{"name": "weather", "arguments": {"[" * 5000}',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert called(text) is None


@pytest.mark.parametrize("text", ["", " \n", "<", "<tool", "[", "{", "<|py", "<tool_call>x", "{a"])
def test_what_may_become_a_call_is_held_back(text: str) -> None:
    assert may_be_call(text)


@pytest.mark.parametrize("text", ["I", "<b>", "<toolcall>", " 3", "(", '"', "<|im_end|>"])
def test_what_cannot_is_not(text: str) -> None:
    assert not may_be_call(text)


PARTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "[",
            "]",
            ",",
            "{",
            "}",
            "\n",
            " ",
            "Sure",
        ),
        *(WEATHER, TIME, WEATHER[:20], WEATHER[20:], WEATHER.replace("weather", "rm"), "<", "é"),
    ]
)


@settings(derandomize=True, max_examples=400)
@given(
    parts=st.lists(PARTS, max_size=6).map("".join),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    reason=st.sampled_from(["stop", "length"]),
)
def test_a_stream_says_what_the_whole_answer_says(parts: str, cuts: list[int], reason: str) -> None:
    texts: list[str] = []
    rest = parts
    while rest:
        size = cuts[len(texts) % len(cuts)]
        texts, rest = [*texts, rest[:size]], rest[size:]
    texts = texts or [""]
    pieces = [Piece(text, [1]) for text in texts[:-1]] + [
        Piece(texts[-1], [1], finish_reason=reason)
    ]
    whole = form().whole(pieces)["choices"][0]
    streaming = form()
    events = [event for piece in pieces for event in streaming.events(piece)]
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if "tool_calls" in whole["message"]:
        assert whole["message"]["content"] is None
        assert text == ""
        assert [call["index"] for call in calls] == list(range(len(calls)))
        expected = [call["function"] for call in whole["message"]["tool_calls"]]
        assert [call["function"] for call in calls] == expected
        assert whole["finish_reason"] == "tool_calls"
    else:
        assert calls == []
        assert text == whole["message"]["content"] == parts
        assert whole["finish_reason"] == reason


def form() -> ChatForm:
    tools = [{"type": "function", "function": {"name": name}} for name in sorted(FUNCTIONS)]
    request = ChatRequest.model_validate(
        {"model": "tools", "messages": [{"role": "user", "content": "?"}], "tools": tools}
    )
    return ChatForm(Asked(WrittenAs("tools", "0" * 64), [1, 2], 8, "salt"), request)
