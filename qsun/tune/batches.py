"""Batches: examples become tokens, and tokens a fixed order of micro-batches of like length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qsun.chats import encode_prompts, encode_responses
from qsun.errors import DataError
from qsun.handoff import Batch, collate
from qsun.tasks.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that is no token: torch's and transformers' convention
POOLED_ROWS = 4096  # sorted by length together, at most
POOLS_AT_LEAST = 4  # in an epoch, so that no two epochs group the rows alike
RESPONSE_STEP = 32  # tokens: responses that differ by less count as alike


@dataclass(frozen=True)
class Row:
    """One example's tokens."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Encoded:
    """The rows of a split, and what became of its examples.

    `cut` rows lost the end of their response to the token limit, `dropped` ones had none left.
    """

    rows: list[Row]
    cut: int
    dropped: int

    def summary(self) -> dict[str, Any]:
        """What a record keeps: counts, tokens and a digest of every token."""
        state = hashlib.sha256()
        for row in self.rows:
            for tokens in (row.prompt, row.response):
                state.update(len(tokens).to_bytes(4, "little"))
                state.update(torch.tensor(tokens, dtype=torch.int32).numpy().tobytes())
        return {
            "rows": len(self.rows),
            "prompt_tokens": sum(len(row.prompt) for row in self.rows),
            "response_tokens": sum(len(row.response) for row in self.rows),
            "cut": self.cut,
            "dropped": self.dropped,
            "sha256": state.hexdigest(),
        }


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int, what: str
) -> Encoded:
    """Tokenize a split; `what` names it in messages.

    Raises:
        DataError: `max_tokens` leaves no example a response, or a prompt has under 2 tokens.
    """
    rows = []
    cut = dropped = 0
    prompts = encode_prompts([(one.messages, one.source) for one in examples], tokenizer)
    responses = encode_responses([one.response for one in examples], tokenizer)
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        room = max_tokens - len(prompt)
        if len(prompt) < 2:
            raise DataError(
                f"source {example.source.name}: a prompt has {len(prompt)} token(s): at least 2 "
                "are needed, or the prefill module has nothing to hand off"
            )
        if room < 1:
            dropped += 1
            continue
        cut += len(response) > room
        rows.append(Row(prompt, response[:room]))
    if not rows:
        raise DataError(
            f"{what}: no response tokens are left: all {dropped} prompts have max_tokens "
            f"({max_tokens}) or more. Raise max_tokens in the task's definition."
        )
    return Encoded(rows, cut, dropped)


def batch_of(rows: Sequence[Row]) -> Batch:
    """The rows as one right-padded batch."""
    return collate([row.prompt for row in rows], [row.response for row in rows])


def model_inputs(rows: Sequence[Row], shape_step: int = 1) -> dict[str, torch.Tensor]:
    """The batch as the trainer's tensors; `labels` are the responses, padded with `IGNORED`.

    Prompts and labels are padded further, to multiples of `shape_step` tokens.
    """
    batch = batch_of(rows)
    labels = batch.responses.masked_fill(~batch.response_mask, IGNORED)
    return {
        "prompts": _widened(batch.prompts, shape_step, 0),
        "prompt_lengths": batch.prompt_lengths,
        "labels": _widened(labels, shape_step, IGNORED),
    }


def _widened(tokens: torch.Tensor, step: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % step), value=value)


class MicroBatches(torch.utils.data.Dataset[list[Row]]):
    """Every micro-batch of a whole training run, in order; the same for the same seed.

    Each epoch shuffles the rows and sorts pools of them by length; a micro-batch is a run of a
    sorted pool, a batch is any of the pool's micro-batches, so that its rows differ in length. Rows
    that fill no batch are left out at the very end.
    """

    def __init__(
        self, rows: Sequence[Row], batch_size: int, micro_batch_size: int, epochs: int, seed: int
    ) -> None:
        rng = random.Random(seed)
        self._rows = rows
        self._chosen: list[list[int]] = []
        pooled_rows = min(POOLED_ROWS, len(rows) // POOLS_AT_LEAST)
        pool = max(1, pooled_rows // batch_size) * batch_size
        left: list[int] = []
        for _ in range(epochs):
            order = left + rng.sample(range(len(rows)), len(rows))
            whole = len(order) // batch_size * batch_size
            order, left = order[:whole], order[whole:]
            for start in range(0, whole, pool):
                pooled = sorted(order[start : start + pool], key=lambda row: _length_key(rows[row]))
                cut = [
                    pooled[first : first + micro_batch_size]
                    for first in range(0, len(pooled), micro_batch_size)
                ]
                rng.shuffle(cut)
                self._chosen += cut
        self.steps = len(self._chosen) * micro_batch_size // batch_size

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> list[Row]:
        return [self._rows[row] for row in self._chosen[index]]


def _length_key(row: Row) -> tuple[int, int]:
    """Like responses first, within them like prompts: both are padded, each to its longest."""
    return len(row.response) // RESPONSE_STEP, len(row.prompt)


def padding_share(rows: Sequence[Row], micro_batches: MicroBatches) -> float:
    """Share of a run's padded positions that hold no token."""
    padded = tokens = 0
    for index in range(len(micro_batches)):
        chosen = micro_batches[index]
        width = max(len(row.prompt) for row in chosen) + max(len(row.response) for row in chosen)
        padded += width * len(chosen)
        tokens += sum(map(len, chosen))
    return 1 - tokens / padded
