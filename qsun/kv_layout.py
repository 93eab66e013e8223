"""The KV layout: the shape and meaning of a cache, read from a model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class KvLayout:
    """What a prefill module writes and a decode module reads, per token and layer.

    K and V are each `[kv_heads, head_dim]`; K is cached after rotary embedding.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    rope_theta: float
    rope_type: str
    sliding_window: int | None
    max_tokens: int
    vocabulary: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


def kv_layout(config: Mapping[str, Any]) -> KvLayout:
    """The KV layout that a Hugging Face `config.json` mapping describes.

    Raises:
        KeyError: a field that fixes the layout is missing.
    """
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    windowed = config.get("use_sliding_window", "sliding_window" in config)
    return KvLayout(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
        rope_type=rope.get("rope_type") or rope.get("type") or "default",
        sliding_window=config.get("sliding_window") if windowed else None,
        max_tokens=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
    )
