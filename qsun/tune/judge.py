"""The judge: loss and accuracy of two modules on a task's examples, as they will be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qsun.generation import Sampling, generate
from qsun.handoff import Boundary, log_likelihood
from qsun.processes import gather, my_share
from qsun.tasks.accuracy import Accuracy
from qsun.tasks.checkers import CHECKERS
from qsun.tasks.definition import TaskDefinition
from qsun.tasks.examples import Example
from qsun.tune.batches import Row, batch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN_RESPONSES = 3  # kept in a record, for people


@dataclass(frozen=True)
class Judge:
    """What judging needs beside the modules and the rows."""

    task: TaskDefinition
    tokenizer: PreTrainedTokenizerBase
    boundary: Boundary
    loss_batch_size: int
    generation_batch_size: int

    def loss(self, prefill: PreTrainedModel, decode: PreTrainedModel, rows: Sequence[Row]) -> float:
        """Mean negative log-likelihood of a response token, nats."""
        total, tokens = 0.0, 0
        ordered = sorted(rows, key=len)
        with torch.no_grad():
            for start in range(0, len(ordered), self.loss_batch_size):
                batch = batch_of(ordered[start : start + self.loss_batch_size]).to(decode.device)
                total -= float(log_likelihood(prefill, decode, batch, self.boundary).sum())
                tokens += int(batch.response_lengths.sum())
        return total / tokens

    def responses(
        self,
        prefill: PreTrainedModel,
        decode: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
    ) -> list[str]:
        """Greedy responses as text; every process generates its share."""
        mine = my_share(len(prompts))
        made = generate(
            prefill,
            decode,
            self.tokenizer,
            [prompts[index] for index in mine],
            Sampling(max_new_tokens=self.task.max_new_tokens, stop=self.task.stop),
            self.boundary,
            self.generation_batch_size,
        )
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        of_all = dict(gather(list(zip(mine, texts, strict=True))))
        return [of_all[index] for index in range(len(prompts))]

    def accuracy(self, responses: Sequence[str], examples: Sequence[Example]) -> Accuracy:
        """How many responses the task's checker takes for right."""
        verdicts = CHECKERS[str(self.task.checker)](responses, [one.answer for one in examples])
        return Accuracy(sum(verdicts), len(verdicts))

    def tests(
        self,
        prefill: PreTrainedModel,
        decode: PreTrainedModel,
        tests: dict[str, list[Example]],
        prompts: dict[str, list[list[int]]],
    ) -> dict[str, Any]:
        """Every test set's accuracy, with a few responses; all sets are generated together."""
        every = [prompt for name in tests for prompt in prompts[name]]
        responses = iter(self.responses(prefill, decode, every))
        found: dict[str, Any] = {}
        for name, examples in tests.items():
            made = [next(responses) for _ in examples]
            accuracy = self.accuracy(made, examples)
            found[name] = accuracy.summary() | {"responses": made[:SHOWN_RESPONSES]}
        return found
