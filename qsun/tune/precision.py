"""Precision and speed: how a module's decoder layers compute while prefill modules are tuned.

Weights are kept in float32 for the optimizer and computed with in the serving dtype, norms and
residual stream included, which autocast would leave in float32. All layers run through one pure
function of their weights, so that compiling it once serves every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from qsun.handoff import HandedLayer, WrittenLayer, body, head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KeysValues = tuple[torch.Tensor, torch.Tensor]
Weights = dict[str, torch.Tensor]


def compute_in(
    model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> None:
    """Let every part of the model compute with its weights cast to `dtype`.

    With `gradient_checkpointing`, a decoder layer's activations, and its cast weights, are
    computed again on the way back; transformers' own switch would drop the cache instead.
    `compiled` fuses each layer's operations, the same code for all.
    """
    stack = body(model)
    block = compiled_block() if compiled else _block
    if gradient_checkpointing:
        block = partial(checkpoint, block, use_reentrant=False)
    template = deepcopy(stack.layers[0]).to("meta")  # all layers are alike but for their weights
    template.train(any(weight.requires_grad for weight in model.parameters()))
    for index, layer in enumerate(stack.layers):
        layer.forward = _layer_forward(template, layer, index, dtype, block)
    stack.embed_tokens.forward = _cast_output(stack.embed_tokens.forward, dtype)
    for part in (stack.norm, head(model)):
        part.forward = _cast_weights(part, dtype)


@cache
def compiled_block() -> Callable[..., Any]:
    """`_block`, compiled for batches of any shape; one for the process."""
    return torch.compile(_block, dynamic=True)


class _OneLayerCache:
    """What a decoder layer needs of a cache: it may read handed K and V, and leaves its own."""

    def __init__(self, handed: KeysValues | None) -> None:
        self.handed = handed
        self.own: KeysValues | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        self.own = keys, values
        if self.handed is None:
            return keys, values
        handed_keys, handed_values = self.handed
        return torch.cat([handed_keys, keys], dim=-2), torch.cat([handed_values, values], dim=-2)


def _block(
    template: torch.nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: KeysValues,
    handed: KeysValues | None,
) -> tuple[torch.Tensor, KeysValues | None]:
    """One decoder layer, the template's code on these weights: its states, its K and V."""
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    layer_cache = _OneLayerCache(handed)
    call = {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": layer_cache}
    return functional_call(template, cast, (states,), call), layer_cache.own


def _layer_forward(
    template: torch.nn.Module,
    layer: torch.nn.Module,
    index: int,
    dtype: torch.dtype,
    block: Callable[..., Any],
) -> Callable[..., torch.Tensor]:
    weights = dict(layer.named_parameters())

    def forward(
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: KeysValues | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        kept = None if past_key_values is None else past_key_values.layers[index]
        if not isinstance(kept, WrittenLayer | HandedLayer | None):
            raise TypeError(f"a layer that is tuned cannot grow a {type(kept).__name__}")
        handed = (kept.keys, kept.values) if isinstance(kept, HandedLayer) else None
        # Rows are padded on the right: what follows nothing is causal and needs no mask.
        mask = attention_mask if handed is not None else None
        states, own = block(template, weights, dtype, states, mask, position_embeddings, handed)
        if kept is not None and handed is None:
            kept.update(*own)
        return states

    return forward


def _cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def forward(states: torch.Tensor) -> torch.Tensor:
        cast = {name: weight.to(dtype) for name, weight in module.named_parameters()}
        with _own_forward(module):
            found: torch.Tensor = functional_call(module, cast, (states,))
        return found

    return forward


def _cast_output(
    forward: Callable[..., torch.Tensor], dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    return lambda tokens: forward(tokens).to(dtype)


@contextmanager
def _own_forward(module: torch.nn.Module) -> Iterator[None]:
    """The module's forward as its class has it, while the block runs."""
    replaced = module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            module.__dict__["forward"] = replaced


@contextmanager
def as_served(dtype: torch.dtype, *models: PreTrainedModel) -> Iterator[None]:
    """The models as they will be served, their weights rounded to `dtype`, while the block runs."""
    with ExitStack() as served:
        for model in {id(model): model for model in models}.values():
            served.enter_context(_as_served(dtype, model))
        yield


@contextmanager
def _as_served(dtype: torch.dtype, model: PreTrainedModel) -> Iterator[None]:
    stack = body(model)
    parts = [*stack.layers, stack.embed_tokens, stack.norm, head(model)]
    forwards = [part.__dict__.pop("forward", None) for part in parts]
    kept = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
    ]
    # Other parameters, not other data: a change of dtype would drop the hooks on the gradient
    # accumulators by which DistributedDataParallel shares gradients.
    rounded = {
        weight: torch.nn.Parameter(weight.data.to(dtype), requires_grad=False)
        for _, _, weight in kept
    }
    training = model.training
    try:
        for module, name, weight in kept:
            module._parameters[name] = rounded[weight]
        model.eval()
        yield
    finally:
        for module, name, weight in kept:
            module._parameters[name] = weight
        for part, forward in zip(parts, forwards, strict=True):
            if forward is not None:
                part.__dict__["forward"] = forward
        model.train(training)
