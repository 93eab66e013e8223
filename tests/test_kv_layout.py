"""The KV layout: what a config says is what the model's cache really is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qsun.kv_layout import kv_layout
from tests.builders import Architecture, model_config

SHIPPED = Path(__file__).parent.parent / "configs" / "models"


def shipped(name: str) -> dict[str, Any]:
    return dict(json.loads((SHIPPED / name / "config.json").read_text()))


@pytest.mark.parametrize(("architecture", "kv_heads"), [("llama", 1), ("llama", 4), ("qwen3", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layout_is_that_of_a_real_cache(
    architecture: Architecture, kv_heads: int, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_config(
        model_config(architecture, kv_heads=kv_heads, layers=3), dtype=dtype
    )
    layout = kv_layout(json.loads(model.config.to_json_string(use_diff=False)))
    tokens = torch.arange(5).unsqueeze(0)
    cache = model(tokens, use_cache=True).past_key_values
    assert len(cache.layers) == layout.layers
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, layout.kv_heads, 5, layout.head_dim)
        assert str(layer.keys.dtype) == f"torch.{layout.dtype}"
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * layout.bytes_per_token


def test_llama_3_1_8b_takes_128_kib_a_token() -> None:
    layout = kv_layout(shipped("llama-3.1-8b"))
    assert layout.bytes_per_token == 128 * 1024
    assert layout.rope_type == "llama3"
    assert layout.rope_theta == 500_000


def test_heads_and_their_size_have_defaults() -> None:
    config = shipped("llama-3.1-8b")
    del config["num_key_value_heads"]
    layout = kv_layout(config)
    assert (layout.kv_heads, layout.head_dim) == (32, 128)


def test_a_window_counts_only_where_it_is_used() -> None:
    config = shipped("qwen3-8b-base") | {"sliding_window": 4096}
    assert kv_layout(config).sliding_window is None
    assert kv_layout(config | {"use_sliding_window": True}).sliding_window == 4096
    del config["use_sliding_window"]
    assert kv_layout(config).sliding_window == 4096


def test_old_and_new_configs_of_one_model_have_one_layout() -> None:
    old = shipped("llama-3.1-8b")
    new = dict(old)
    new["dtype"] = new.pop("torch_dtype")
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    assert kv_layout(new) == kv_layout(old)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10_000.0},
        {"rope_scaling": None},
        {"num_hidden_layers": 31},
        {"head_dim": 64},
        {"vocab_size": 128_255},
        {"max_position_embeddings": 8192},
        {"torch_dtype": "float16"},
        # Llama 3.2 against 3.1: K of later positions differ, so the caches do not fit.
        *(
            {"rope_scaling": shipped("llama-3.1-8b")["rope_scaling"] | change}
            for change in (
                {"factor": 32.0},
                {"low_freq_factor": 2.0},
                {"high_freq_factor": 8.0},
                {"original_max_position_embeddings": 4096},
            )
        ),
        {"partial_rotary_factor": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_cache_changes_the_layout(change: dict[str, Any]) -> None:
    config = shipped("llama-3.1-8b")
    assert kv_layout(config | change) != kv_layout(config)


def test_what_does_not_change_the_cache_leaves_the_layout() -> None:
    config = shipped("llama-3.1-8b")
    assert kv_layout(config | {"intermediate_size": 1, "rms_norm_eps": 1.0}) == kv_layout(config)


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 1.0},
        {"partial_rotary_factor": None},
        {
            "rope_scaling": shipped("llama-3.1-8b")["rope_scaling"]
            | {"factor": 8, "beta_fast": None}
        },
        {"original_max_position_embeddings": 8192},
    ],
)
def test_two_ways_to_write_one_rotary_embedding(change: dict[str, Any]) -> None:
    config = shipped("llama-3.1-8b")
    assert kv_layout(config | change) == kv_layout(config)


def test_a_layout_is_hashable_whatever_its_rotary_embedding() -> None:
    factors = {"short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0], "rope_type": "longrope"}
    layout = kv_layout(shipped("llama-3.1-8b") | {"rope_scaling": factors})
    assert dict(layout.rope_parameters)["long_factor"] == (4.0, 8.0)
    assert layout.rope_factor is None
    assert len({layout, replace(layout)}) == 1


def test_bytes_follow_the_dtype() -> None:
    layout = kv_layout(shipped("llama-3.1-8b"))
    assert replace(layout, dtype="float32").bytes_per_token == 2 * layout.bytes_per_token


def test_a_missing_field_is_named() -> None:
    config = shipped("llama-3.1-8b")
    del config["vocab_size"]
    with pytest.raises(KeyError, match="vocab_size"):
        kv_layout(config)
