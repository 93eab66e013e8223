"""One request as the router works on it, and the pieces of its answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qsun.disaggregation import WrittenAs


@dataclass(frozen=True)
class Asked:
    """A prompt in tokens, and how to answer. `sampling` are fields of vLLM's completions.

    `salt` keeps the prompt's cache apart from other tasks' and other versions' of its module.
    """

    written: WrittenAs
    prompt: list[int]
    max_tokens: int
    salt: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def task(self) -> str:
        """The task that it is for."""
        return self.written.task

    @property
    def tokens(self) -> int:
        """Prompt and longest answer: what a decode worker needs room for."""
        return len(self.prompt) + self.max_tokens

    def prefill_body(self, keep: Mapping[str, Any]) -> dict[str, Any]:
        """What the prefill worker is asked: to read the prompt, and keep its cache."""
        return {
            "model": self.task,
            "prompt": self.prompt,
            "max_tokens": 1,
            "temperature": 0,
            "cache_salt": self.salt,
            "return_token_ids": True,
            "kv_transfer_params": keep,
        }

    def decode_body(self, model: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the decode worker is asked: to fetch that cache and go on."""
        logprobs = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {
            **self.sampling,
            **logprobs,
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "cache_salt": self.salt,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "kv_transfer_params": parameters,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a decode worker's stream adds to an answer."""

    text: str
    token_ids: list[int]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


@dataclass
class Timeline:
    """When things happened to one request, by this router's clock, in seconds."""

    received: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    prefilled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    generated: int = 0
    attempts: int = 0
