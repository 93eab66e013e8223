"""Cache drift: the K and V that a decode module would write, against the base model's, by layer.

A prefill module was tuned for what the full-precision decode module reads out of a cache. Where D's
own K and V have moved, in length or direction, D's queries look for other keys than P writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from qsun.handoff import write_prompts
from qsun.references import Reference, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8


@dataclass(frozen=True)
class LayerDrift:
    """One layer: relative errors (norm of the difference over the norm) and mean cosines.

    The mean is over positions and KV heads, each a vector of the head's size.
    """

    keys_error: float
    values_error: float
    keys_cosine: float
    values_cosine: float


@dataclass
class _Sums:
    difference: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    vectors: int = 0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """`[positions, heads, head size]`, in float32."""
        self.difference += float((found - wanted).square().sum())
        self.norm += float(wanted.square().sum())
        self.cosine += float(cosine_similarity(found, wanted, dim=-1).sum())
        self.vectors += found.shape[0] * found.shape[1]

    @property
    def error(self) -> float:
        return math.sqrt(self.difference / self.norm)

    @property
    def mean_cosine(self) -> float:
        return self.cosine / self.vectors


def cache_drift(
    base: PreTrainedModel, others: Sequence[PreTrainedModel], references: Sequence[Reference]
) -> list[list[LayerDrift]]:
    """For each of `others`, the drift of every layer over all prompt tokens."""
    layers = base.config.num_hidden_layers
    sums = [[(_Sums(), _Sums()) for _ in range(layers)] for _ in others]
    with torch.no_grad():
        for batch in batches(references, BATCH):
            batch = batch.to(base.device)
            columns = torch.arange(batch.prompts.shape[1], device=base.device)
            inside = columns < batch.prompt_lengths[:, None]
            wanted, _ = write_prompts(base, batch.prompts, base.dtype)
            for other, of_other in zip(others, sums, strict=True):
                found, _ = write_prompts(other, batch.prompts, other.dtype)
                for of_layer, ours, theirs in zip(of_other, found, wanted, strict=True):
                    for part, one, two in zip(of_layer, ours, theirs, strict=True):
                        part.add(*(x.transpose(1, 2)[inside].float() for x in (one, two)))
    return [
        [
            LayerDrift(keys.error, values.error, keys.mean_cosine, values.mean_cosine)
            for keys, values in of_other
        ]
        for of_other in sums
    ]
