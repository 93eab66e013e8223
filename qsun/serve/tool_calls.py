"""Function calls out of an answer's text, in the forms that chat templates teach models."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

import orjson

# Hermes and Qwen: each call in a tag of its own. SmolLM2: one list in a tag.
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
# What an answer that is a call begins with: a tag, a JSON list, a JSON object (Llama 3).
BEGINNINGS = ("<tool_call>", "[", "{", "<|python_tag|>")
ARGUMENTS = ("arguments", "parameters")


def may_be_call(text: str) -> bool:
    """Whether what has come so far could still become a call."""
    begun = text.lstrip()
    return any(begun.startswith(one) or one.startswith(begun) for one in BEGINNINGS)


def parse_calls(text: str, functions: Collection[str]) -> list[dict[str, Any]] | None:
    """The calls that a whole answer makes, as OpenAI's `tool_calls`; None where it makes none.

    Everything in it must be a call of one of `functions`: else it is text, and stays it.
    """
    stripped = text.strip().removeprefix("<|python_tag|>")
    bodies = TAGGED.findall(stripped) or [stripped]
    if TAGGED.sub("", stripped).strip() and TAGGED.search(stripped):
        return None
    calls = [call for body in bodies for call in _calls(body)]
    if not calls or not all(_is_call(call, functions) for call in calls):
        return None
    return [_as_openai(call) for call in calls]


def _calls(body: str) -> list[Any]:
    try:
        # Python's parser takes what no other one does: NaN, half a character, lists without end.
        orjson.loads(body)
        value = json.loads(body)
    except (ValueError, RecursionError):
        return [None]
    return value if isinstance(value, list) else [value]


def _is_call(call: Any, functions: Collection[str]) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and call["name"] in functions
        and isinstance(_arguments(call), dict)
    )


def _arguments(call: dict[str, Any]) -> Any:
    return next((call[key] for key in ARGUMENTS if key in call), {})


def _as_openai(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(_arguments(call), ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
