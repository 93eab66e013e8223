"""OpenAI's own client on a router over fake workers, and what can be told of what it asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from transformers import AutoTokenizer

from qsun.chats import encode_prompts
from qsun.sources import SourceDefinition
from tests.fake_workers import answer_token
from tests.routing import Routed, routed
from tests.scripted_worker import ScriptedWorker

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Ada has 2 apples."}]


@asynccontextmanager
async def asking(tokenizer: Path, **how: Any) -> AsyncIterator[tuple[Routed, AsyncOpenAI]]:
    """A router and OpenAI's client, which must not ask again by itself."""
    async with (
        routed(tokenizer, decode=1, **how) as here,
        AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield here, client


async def says(here: Routed, *texts: str, ending: str = "stop") -> ScriptedWorker:
    """Put a decode worker that says just this in the other one's place."""
    digest = here.workers["decode-0"].bundle
    worker = ScriptedWorker("decode", digest, texts=texts, ending=ending)
    await here.kill("decode-0")
    await here.revive("decode-0", worker)
    return worker


def answer(task: str, prompt: list[int], count: int) -> str:
    """What the fake workers say when the right one has read the whole prompt."""
    return "".join(answer_token(task, prompt, place) for place in range(count))


def chat_tokens(tokenizer: Path, messages: list[Any]) -> list[int]:
    """A chat's tokens as tuning makes them."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    source = SourceDefinition(name="chats", kind="jsonl", messages="messages")
    return encode_prompts([(messages, source)], loaded)[0]


def decoded(tokenizer: Path, tokens: list[int]) -> str:
    """The text of a prompt, as a worker was sent it."""
    return str(AutoTokenizer.from_pretrained(tokenizer).decode(tokens))
