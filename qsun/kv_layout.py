"""The KV layout: the shape and meaning of a cache, read from a model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Rotary types that turn K by what the model's context was before it was stretched.
STRETCHED_ROPE_TYPES = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class KvLayout:
    """What a prefill module writes and a decode module reads, per token and layer.

    K and V are each `[kv_heads, head_dim]`; K is cached after rotary embedding, so whatever
    turns K by its position counts: `rope_parameters` holds all of it but type and theta, sorted.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    rope_theta: float
    rope_type: str
    rope_parameters: tuple[tuple[str, Any], ...]
    sliding_window: int | None
    max_tokens: int
    vocabulary: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def rope_factor(self) -> float | None:
        """How many times the context was stretched, where the rotary type has such a factor."""
        factor: float | None = dict(self.rope_parameters).get("factor")
        return factor


def kv_layout(config: Mapping[str, Any]) -> KvLayout:
    """The KV layout that a Hugging Face `config.json` mapping describes.

    Raises:
        KeyError: a field that fixes the layout is missing.
    """
    heads = config["num_attention_heads"]
    # The precedence of transformers, which also builds the model.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    windowed = config.get("use_sliding_window", "sliding_window" in config)
    return KvLayout(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
        rope_type=rope_type,
        rope_parameters=_rope_parameters(config, rope, rope_type),
        sliding_window=config.get("sliding_window") if windowed else None,
        max_tokens=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
    )


def _rope_parameters(
    config: Mapping[str, Any], rope: Mapping[str, Any], rope_type: str
) -> tuple[tuple[str, Any], ...]:
    """All of `rope` but type and theta, with what older configs keep beside it."""
    parameters = {"partial_rotary_factor": config.get("partial_rotary_factor"), **rope}
    if rope_type in STRETCHED_ROPE_TYPES:
        key = "original_max_position_embeddings"
        inside = rope.get(key) or config["max_position_embeddings"]
        parameters[key] = config.get(key) or inside
    if parameters["partial_rotary_factor"] == 1:  # as if it were not given
        del parameters["partial_rotary_factor"]
    named = ("rope_type", "type", "rope_theta")
    return _pairs({key: value for key, value in parameters.items() if key not in named})


def _pairs(mapping: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Hashable: sorted, without what holds nothing, mappings and lists inside as tuples."""
    return tuple(
        (key, _hashable(mapping[key])) for key in sorted(mapping) if mapping[key] is not None
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _pairs(value)
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def layout_differences(one: KvLayout, other: KvLayout) -> list[str]:
    """Every field in which two layouts differ, as `field: one's, other's`."""
    return [
        f"{name}: {mine}, {theirs}"
        for name, mine in vars(one).items()
        if mine != (theirs := getattr(other, name))
    ]
