"""What running workers answer: each prompt through the hand-off, and of either module alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.disaggregation import Answer, Asked, WrittenAs, complete, hand_off
from qsun.errors import ServingEnvironmentError
from qsun.progress import track
from qsun.vllm_server import VllmServer
from qsun.worker_counts import WorkerCounts, counts_of, counts_since

LIKELIEST = 5  # log-probabilities told with each token; vLLM gives up to 20


@dataclass(frozen=True)
class Pair:
    """The two workers of a task, and what tells its cache from others'."""

    written: WrittenAs
    prefill: VllmServer
    decode: VllmServer
    salt: str


@dataclass(frozen=True)
class Served:
    """One prompt's answers. `handed` is the hand-off's, `counts` what the decode worker counted.

    `alone` tells that the decode worker answered where nobody had read the prompt for it. Where
    the hand-off failed, `error` says why, and there is no answer. `next_turn` tells a prompt that
    goes on from an earlier one and its answer, in the same cache.
    """

    prompt: tuple[int, ...]
    next_turn: bool = False
    handed: Answer | None = None
    counts: WorkerCounts | None = None
    alone: bool = False
    prefill_alone: Answer | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """What messages call this prompt."""
        return f"{len(self.prompt)} tokens" + (", next turn" if self.next_turn else "")

    def summary(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return {
            "prompt_tokens": len(self.prompt),
            "next_turn": self.next_turn,
            "counted_by_decode": None if self.counts is None else vars(self.counts),
            "answer": None if self.handed is None else self.handed.tokens,
            "decode_alone": self.alone,
            "prefill_alone": None if self.prefill_alone is None else self.prefill_alone.tokens,
            "error": self.error,
        }


def ask_pair(
    pair: Pair, prompts: Sequence[Sequence[int]], new_tokens: int, next_turn_of: int
) -> list[Served]:
    """Ask for an answer of `new_tokens` tokens to each prompt, three times.

    Every prompt has a cache of its own, but one: the prompt of `next_turn_of` tokens is taken up
    again with its answer in the same cache, as a conversation would.
    """
    found = []
    for prompt in track(prompts, f"served {pair.written.task}", len(prompts)):
        salt = f"{pair.salt}.{len(prompt)}"
        served = _ask(pair, Asked(tuple(prompt), new_tokens, salt), next_turn=False)
        found.append(served)
        if len(prompt) == next_turn_of and served.handed is not None:
            longer = (*prompt, *served.handed.tokens)
            found.append(_ask(pair, Asked(longer, new_tokens, salt), next_turn=True))
    return found


def _ask(pair: Pair, asked: Asked, next_turn: bool) -> Served:
    try:
        before = counts_of(pair.decode)
        handed = hand_off(pair.prefill, pair.decode, pair.written, asked, LIKELIEST)
        counts = counts_since(pair.decode, before, len(asked.prompt))
        # Other salts: neither module alone may find what the hand-off left in a cache.
        apart = Asked(asked.prompt, asked.new_tokens, f"{asked.salt}.alone")
        return Served(
            prompt=asked.prompt,
            next_turn=next_turn,
            handed=handed,
            counts=counts,
            alone=_answers_alone(pair.decode, apart),
            prefill_alone=complete(pair.prefill, apart, pair.written.task, LIKELIEST),
        )
    except ServingEnvironmentError as error:
        return Served(asked.prompt, next_turn, error=str(error))


def _answers_alone(decode: VllmServer, asked: Asked) -> bool:
    """Whether a decode worker reads a prompt by itself. It must not: its guard refuses."""
    try:
        complete(decode, asked)
    except ServingEnvironmentError:
        return False
    return True


def difference(first: Answer, second: Answer) -> float:
    """How far two answers' predictions differ, in nats: 0 where one computation made both.

    The mean over the positions that follow the same tokens, up to where the answers part, of the
    mean over the tokens that either listed as likeliest. One that the other does not list counts
    as its least likely: the true difference is no smaller.
    """
    positions = []
    for ours, theirs, token, other in zip(
        first.likeliest, second.likeliest, first.tokens, second.tokens, strict=True
    ):
        positions.append(_apart(ours, theirs))
        if token != other:
            break
    return sum(positions) / len(positions)


def _apart(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    tokens = ours.keys() | theirs.keys()
    least, their_least = min(ours.values()), min(theirs.values())
    gaps = [abs(ours.get(token, least) - theirs.get(token, their_least)) for token in tokens]
    return sum(gaps) / len(gaps)
