"""The plan: from shapes alone, with the sizes that the written module really has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsun.config import QuantizeConfig
from qsun.errors import PlanError
from qsun.quantize.mappings import FEEDS_CACHE, SMOOTHINGS, KvNeutralityError, assert_kv_neutral
from qsun.quantize.plan import Plan, make_plan
from qsun.skeleton import skeleton
from tests.builders import Architecture, model_config, tensors_on_disk


def plan_of(architecture: Architecture = "llama", **settings: Any) -> Plan:
    shape = {
        key: settings.pop(key) for key in ("hidden", "intermediate", "kv_heads") if key in settings
    }
    config = model_config(architecture, **shape).to_dict()
    config["architectures"] = [
        {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[architecture]
    ]
    settings = {"calibration": "c.yaml", "heldout": "h.yaml", "group_size": 32, **settings}
    return make_plan(config, skeleton(config).linears, QuantizeConfig(**settings))


def refusal(**settings: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(**settings)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_linear_layer_but_the_head_is_quantized(architecture: Architecture) -> None:
    plan = plan_of(architecture)
    blocks = [layer.name for layer in plan.layers if layer.name.startswith("model.layers.0.")]
    assert [name.rpartition(".")[2] for name in blocks] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert len(plan.layers) == 14
    assert plan.full_precision_layers == ("lm_head",)


def test_a_layer_is_kept_by_its_last_name_or_a_pattern() -> None:
    kept = ("lm_head", "down_proj", "model.layers.0.self_attn.o_proj")
    plan = plan_of(keep_full_precision=kept)
    assert plan.full_precision_layers == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    )
    assert not {layer.name for layer in plan.layers} & set(plan.full_precision_layers)


def test_fused_layers_are_kept_together_or_not_at_all() -> None:
    assert "gate_proj would stay" in refusal(keep_full_precision=("lm_head", "gate_proj"))
    plan = plan_of(keep_full_precision=("lm_head", "gate_proj", "up_proj"))
    assert len(plan.layers) == 10


def test_nothing_left_to_quantize_is_refused() -> None:
    assert "leaves no layer to quantize" in refusal(keep_full_precision=("*",))


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(4, False, 4 + 20 / 32), (4, True, 4 + 16 / 32), (3, False, 3 + 19 / 32), (8, True, 8.5)],
)
def test_bits_per_weight_count_scales_and_zeros(
    bits: int, symmetric: bool, expected: float
) -> None:
    assert plan_of(bits=bits, symmetric=symmetric).bits_per_weight == expected


def test_the_planned_bytes_are_those_on_disk(tiny_module: Path) -> None:
    found = sum(
        tensor.nbytes
        for name, tensor in tensors_on_disk(tiny_module)
        if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_zero_point")
    )
    assert plan_of().layer_bytes == found


def test_the_module_on_disk_holds_the_planned_layers(tiny_module: Path) -> None:
    found = {
        name.removesuffix(".weight_packed")
        for name, _ in tensors_on_disk(tiny_module)
        if name.endswith(".weight_packed")
    }
    assert {layer.name for layer in plan_of().layers} == found
    scheme = json.loads((tiny_module / "config.json").read_text())["quantization_config"]
    assert scheme["ignore"] == ["lm_head"]


def test_shards_must_hold_whole_groups() -> None:
    assert plan_of(intermediate=192, group_size=64).layers
    message = refusal(intermediate=192, group_size=64, tensor_parallel=2)
    assert "model.layers.1.mlp.down_proj (96 inputs)" in message
    assert "o_proj" not in message  # 128 inputs are two shards of one group each


def test_only_row_parallel_layers_have_their_inputs_sharded() -> None:
    kept = ("lm_head", "o_proj")
    plan = plan_of(
        hidden=64, intermediate=128, group_size=64, tensor_parallel=2, keep_full_precision=kept
    )
    assert {layer.in_features for layer in plan.layers} == {64, 128}


def test_no_fitting_group_size_says_what_else_helps() -> None:
    message = refusal(intermediate=80, group_size=64)
    assert "no group size fits every layer: list these under keep_full_precision" in message
    assert "model.layers.0.mlp.down_proj (80 inputs)" in message


def test_kv_heads_may_be_fewer_than_shards_or_divided_by_them() -> None:
    assert plan_of(kv_heads=4, tensor_parallel=4).layers
    assert plan_of(kv_heads=2, tensor_parallel=4).layers  # vLLM repeats KV heads
    assert "2 KV heads" in refusal(kv_heads=2, tensor_parallel=8)


def test_awq_words_hold_eight_output_channels() -> None:
    message = refusal(
        intermediate=36, group_size=32, format="awq", keep_full_precision=("down_proj", "lm_head")
    )
    assert "8 output channels a word" in message
    assert "model.layers.0.mlp.gate_proj first" in message


def test_no_smoothing_goes_through_what_feeds_the_cache() -> None:
    for smoothings in SMOOTHINGS.values():
        assert_kv_neutral(f"model.layers.0.{smoothing.source}" for smoothing in smoothings)


@pytest.mark.parametrize("layer", sorted(FEEDS_CACHE))
def test_a_smoothing_of_the_cache_is_caught(layer: str) -> None:
    with pytest.raises(KvNeutralityError, match=layer):
        assert_kv_neutral(["model.layers.0.input_layernorm", f"model.layers.3.self_attn.{layer}"])
