"""Which layers AWQ may smooth: qsun's own table, in which nothing that feeds the cache is rescaled.

A smoothing divides the outputs of one layer by a scale per channel and multiplies the inputs of
the layers it feeds by the same scale. Through a norm, `up_proj` included, K and V keep their
values. Through `v_proj` (AutoAWQ's and llm-compressor's default wherever shapes allow) V itself is
rescaled: right for one model, wrong for a decode module whose cache another module wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Smoothing:
    """`source`'s outputs are scaled down, the inputs of all `targets` are scaled up."""

    source: str
    targets: tuple[str, ...]


_NORM_MLP_SMOOTHINGS = (
    Smoothing("input_layernorm", ("q_proj", "k_proj", "v_proj")),
    Smoothing("post_attention_layernorm", ("gate_proj", "up_proj")),
    Smoothing("up_proj", ("down_proj",)),
)

SMOOTHINGS: dict[str, tuple[Smoothing, ...]] = {
    "LlamaForCausalLM": _NORM_MLP_SMOOTHINGS,
    "MistralForCausalLM": _NORM_MLP_SMOOTHINGS,
    "Qwen2ForCausalLM": _NORM_MLP_SMOOTHINGS,
    "Qwen3ForCausalLM": _NORM_MLP_SMOOTHINGS,
}

# vLLM runs each of these as one matrix: they must be quantized alike.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

FEEDS_CACHE = frozenset(
    {
        *("k_proj", "v_proj", "qkv_proj", "k_norm", "v_norm"),
        *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"),
    }
)


class KvNeutralityError(AssertionError):
    """A smoothing would change what cached keys and values mean: a defect of qsun, never of use."""


def assert_kv_neutral(sources: Iterable[str]) -> None:
    """Check the layers that a run will scale down, by full name, as its engine resolved them."""
    offenders = [name for name in sources if name.rpartition(".")[2] in FEEDS_CACHE]
    if offenders:
        raise KvNeutralityError(f"smoothing would rescale the KV cache through {offenders}")
