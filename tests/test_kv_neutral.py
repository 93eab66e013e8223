"""Cached K and V keep their meaning: measured where smoothing through `v_proj` would break it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import default_mappings
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from qsun.config import QuantizeConfig
from qsun.quantize.awq import (
    KvNeutralAwq,
    _no_pinning_without_accelerator,
    apply_awq,
)
from qsun.quantize.mappings import KvNeutralityError, assert_kv_neutral
from qsun.quantize.plan import Plan, make_plan
from qsun.rounding import round_to_nearest
from qsun.skeleton import skeleton
from tests.builders import problems, tiny_model, tiny_tokenizer

OUTLIER = 30.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MHA Llama, four channels of V in every head thirty times as large as the rest."""
    folder = tmp_path_factory.mktemp("mha")
    model = tiny_model(folder, "llama", kv_heads=4, dtype=torch.float32)
    for layer in model.model.layers:
        rows = layer.self_attn.v_proj.weight.data
        rows.view(4, 32, -1)[:, :4] *= OUTLIER
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(" ".join(row.values())).input_ids for row in problems(8, seed=5)]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plan_of(model: PreTrainedModel) -> Plan:
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    settings = QuantizeConfig(calibration="", heldout="", group_size=32)
    return make_plan(config, skeleton(config).linears, settings)


def cache_of(model: PreTrainedModel, text: list[int], which: str) -> torch.Tensor:
    with torch.no_grad():
        cache = model(torch.tensor([text]), use_cache=True).past_key_values
    return torch.stack([getattr(layer, which) for layer in cache.layers])


def cache_error(model: PreTrainedModel, base: Path, text: list[int], which: str) -> float:
    exact = cache_of(load(base), text, which)
    return float((cache_of(model, text, which) - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def rounded(base: Path) -> PreTrainedModel:
    model = load(base)
    plan = plan_of(model)
    for layer in plan.layers:
        weight = model.get_submodule(layer.name).weight
        weight.data.copy_(round_to_nearest(weight, QuantizationArgs(**plan.arguments)))
    return model


@pytest.mark.parametrize("which", ["keys", "values"])
def test_the_cache_is_as_true_as_round_to_nearest_leaves_it(
    which: str, base: Path, rounded: PreTrainedModel, texts: list[list[int]]
) -> None:
    model = load(base)
    apply_awq(model, tiny_tokenizer(), plan_of(model), texts, grid_points=20)
    ours = cache_error(model, base, texts[0], which)
    assert ours <= 1.1 * cache_error(rounded, base, texts[0], which)


def test_the_default_mapping_changes_what_v_means(
    base: Path, rounded: PreTrainedModel, texts: list[list[int]]
) -> None:
    model = load(base)
    run_default_mappings(model, texts, AWQModifier(mappings=default_mappings))
    theirs = cache_error(model, base, texts[0], "values")
    assert theirs > 1.1 * cache_error(rounded, base, texts[0], "values")


def test_a_run_with_the_default_mapping_is_stopped(base: Path, texts: list[list[int]]) -> None:
    model = load(base)
    with pytest.raises(KvNeutralityError, match="v_proj"):
        run_default_mappings(model, texts, KvNeutralAwq(mappings=default_mappings))
    assert torch.equal(
        model.model.layers[0].self_attn.v_proj.weight,
        load(base).model.layers[0].self_attn.v_proj.weight,
    )


@pytest.mark.parametrize("layer", ["k_proj", "v_proj", "qkv_proj", "kv_a_layernorm", "k_norm"])
def test_every_layer_that_feeds_the_cache_is_guarded(layer: str) -> None:
    with pytest.raises(KvNeutralityError, match=layer):
        assert_kv_neutral(["model.layers.0.input_layernorm", f"model.layers.3.self_attn.{layer}"])
    assert_kv_neutral(["model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"])


def run_default_mappings(
    model: PreTrainedModel, texts: list[list[int]], smoother: AWQModifier
) -> None:
    plan = plan_of(model)
    arguments = plan.arguments
    quantizer = QuantizationModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": arguments}},
        ignore=["lm_head"],
    )
    batches = [
        {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text)).long()}
        for text in texts
    ]
    with _no_pinning_without_accelerator():
        oneshot(
            model=model,
            tokenizer=tiny_tokenizer(),
            dataset=DataLoader(cast("Dataset[Any]", batches), batch_size=None),
            recipe=[smoother, quantizer],
            pipeline="sequential",
        )
