"""Length drift: does a decode module's error grow along a long output?

Each reader reads a prompt's cache and a long text after it; its cache of the text is its own,
errors included, as it would be while serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import kl_div

from qsun.handoff import Boundary, collate, padded_logits
from qsun.references import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BINS = 16
AT_ONCE = 256  # positions: the logits of all of them would be gigabytes


@dataclass(frozen=True)
class Curve:
    """Mean KL divergence (nats) from the base model's predictions, by position of the output.

    `kl[i]` covers positions `edges[i]` to `edges[i + 1]`.
    """

    edges: list[int]
    kl: list[float]

    @property
    def growth(self) -> float:
        """The last quarter of the output's mean over the first quarter's."""
        quarter = len(self.kl) // 4
        return sum(self.kl[-quarter:]) / max(sum(self.kl[:quarter]), 1e-12)


def length_drift(
    prefill: PreTrainedModel,
    base: PreTrainedModel,
    readers: Sequence[PreTrainedModel],
    texts: Sequence[Reference],
    boundary: Boundary,
) -> list[Curve]:
    """Each reader's curve over all texts; their responses have equal lengths, multiples of 16."""
    tokens = len(texts[0].response)
    sums = [torch.zeros(tokens) for _ in readers]
    with torch.no_grad():
        for text in texts:
            batch = collate([text.prompt], [text.response]).to(base.device)
            wanted = padded_logits(prefill, base, batch, boundary)[0]
            for reader, by_position in zip(readers, sums, strict=True):
                found = padded_logits(prefill, reader, batch, boundary)[0]
                by_position += _divergences(found, wanted).cpu() / len(texts)
    edges = list(range(0, tokens + 1, tokens // BINS))
    return [Curve(edges, by_position.reshape(BINS, -1).mean(1).tolist()) for by_position in sums]


def joined(references: Sequence[Reference], tokens: int) -> Reference:
    """One long text: the first prompt, then every response, over again until there are `tokens`."""
    responses = chain.from_iterable(reference.response for reference in cycle(references))
    return Reference(references[0].prompt, list(islice(responses, tokens)))


def _divergences(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL of `wanted` from `found`, logits `[positions, vocabulary]`, at each position."""
    parts = [
        kl_div(
            found[start : start + AT_ONCE].float().log_softmax(-1),
            wanted[start : start + AT_ONCE].float().log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        for start in range(0, len(found), AT_ONCE)
    ]
    return torch.cat(parts)
