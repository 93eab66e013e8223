"""Hand-off drift: what a decode module predicts behind a task's cache, against the base model.

Both read the same prefill module's cache. Figures are over every response token of the references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, kl_div

from qsun.handoff import Boundary, response_logits
from qsun.references import Reference, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 4


@dataclass(frozen=True)
class Drift:
    """A reader of the cache compared with the base model reading it.

    `loss` is nats a token of the references; `kl` is from the base model's prediction, nats;
    `top1_agreement` the share of tokens at which both hold the same one likeliest.
    """

    loss: float
    kl: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        """Of the references."""
        return math.exp(self.loss)


def hand_off_drift(
    prefill: PreTrainedModel,
    base: PreTrainedModel,
    readers: Sequence[PreTrainedModel],
    references: Sequence[Reference],
    boundary: Boundary,
) -> tuple[float, list[Drift]]:
    """The base model's loss as the reader of `prefill`'s cache, and each other reader's drift."""
    tokens, base_loss = 0, 0.0
    sums = [[0.0, 0.0, 0.0] for _ in readers]
    with torch.no_grad():
        for batch in batches(references, BATCH):
            batch = batch.to(base.device)
            wanted = response_logits(prefill, base, batch, boundary).float().log_softmax(-1)
            tokens += len(batch.targets)
            base_loss += float(cross_entropy(wanted, batch.targets, reduction="sum"))
            for reader, of_reader in zip(readers, sums, strict=True):
                found = response_logits(prefill, reader, batch, boundary).float().log_softmax(-1)
                of_reader[0] += float(cross_entropy(found, batch.targets, reduction="sum"))
                of_reader[1] += float(kl_div(found, wanted, reduction="sum", log_target=True))
                of_reader[2] += float((found.argmax(-1) == wanted.argmax(-1)).sum())
    return base_loss / tokens, [Drift(*(one / tokens for one in of_reader)) for of_reader in sums]
