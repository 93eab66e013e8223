"""Scoring: what a model in this process makes of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_log_probabilities(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token after the first, given those before it; float32 `[n - 1]`."""
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    scores: torch.Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return scores.cpu()
