"""The estimate: hours, memory and disk of an evaluation, from shapes and counts alone.

Time is a floor. Each step of generation reads all weights and the batch's cache once at the
memory's bandwidth, and a batch takes as many steps as its longest answer, which is taken to reach
the limit. Python between kernels comes on top, and for small models is most of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsun.evaluate.systems import System
from qsun.kv_layout import kv_layout
from qsun.skeleton import Skeleton

BANDWIDTH = 4.3e12  # bytes/s that an H200 reads, of 4.8 by its data sheet
PREFILL_FLOPS = 0.4 * 989e12  # assumed: 40 % of an H200's dense bfloat16
VALUE_BYTES = 2
CHARACTER_BYTES, SAMPLE_BYTES = 4, 400  # of a token's text, and of the rest of a sample's line
LIBRARY_BYTES = 1_000_000_000  # CUDA's context and kernels


@dataclass(frozen=True)
class Asked:
    """A test set: prompts, their mean tokens, the longest answer; `told`: where that is from."""

    prompts: int
    prompt_tokens: float
    new_tokens: int
    told: str


FEW_SHOT = "lm-eval's own, {} shots: rows known, lengths assumed"
# Rows of lm-eval 0.4.13's own tasks, about the tokens of a prompt with its few shots, and the
# longest answer. Their rows are on the Hub, which a dry run does not ask.
LM_EVAL = {
    "gsm8k": Asked(1319, 900, 256, FEW_SHOT.format(5)),
    "gsm_plus": Asked(10_552, 900, 256, FEW_SHOT.format(5)),
    "humaneval": Asked(164, 180, 1024, FEW_SHOT.format(0)),
    "humaneval_plus": Asked(164, 180, 1024, FEW_SHOT.format(0)),
    "mbpp": Asked(500, 700, 256, FEW_SHOT.format(3)),
}
UNKNOWN = Asked(1000, 512, 256, "assumed: its rows cannot be read here")


@dataclass(frozen=True)
class EvaluationEstimate:
    """What an evaluation is expected to need. `gpu_hours` are by test set, all its systems."""

    gpu_hours: Mapping[str, float]
    memory: Mapping[str, int]
    samples_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What the GPU holds at most."""
        return sum(self.memory.values())


def prefill_flops(config: Mapping[str, Any], shape: Skeleton, asked: Asked) -> float:
    """2 FLOPs a weight of the layers and token, 4 A L for each pair of a prompt's tokens."""
    layout, heads = kv_layout(config), config["num_attention_heads"]
    pairs = asked.prompt_tokens**2 / 2
    attention = 4 * heads * layout.head_dim * layout.layers * pairs
    return float(asked.prompts * (2 * _block_weights(shape) * asked.prompt_tokens + attention))


def decode_s(config: Mapping[str, Any], shape: Skeleton, asked: Asked, batch_size: int) -> float:
    """Batches x steps x (bytes of weights and of the batch's cache, half grown) / bandwidth.

    Weights are D's as qsun evaluates it, dense bfloat16 even where quantized, the embeddings left
    out where the head has weights of its own.
    """
    table = 0 if "lm_head.weight" in shape.tied else config["vocab_size"] * config["hidden_size"]
    weights = VALUE_BYTES * (shape.parameters - table)
    rows = min(batch_size, asked.prompts)
    cached = rows * (asked.prompt_tokens + asked.new_tokens / 2)
    step_bytes = weights + cached * kv_layout(config).bytes_per_token
    return math.ceil(asked.prompts / rows) * asked.new_tokens * step_bytes / BANDWIDTH


def memory_parts(
    config: Mapping[str, Any], shape: Skeleton, asked: Mapping[str, Asked], pairs: bool, rows: int
) -> dict[str, int]:
    """P and D at 2 bytes a parameter, one of them where no system has two; a batch's longest cache.

    Passes over prompts keep one layer's activations: hidden states four times, the MLP's thrice.
    """
    longest = max(one.prompt_tokens + one.new_tokens for one in asked.values())
    prompt = max(one.prompt_tokens for one in asked.values())
    widths = 4 * config["hidden_size"] + 3 * config["intermediate_size"]
    return {
        "modules": (2 if pairs else 1) * VALUE_BYTES * shape.parameters,
        "KV cache of a batch": int(rows * longest * kv_layout(config).bytes_per_token),
        "activations": int(rows * prompt * widths * VALUE_BYTES),
        "CUDA": LIBRARY_BYTES,
    }


def estimate(
    config: Mapping[str, Any],
    shape: Skeleton,
    asked: Mapping[str, Asked],
    systems: Mapping[str, list[System]],
    batch_size: int,
) -> EvaluationEstimate:
    """What asking every test set's `systems` is expected to need; TPOT in vLLM is left out.

    Samples on disk: an answer's text at 4 bytes a token and 400 bytes beside it, before gzip.
    """
    hours, disk = {}, 0
    for name, one in asked.items():
        each_s = prefill_flops(config, shape, one) / PREFILL_FLOPS
        each_s += decode_s(config, shape, one, batch_size)
        hours[name] = len(systems[name]) * each_s / 3600
        line = CHARACTER_BYTES * one.new_tokens + SAMPLE_BYTES
        disk += len(systems[name]) * one.prompts * line
    pairs = any(not one.one_model for found in systems.values() for one in found)
    return EvaluationEstimate(hours, memory_parts(config, shape, asked, pairs, batch_size), disk)


def _block_weights(shape: Skeleton) -> int:
    return sum(
        one.in_features * one.out_features
        for one in shape.linears
        if not one.name.startswith("lm_head")
    )
