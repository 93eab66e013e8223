"""One request as a client sees it: when it was sent, and when each of its tokens came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
import orjson

from qsun.workload import Request

DATA, DONE = b"data: ", b"data: [DONE]"
# Tokens that every vocabulary has and no tokenizer keeps for itself; prompts are drawn from them.
FIRST_TOKEN, DRAWN_TOKENS = 100, 200


@dataclass
class Answer:
    """A request and what came of it; times in seconds from the run's start.

    `token_s` has one entry for each token; `failure` says in a word or two why one has fewer than
    asked for.
    """

    request: Request
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    failure: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; none where there is but one."""
        later = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / later if later else None


class Client:
    """Asks one router. `clock` says how long the run has gone on; `seed` draws the prompts."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, clock: Callable[[], float], seed: int
    ) -> None:
        self._session, self._url, self._clock = session, f"{url}/v1/completions", clock
        self._dice = Random(seed)

    async def ask(self, request: Request) -> Answer:
        """Send a request now and follow its answer to the end, whatever that is."""
        answer = Answer(request)
        body = orjson.dumps(self._body(request))
        answer.sent_s = self._clock()
        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status == 200:
                    answer.failure = await self._follow(response.content, answer)
                else:
                    answer.failure = f"status {response.status}"
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            answer.failure = type(error).__name__
        answer.ended_s = self._clock()
        if answer.failure is None and len(answer.token_s) != request.output_tokens:
            answer.failure = "too few tokens"
        return answer

    async def _follow(self, stream: aiohttp.StreamReader, answer: Answer) -> str | None:
        """Time an answer's tokens; why it broke off, if it did."""
        begun = b""
        while block := await stream.readany():
            now = self._clock()
            *lines, begun = (begun + block).split(b"\n")
            for line in lines:
                if line.startswith(DONE):
                    return None
                if not line.startswith(DATA):
                    continue
                event = orjson.loads(line[len(DATA) :])
                if "error" in event:
                    return f"error event {event['error'].get('code', '')}".strip()
                for choice in event["choices"]:
                    answer.token_s += [now] * len(choice.get("token_ids") or ())
        return "cut off"

    def _body(self, request: Request) -> dict[str, Any]:
        drawn = self._dice.choices(range(DRAWN_TOKENS), k=request.prompt_tokens)
        return {
            "model": request.task,
            "prompt": [FIRST_TOKEN + token for token in drawn],
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
