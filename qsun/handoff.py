"""The hand-off: a prefill module writes the prompt's KV cache, the decode module reads it.

The two-module forward of SUN (arXiv 2603.02599), teacher-forced. Rows are padded on the right, so
that causality alone keeps a prompt's tokens from its padding and no query is left without a key;
see `docs/architecture.md` for what padding on the left does.

Gradients reach the prefill module only through the K and V that the decode module reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Boundary(Enum):
    """How many of a prompt's n positions the prefill module writes."""

    BEFORE_LAST = "n-1"
    """The decode module reads the prompt's last token and predicts all: what vLLM serves."""
    LAST = "n"
    """The prefill module reads the whole prompt and predicts the first token: the paper's form."""


@dataclass(frozen=True)
class Batch:
    """Prompts and responses, each padded on the right.

    `prompts` int64 `[rows, longest prompt]`, `responses` int64 `[rows, longest response]`, the
    lengths int64 `[rows]`: a prompt has at least 2 tokens, a response at least 1.
    """

    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    responses: torch.Tensor
    response_lengths: torch.Tensor

    @property
    def response_mask(self) -> torch.Tensor:
        """Where responses have tokens, bool `[rows, longest response]`."""
        columns = torch.arange(self.responses.shape[1], device=self.responses.device)
        return columns < self.response_lengths[:, None]

    @property
    def targets(self) -> torch.Tensor:
        """All response tokens, row after row, int64 `[response tokens]`."""
        return self.responses[self.response_mask]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items()}
        return replace(self, **moved)


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """A batch of token lists.

    Raises:
        ValueError: a prompt under 2 tokens, which leaves nothing to hand off, or an empty response.
    """
    if min(map(len, prompts)) < 2 or min(map(len, responses)) < 1:
        raise ValueError("a prompt needs at least 2 tokens and a response at least 1")
    return Batch(*padded(prompts), *padded(responses))


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as int64 `[rows, longest]`, padded on the right, and their lengths `[rows]`."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, target in zip(rows, tokens, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens, lengths


class WrittenLayer(DynamicLayer):
    """One layer's K and V as the prefill module wrote them; writing again changes nothing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what was written, and give it back."""
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """0: a prompt is written whole, after nothing."""
        return 0


class HandedLayer(DynamicLayer):
    """One layer's prompt K and V for reading; the decode module's own are not kept.

    Reading twice gives the same, as the recomputation under gradient checkpointing needs.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The handed positions and, after them, the decode module's own."""
        keys = torch.cat([self.keys, key_states.to(self.keys.dtype)], dim=-2)
        return keys, torch.cat([self.values, value_states.to(self.values.dtype)], dim=-2)


# K and V of every layer, each `[rows, KV heads, positions, head size]`.
KvCache = list[tuple[torch.Tensor, torch.Tensor]]


def body(model: PreTrainedModel) -> Any:
    """The stack of decoder layers, adapters of peft included."""
    unwrap = getattr(model, "get_base_model", None)
    return (unwrap() if unwrap else model).get_decoder()


def head(model: PreTrainedModel) -> Any:
    """What turns final hidden states into logits."""
    return model.get_output_embeddings()


def write_prompts(
    prefill: PreTrainedModel,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    prefix: KvCache | None = None,
) -> tuple[KvCache, torch.Tensor]:
    """What the prefill module makes of prompts, padding included.

    `prefix` is what it made of tokens that all rows begin with, one row: these are not run again.
    Gives the cache as `dtype`, and the final hidden states `[rows, positions, hidden]`, which are
    zero where the prefix is.
    """
    stack = body(prefill)
    if prefix is None:
        cache = Cache(layers=[WrittenLayer() for _ in range(stack.config.num_hidden_layers)])
        states = stack(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    else:
        cache, states = _write_after(stack, tokens, prefix)
    written = [
        (cast(torch.Tensor, layer.keys).to(dtype), cast(torch.Tensor, layer.values).to(dtype))
        for layer in cache.layers
    ]
    return written, states


def _write_after(stack: Any, tokens: torch.Tensor, prefix: KvCache) -> tuple[Cache, torch.Tensor]:
    """The cache of all `tokens`, whose first the prefix holds, and the states of all."""
    cache, rows, known = DynamicCache(), len(tokens), prefix[0][0].shape[-2]
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    states = torch.zeros(*tokens.shape, stack.config.hidden_size, device=tokens.device)
    if known < tokens.shape[1]:
        after = stack(input_ids=tokens[:, known:], past_key_values=cache, use_cache=True)
        states = torch.cat([states[:, :known].to(stack.dtype), after.last_hidden_state], dim=1)
    return cache, states


def response_logits(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    batch: Batch,
    boundary: Boundary = Boundary.BEFORE_LAST,
    prefix: KvCache | None = None,
) -> torch.Tensor:
    """Logits of every response token through the hand-off, in the order of `batch.targets`.

    `prefix` is as for `write_prompts`. Returns `[response tokens, vocabulary]`, in the decode
    module's dtype.
    """
    if boundary is Boundary.BEFORE_LAST:
        states = _states_before_last(prefill, decode, batch, prefix)
        return cast(torch.Tensor, head(decode)(states[batch.response_mask]))
    return padded_logits(prefill, decode, batch, boundary, prefix)[batch.response_mask]


def padded_logits(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    batch: Batch,
    boundary: Boundary = Boundary.BEFORE_LAST,
    prefix: KvCache | None = None,
) -> torch.Tensor:
    """The same logits as `[rows, longest response, vocabulary]`, with any at the padding.

    No shape in here depends on a value, so that a CUDA graph can hold all of it.
    """
    if boundary is Boundary.BEFORE_LAST:
        return cast(torch.Tensor, head(decode)(_states_before_last(prefill, decode, batch, prefix)))
    rows = torch.arange(len(batch.prompts), device=batch.prompts.device)
    cache, prompt_states = write_prompts(prefill, batch.prompts, decode.dtype, prefix)
    first = head(prefill)(prompt_states[rows, batch.prompt_lengths - 1]).to(decode.dtype)
    if batch.responses.shape[1] == 1:
        return cast(torch.Tensor, first[:, None])
    states = _continue(decode, cache, batch.prompt_lengths, batch.responses[:, :-1])
    return torch.cat([first[:, None], head(decode)(states)], dim=1)


def _states_before_last(
    prefill: PreTrainedModel, decode: PreTrainedModel, batch: Batch, prefix: KvCache | None
) -> torch.Tensor:
    """The decode module's final states that predict the responses, at boundary n-1."""
    last_token = batch.prompts.gather(1, batch.prompt_lengths[:, None] - 1)
    cache, _ = write_prompts(prefill, batch.prompts[:, :-1], decode.dtype, prefix)
    read = torch.cat([last_token, batch.responses[:, :-1]], dim=1)
    return _continue(decode, cache, batch.prompt_lengths - 1, read)


def _continue(
    decode: PreTrainedModel, cache: KvCache, written: torch.Tensor, read: torch.Tensor
) -> torch.Tensor:
    """The decode module's final hidden states over `read`, which follows `written` positions."""
    columns = torch.arange(cache[0][0].shape[-2], device=read.device)
    mask = torch.cat([columns < written[:, None], torch.ones_like(read, dtype=torch.bool)], dim=1)
    positions = written[:, None] + torch.arange(read.shape[1], device=read.device)
    states = body(decode)(
        input_ids=read,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=Cache(layers=[HandedLayer(keys, values) for keys, values in cache]),
        use_cache=True,
    ).last_hidden_state
    return cast(torch.Tensor, states)


def single_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits as `response_logits` gives them, when one model reads prompt and response at once."""
    return cast(torch.Tensor, head(model)(_single_states(model, batch)[batch.response_mask]))


def padded_single_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The same logits as `padded_logits` gives them."""
    return cast(torch.Tensor, head(model)(_single_states(model, batch)))


def _single_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The final states that predict the responses, in one pass over prompt and response."""
    prompt_width, response_width = batch.prompts.shape[1], batch.responses.shape[1]
    both = torch.cat([batch.prompts, batch.responses], dim=1)
    columns = torch.arange(both.shape[1], device=both.device)
    after = columns - batch.prompt_lengths[:, None]
    inside = after.clamp(max=response_width - 1) + prompt_width
    tokens = both.gather(1, torch.where(after < 0, columns, inside))
    states = body(model)(input_ids=tokens, use_cache=False).last_hidden_state
    predicting = batch.prompt_lengths[:, None] - 1 + columns[:response_width]
    return cast(torch.Tensor, states.take_along_dim(predicting[..., None], dim=1))


def log_likelihood(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    batch: Batch,
    boundary: Boundary = Boundary.BEFORE_LAST,
) -> torch.Tensor:
    """Log-probability (nats) of each response given its prompt, float32 `[rows]`."""
    logits = response_logits(prefill, decode, batch, boundary).float()
    scores = -torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    rows = torch.arange(len(batch.prompts), device=scores.device)
    row_of = rows[:, None].expand_as(batch.response_mask)[batch.response_mask]
    return torch.zeros(len(rows), device=scores.device).index_add(0, row_of, scores)
