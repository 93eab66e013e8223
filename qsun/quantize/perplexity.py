"""Perplexity of a model over tokenized text: exp of the mean negative log-likelihood per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qsun.progress import track
from qsun.scoring import token_log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]], description: str) -> float:
    """Perplexity over all tokens of all texts but the first token of each."""
    total, count = 0.0, 0
    for text in track(texts, description, len(texts)):
        values = token_log_probabilities(model, text)
        total += values.double().sum().item()
        count += len(values)
    return math.exp(-total / count)
