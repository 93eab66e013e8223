"""A pair: the two modules of a system, loaded, with what their hand-off needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qsun.handoff import Boundary, KvCache, write_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 32
SHORTEST_PREFIX = 32  # tokens; a shorter one is not worth a pass of its own


@dataclass(frozen=True)
class Pair:
    """Prefill and decode module on one device, and the tokens that prompt and answer may have."""

    prefill: PreTrainedModel
    decode: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    boundary: Boundary
    max_tokens: int


def prefill_is_idle(pair: Pair) -> bool:
    """Whether the prefill module writes, bit for bit, the cache that it would have been untuned.

    That is the decode module's own, or, of an adapter, the one without it.
    """
    device = pair.prefill.device
    tokens = torch.arange(2, 2 + PROBE_TOKENS, device=device)[None]
    written = _cache(pair.prefill, tokens)
    disabled = getattr(pair.prefill, "disable_adapter", nullcontext)
    with disabled():
        untuned = _cache(pair.prefill if disabled is not nullcontext else pair.decode, tokens)
    return all(
        torch.equal(ours, theirs)
        for layer, other in zip(written, untuned, strict=True)
        for ours, theirs in zip(layer, other, strict=True)
    )


def _cache(model: PreTrainedModel, tokens: torch.Tensor) -> KvCache:
    with torch.no_grad():
        return write_prompts(model, tokens, model.dtype)[0]


def shared_prefix(prompts: Sequence[Sequence[int]], shortest: int = SHORTEST_PREFIX) -> list[int]:
    """The tokens that all prompts begin with and that none ends with; none below `shortest`."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    room = min(map(len, prompts)) - 1
    common = 0
    while common < room and first[common] == last[common]:
        common += 1
    return list(first[:common]) if common >= shortest and len(prompts) > 1 else []


class PrefixCache:
    """What a prefill module made of a prefix, computed once for as long as it stays the same."""

    def __init__(self, prefill: Any) -> None:
        self._prefill = prefill
        self._tokens: list[int] = []
        self._cache: KvCache | None = None
        self.reused = 0

    def of(self, prompts: Sequence[Sequence[int]]) -> KvCache | None:
        """The cache of what all these prompts begin with; None where that is too little."""
        known = self._tokens
        if known and all(len(one) > len(known) and one[: len(known)] == known for one in prompts):
            self.reused += len(prompts)
            return self._cache
        self._tokens = shared_prefix(prompts)
        self._cache = None
        if self._tokens:
            self._cache = _cache(
                self._prefill, torch.tensor([self._tokens], device=self._prefill.device)
            )
        return self._cache
