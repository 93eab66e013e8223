"""One decoder block at a time: a model of a single layer, into which any block's weights go.

What runs is transformers' own stack with one layer and no final norm, so that a model is walked
through in the memory of one block. Its linear layers are taken in stages, by what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol, cast

import torch
from transformers.cache_utils import Cache

from qsun.handoff import HandedLayer, WrittenLayer
from qsun.skeleton import IGNORED_SUFFIX, transformers_config

LAYERS = "model.layers"
UNUSED_VOCABULARY = 8  # the stack is given states, its embedding is never read


class Stage(Enum):
    """Linear layers that read the same inputs, in the order in which a block comes to them."""

    ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    OUTPUT = ("self_attn.o_proj",)
    MLP = ("mlp.gate_proj", "mlp.up_proj")
    DOWN = ("mlp.down_proj",)


class Weights(Protocol):
    """A model's tensors by name, read when they are asked for."""

    def names(self) -> list[str]:
        """All tensor names."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor."""


def block_weights(tensors: Weights, index: int) -> dict[str, torch.Tensor]:
    """Block `index`'s tensors, named as within it."""
    prefix = f"{LAYERS}.{index}."
    return {
        name.removeprefix(prefix): tensors[name]
        for name in tensors.names()
        if name.startswith(prefix) and not name.endswith(IGNORED_SUFFIX)
    }


class Reached(Exception):
    """The inputs of a linear layer, carried out of a forward pass that need not go on."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


class Block:
    """The stack of one layer on a device; `load` exchanges its weights.

    States are `[rows, positions, hidden]`, in the block's dtype and on its device.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self.device = config, dtype, device
        self._stacks: dict[str | None, Any] = {}
        self._stack: Any = None
        self._norm: Any = None

    def load(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of block `index`, named as within a block."""
        types = self._config.get("layer_types")
        kind = None if types is None else types[index]
        if kind not in self._stacks:
            self._stacks = {kind: self._make(kind)}
        self._stack = self._stacks[kind]
        placed = {name: one.to(self.device, self._dtype) for name, one in weights.items()}
        self.layer.load_state_dict(placed, assign=True)
        self.layer.requires_grad_(False)

    def _make(self, kind: str | None) -> Any:
        from transformers import AutoModel

        single = transformers_config(
            self._config,
            num_hidden_layers=1,
            layer_types=None if kind is None else [kind],
            vocab_size=UNUSED_VOCABULARY,
            pad_token_id=None,
        )
        stack = AutoModel.from_config(single, dtype=self._dtype).to(self.device).eval()
        self._norm, stack.norm = stack.norm, torch.nn.Identity()
        return stack

    @property
    def layer(self) -> Any:
        """The decoder layer itself."""
        return self._stack.layers[0]

    def follow(self, other: Block) -> None:
        """Take the weights that `other` has, on whatever device it is."""
        for mine, theirs in zip(self.layer.parameters(), other.layer.parameters(), strict=True):
            mine.copy_(theirs)

    def linear(self, name: str) -> torch.nn.Linear:
        """A linear layer by its name within the block."""
        return cast(torch.nn.Linear, self.layer.get_submodule(name))

    def final_norm(self, weight: torch.Tensor) -> torch.nn.Module:
        """What stands behind the last block, once one was loaded."""
        self._norm.load_state_dict({"weight": weight.to(self.device, self._dtype)}, assign=True)
        return cast(torch.nn.Module, self._norm)

    def after(self, states: torch.Tensor) -> torch.Tensor:
        """The next block's states, of texts read from their beginning."""
        return cast(torch.Tensor, self._stack(inputs_embeds=states, use_cache=False)[0])

    def write(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read prompts from their beginning: K, V and the next block's states."""
        cache = Cache(layers=[WrittenLayer()])
        after = self._stack(inputs_embeds=states, past_key_values=cache, use_cache=True)
        written = cache.layers[0]
        keys, values = cast(torch.Tensor, written.keys), cast(torch.Tensor, written.values)
        return keys, values, after.last_hidden_state

    def attention_input(self, states: torch.Tensor) -> torch.Tensor:
        """What `Stage.ATTENTION` reads."""
        return cast(torch.Tensor, self.layer.input_layernorm(states))

    def attention_output(self, states: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        """What `Stage.OUTPUT` reads; without a `reading`, of texts read from their beginning."""
        given = {} if reading is None else reading.arguments()
        return inputs_of(
            self.linear("self_attn.o_proj"), lambda: self._stack(inputs_embeds=states, **given)
        )

    def after_attention(self, states: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """The states that the MLP is added to."""
        return states + cast(torch.Tensor, self.layer.self_attn.o_proj(attention_output))

    def mlp_input(self, after_attention: torch.Tensor) -> torch.Tensor:
        """What `Stage.MLP` reads."""
        return cast(torch.Tensor, self.layer.post_attention_layernorm(after_attention))

    def down_input(self, mlp_input: torch.Tensor) -> torch.Tensor:
        """What `Stage.DOWN` reads."""
        return inputs_of(self.linear("mlp.down_proj"), lambda: self.layer.mlp(mlp_input))

    def after_mlp(self, after_attention: torch.Tensor) -> torch.Tensor:
        """The next block's states."""
        return after_attention + cast(torch.Tensor, self.layer.mlp(self.mlp_input(after_attention)))


class Reading:
    """What a block reads beside states: K and V that a prefill module wrote, and where it stands.

    `written` int64 `[rows]` are the positions that count of each row's K and V.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, written: torch.Tensor, positions: int
    ) -> None:
        self._handed = keys, values
        columns = torch.arange(keys.shape[-2], device=keys.device)
        own = torch.ones(len(written), positions, dtype=torch.bool, device=keys.device)
        self._mask = torch.cat([columns < written[:, None], own], dim=1)
        self._positions = written[:, None] + torch.arange(positions, device=keys.device)

    def arguments(self) -> dict[str, Any]:
        """As the stack takes it; a cache that only reads, so it serves any number of passes."""
        return {
            "attention_mask": self._mask,
            "position_ids": self._positions,
            "past_key_values": Cache(layers=[HandedLayer(*self._handed)]),
            "use_cache": True,
        }


def inputs_of(linear: torch.nn.Linear, run: Callable[[], Any]) -> torch.Tensor:
    """What `linear` is given when `run` comes to it; nothing after it is computed."""

    def leave(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise Reached(inputs[0])

    handle = linear.register_forward_pre_hook(leave)
    try:
        run()
    except Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
    raise RuntimeError("the forward pass ended without coming to the layer")
