"""Perplexity of a model that is never in memory as a whole: texts are walked block by block.

The same numbers as `perplexity` gives of the whole model, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch.nn.functional import embedding, linear

from qsun.block import Block, Weights, block_weights
from qsun.models import serving_dtype
from qsun.progress import track
from qsun.rounding import round_to_nearest

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB in float32


class RoundedWeights:
    """A model's tensors, those of the named layers rounded to nearest on `device` as `dtype`."""

    def __init__(
        self,
        weights: Weights,
        layers: Mapping[str, QuantizationArgs],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._weights, self._dtype, self._device = weights, dtype, device
        self._args = {f"{name}.weight": args for name, args in layers.items()}

    def names(self) -> list[str]:
        """All tensor names."""
        return self._weights.names()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        if name not in self._args:
            return weight
        return round_to_nearest(weight.to(self._device, self._dtype), self._args[name])


@torch.no_grad()
def perplexity_by_blocks(
    weights: Weights,
    config: Mapping[str, Any],
    device: torch.device,
    texts: Sequence[Sequence[int]],
    states: MutableMapping[str, torch.Tensor],
    description: str,
) -> float:
    """Perplexity over all tokens of all texts but the first token of each.

    `states` is where the texts' states lie between two blocks.
    """
    dtype = getattr(torch, serving_dtype(config))
    table = weights[EMBEDDING].to(dtype)
    for number, text in enumerate(texts):
        states[str(number)] = embedding(torch.tensor([text]), table)
    del table
    block = Block(config, dtype, device)
    blocks = int(config["num_hidden_layers"])
    for index in track(range(blocks), description, blocks):
        block.load(index, block_weights(weights, index))
        for name in map(str, range(len(texts))):
            states[name] = block.after(states[name].to(device)).cpu()
    norm = block.final_norm(weights[NORM])
    head = weights[EMBEDDING if config.get("tie_word_embeddings") else HEAD].to(device, dtype)
    total = sum(
        _log_likelihood(norm(states.pop(str(number)).to(device)[0]), head, text)
        for number, text in enumerate(texts)
    )
    return math.exp(-total / sum(len(text) - 1 for text in texts))


def _log_likelihood(states: torch.Tensor, head: torch.Tensor, text: Sequence[int]) -> float:
    """Sum of the log-probabilities of all tokens but the first, nats; states `[n, hidden]`."""
    at_once = max(1, LOGITS_AT_ONCE // len(head))
    following = torch.tensor(text[1:], device=states.device)
    total = 0.0
    for start in range(0, len(following), at_once):
        tokens = following[start : start + at_once, None]
        scores = linear(states[start : start + len(tokens)], head).float().log_softmax(-1)
        total += scores.gather(1, tokens).double().sum().item()
    return total
