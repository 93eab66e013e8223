"""One request through two workers: the prefill worker reads the prompt, the decode worker answers.

What a router does, for one request at a time. It fails closed: whatever would leave the decode
worker to read the prompt by itself is an error here, and nothing is sent to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.errors import ServingEnvironmentError
from qsun.vllm_server import VllmServer

COMPLETIONS = "/v1/completions"
# What the prefill worker is asked for, and what it must answer with.
KEEP_FOR_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}
PARAMETERS = (
    "remote_engine_id",
    "remote_request_id",
    "remote_block_ids",
    "remote_host",
    "remote_port",
)
TOKEN_PREFIX = "token_id:"
# How the guard in a prefill worker marks whose cache it is; see guard/qsun_guard.py.
SEAL, SEPARATOR, SEAL_DIGITS = "qsun", "|", 16


class HandOffError(ServingEnvironmentError):
    """A prompt that the prefill worker did not hand over: the decode worker was not asked."""


@dataclass(frozen=True)
class Answer:
    """Greedily chosen tokens, the log-probability of each, and those of the likeliest, in nats."""

    tokens: list[int]
    log_probabilities: list[float]
    likeliest: list[dict[int, float]]


@dataclass(frozen=True)
class WrittenAs:
    """Whose cache it must be: a task's, of the bundle with this digest."""

    task: str
    bundle: str

    @property
    def seal(self) -> list[str]:
        """What the guard puts before the engine's id."""
        return [SEAL, self.bundle[:SEAL_DIGITS], self.task]


@dataclass(frozen=True)
class Asked:
    """What is asked: a prompt, as many tokens of answer, and whose cache may be shared.

    `salt` keeps caches apart: one per task and module version, set by the server's side alone. At
    most 128 characters; vLLM 0.32 refuses `@`, `/`, a backslash and NUL in it.
    An answer goes on past its end-of-turn token: it always has `new_tokens` tokens.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    salt: str

    def body(self, new_tokens: int, likeliest: int) -> dict[str, Any]:
        """The request in vLLM's words, for a greedy answer of `new_tokens`."""
        return {
            "prompt": list(self.prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            # Not what a checkpoint's generation config may ask for.
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "cache_salt": self.salt,
            "logprobs": likeliest,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }


def hand_off(
    prefill: VllmServer, decode: VllmServer, written: WrittenAs, asked: Asked, likeliest: int = 0
) -> Answer:
    """The decode worker's answer, on the cache that the prefill worker wrote as asked.

    Raises:
        HandOffError: a prompt under 2 tokens, or one that the prefill worker did not hand over.
        ServingEnvironmentError: a worker answered with an error, or not at all.
    """
    if len(asked.prompt) < 2:
        raise HandOffError("a prompt of one token leaves nothing to hand over")
    body = asked.body(1, 0) | {"model": written.task, "kv_transfer_params": KEEP_FOR_DECODE}
    answer = prefill.post(COMPLETIONS, body)
    parameters = handed_over(answer, asked.prompt, written, prefill.name)
    body = asked.body(asked.new_tokens, likeliest) | {"kv_transfer_params": parameters}
    return _answer(decode.post(COMPLETIONS, body))


def complete(worker: VllmServer, asked: Asked, task: str = "", likeliest: int = 0) -> Answer:
    """The answer of one worker alone, without any hand-off: for comparison, never for clients.

    Raises:
        ServingEnvironmentError: it answered with an error, or not at all.
    """
    body = asked.body(asked.new_tokens, likeliest)
    return _answer(worker.post(COMPLETIONS, body | {"model": task or worker.model}))


def handed_over(
    answer: Mapping[str, Any], prompt: Sequence[int], written: WrittenAs, worker: str
) -> dict[str, Any]:
    """Where a prompt's cache lies, as the decode worker needs it, out of `worker`'s answer.

    Raises:
        HandOffError: it is not the whole prompt's, not this task's or not of this bundle.
    """
    if answer["choices"][0].get("prompt_token_ids") != list(prompt):
        raise HandOffError(f"{worker} read other tokens than it was sent for {written.task}")
    parameters: dict[str, Any] = answer.get("kv_transfer_params") or {}
    missing = [name for name in PARAMETERS if not parameters.get(name)]
    if missing or not parameters.get("do_remote_prefill"):
        raise HandOffError(
            f"{worker} handed nothing over for {written.task}: its answer lacks "
            f"{', '.join(missing) or 'do_remote_prefill'}. Is its NIXL connector on?"
        )
    # With a block more in the prompt than was written, the decode engine would end for all tasks.
    if parameters.get("remote_num_tokens") != len(prompt):
        raise HandOffError(
            f"{worker} wrote {parameters.get('remote_num_tokens')} of "
            f"{len(prompt)} prompt tokens for {written.task}"
        )
    sealed_as = str(parameters["remote_engine_id"]).split(SEPARATOR)[:-1]
    if sealed_as != written.seal:
        found = SEPARATOR.join(sealed_as) or "no seal"
        raise HandOffError(
            f"{worker} wrote another module's cache for {written.task}: {found}, not "
            f"{SEPARATOR.join(written.seal)}. Is it a worker of this bundle, with its guard?"
        )
    return parameters


def _answer(found: Mapping[str, Any]) -> Answer:
    choice = found["choices"][0]
    scores = choice["logprobs"]
    return Answer(
        tokens=choice["token_ids"],
        log_probabilities=scores["token_logprobs"],
        likeliest=[
            {int(name.removeprefix(TOKEN_PREFIX)): score for name, score in one.items()}
            for one in scores["top_logprobs"]
        ],
    )
