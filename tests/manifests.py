"""A manifest as an export makes it, for tests of what is made from manifests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qsun.bundle import Manifest, PrefillModule

KV_LAYOUT = {
    "layers": 30,
    "kv_heads": 3,
    "head_dim": 64,
    "dtype": "bfloat16",
    "rope_theta": 100000.0,
    "rope_type": "default",
    "rope_parameters": [],
    "sliding_window": None,
    "max_tokens": 8192,
    "vocabulary": 49152,
}


def prefill_module(task: str, rank: int | None = None, **changes: Any) -> PrefillModule:
    """A LoRA module where a rank is given, else a full one."""
    module = "full" if rank is None else "lora"
    return replace(
        PrefillModule(task, f"prefill/{task}", module, "sun", "n-1", rank=rank), **changes
    )


def manifest(**changes: Any) -> Manifest:
    """Two LoRA tasks, two full ones, a quantized decode module."""
    made = Manifest(
        name="Demo bundle",
        base={
            "model": "org/base-model",
            "revision": "abc123",
            "sha256": {"model.safetensors": "b0"},
        },
        base_path="base",
        decode_path="decode",
        decode_scheme="W4A16 asymmetric, group 64",
        tokenizer_path="tokenizer",
        boundary="n-1",
        kv_layout=KV_LAYOUT,
        kv_cache_dtype="auto",
        max_tokens=2048,
        prefill=(
            prefill_module("math", rank=8),
            prefill_module("tools", rank=33),
            prefill_module("code.v2"),
            prefill_module("SQL"),
        ),
        records=("records/quantization.json", "records/tuning-math.json"),
        files={"decode/model.safetensors": "d0"},
        versions={"torch": "2.13.0"},
        created="2026-11-22T00:00:00+00:00",
    )
    return replace(made, **changes)
