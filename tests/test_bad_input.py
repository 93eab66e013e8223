"""Configs and plans that cannot work: refused with a message that says what would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, Phi3Config

from tests.builders import CONTEXT, tiny_model, write_config, write_definition
from tests.command import refused, run_qsun

SMOLLM2 = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def test_three_mistakes_are_all_named(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__grop_size=64, quantize__bits=5, sede=1)
    message = refused(config, 3)
    assert "3 mistake(s)" in message
    assert "quantize.grop_size: no such setting (did you mean group_size?)" in message
    assert "quantize.bits: 5 is not one of 2, 3, 4, 8" in message
    assert "sede: no such setting (did you mean seed?)" in message


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path / "nothing.yaml", 3)
    assert f"cannot read {tmp_path / 'nothing.yaml'}: No such file or directory" in message


def test_a_config_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: [tiny\n")
    assert "run.yaml is not valid YAML" in refused(tmp_path / "run.yaml", 3)


def test_a_missing_definition_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__calibration="../nowhere.yaml")
    assert "nowhere.yaml: No such file or directory" in refused(config, 3)


def test_a_definition_names_all_its_mistakes(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder)
    write_definition(
        tmp_path / "calibration.yaml",
        {"name": "one", "kind": "jsonl", "response": "answer"},
        {"name": "two", "kind": "jsonl", "path": "x.jsonl", "text": "a", "prompt": "b"},
        min_tokens=90,
    )
    message = refused(config, 3)
    assert "calibration.yaml has 5 mistake(s)" in message
    assert "min_tokens is above max_tokens" in message
    assert "source one: kind jsonl needs path" in message
    assert "source one: give one of text, prompt or messages, not none" in message
    assert "source one: response needs a prompt beside it" in message
    assert "source two: give one of text, prompt or messages, not ['text', 'prompt']" in message


@pytest.mark.parametrize("weight", [".nan", ".inf"])
def test_a_weight_that_is_no_number_is_refused(
    tmp_path: Path, tiny_folder: Path, weight: str
) -> None:
    config = write_config(tmp_path, tiny_folder)
    path = tmp_path / "calibration.yaml"
    path.write_text(path.read_text().replace("  path:", f"  weight: {weight}\n  path:"))
    assert "weight" in yaml.safe_load(path.read_text())["sources"][0]
    assert "sources[0].weight" in refused(config, 3)


def test_samples_longer_than_the_models_context(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder)
    for name, tokens in (("calibration", 4096), ("heldout", CONTEXT + 1)):
        write_definition(tmp_path / f"{name}.yaml", max_tokens=tokens)
    message = refused(config, 3)
    for name, tokens in (("calibration", 4096), ("heldout", CONTEXT + 1)):
        limit = f"max_tokens {tokens} is above the model's max_position_embeddings {CONTEXT}"
        assert f"{name}.yaml: {limit}" in message
    assert f"Lower max_tokens to {CONTEXT} or less" in message


def test_a_sample_may_fill_the_models_context(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder)
    write_definition(tmp_path / "calibration.yaml", max_tokens=CONTEXT)
    assert run_qsun("quantize", config, "--dry-run").exit_code == 0


def test_group_size_128_does_not_fit_smollm2(tmp_path: Path) -> None:
    SMOLLM2.save_pretrained(tmp_path / "model")  # a plan needs no weights
    message = refused(write_config(tmp_path, tmp_path / "model", quantize__group_size=128), 5)
    assert "group_size 128 does not divide the inputs of 180 of 210 layers" in message
    assert "576 inputs" in message
    assert "group_size 64 or 32 fits every layer" in message
    assert "model.layers.0.self_attn.q_proj" in message


@pytest.mark.parametrize("change", [{"quantize__bits": 3}, {"quantize__symmetric": True}])
def test_awq_format_holds_4_bit_asymmetric_alone(
    tmp_path: Path, tiny_folder: Path, change: dict[str, object]
) -> None:
    message = refused(write_config(tmp_path, tiny_folder, quantize__format="awq", **change), 5)
    assert "packs asymmetric codes in 4 bits only" in message
    assert "or symmetric false with bits 4, or with stored_bits 4 and fewer" in message


def test_the_format_flag_wins_over_set_and_file(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__bits=4)
    options = ["--set", "quantize.bits=8", "--set", "quantize.format=compressed-tensors"]
    assert "asymmetric codes in 4 bits" in refused(config, 5, *options, "--format", "awq")


def test_tensor_parallel_must_divide_heads_and_layers(tmp_path: Path, tiny_folder: Path) -> None:
    message = refused(write_config(tmp_path, tiny_folder), 5, "--tensor-parallel", "3")
    assert "tensor_parallel 3 does not divide the model's 4 attention heads" in message
    assert "model.layers.0.self_attn.q_proj (128 features)" in message


def test_a_group_must_fit_the_shard_and_not_only_the_layer(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", intermediate=192)
    config = write_config(tmp_path, tmp_path / "model", quantize__group_size=64)
    message = refused(config, 5, "--tensor-parallel", "2")
    assert "2 of 14 layers (96 inputs, sharded 2 ways); group_size 32 fits every layer" in message
    assert "model.layers.0.mlp.down_proj (96 inputs)" in message


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_an_unsupported_architecture_lists_the_supported(tmp_path: Path, model_type: str) -> None:
    config = {
        "phi3": Phi3Config(architectures=["Phi3ForCausalLM"]),
        "gpt2": GPT2Config(architectures=["GPT2LMHeadModel"]),
    }[model_type]
    config.save_pretrained(tmp_path / "model")
    message = refused(write_config(tmp_path, tmp_path / "model"), 5)
    assert f"architecture {config.architectures[0]} is not supported" in message
    assert "LlamaForCausalLM" in message
    assert "Qwen3ForCausalLM" in message


def test_a_base_that_is_quantized_already_is_refused(tmp_path: Path, tiny_module: Path) -> None:
    assert "is already quantized" in refused(write_config(tmp_path, tiny_module), 5)


def test_half_of_a_fused_matrix_cannot_be_kept(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(
        tmp_path,
        tiny_folder,
        quantize__keep_full_precision=["lm_head", "layers.1.*.v_proj", "v_prj"],
    )
    config.write_text(config.read_text().replace("layers.1", "model.layers.1"))
    message = refused(config, 5)
    assert (
        "model.layers.1.self_attn.v_proj would stay in full precision but q_proj, k_proj" in message
    )
    assert "'v_prj' matches no linear layer" in message


def test_three_bits_cannot_pass_a_load_check(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__bits=3, load_check__mode="required")
    message = refused(config, 5)
    assert "no kernel for 3-bit weights" in message
    assert "--set quantize.stored_bits=4" in message
    assert "--set load_check.mode=skip" in message


def test_8_bits_fit_into_no_kernel_of_a_cpu(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__bits=8, load_check__mode="required")
    message = refused(config, 5)
    assert "no kernel for 8-bit weights" in message
    assert "stored_bits" not in message


def test_bits_by_layer_are_refused_where_some_could_not_be_served(
    tmp_path: Path, tiny_folder: Path
) -> None:
    settings = {"quantize__engine": "qsun", "quantize__search": {"positions": "all"}}
    config = write_config(tmp_path, tiny_folder, load_check__mode="required", **settings)
    message = refused(config, 5, "--target-bits", "3.25")
    assert "no kernel for 2 and 3 and 8-bit weights" in message
    assert "--set quantize.stored_bits=4" in message


def test_bits_by_layer_are_engine_qsuns(tmp_path: Path, tiny_folder: Path) -> None:
    message = refused(write_config(tmp_path, tiny_folder), 5, "--target-bits", "3.25")
    assert "target_bits is engine qsun's, and engine is llmcompressor" in message


def test_more_bits_than_a_layer_may_have_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    settings = {"quantize__engine": "qsun", "quantize__search": {"positions": "all"}}
    config = write_config(tmp_path, tiny_folder, quantize__stored_bits=4, **settings)
    message = refused(config, 5, "--target-bits", "4.5")
    assert "target_bits 4.5 is above the 4 bits that a layer may have" in message


def test_an_unknown_option_is_a_usage_error(tmp_path: Path, tiny_folder: Path) -> None:
    outcome = run_qsun("quantize", write_config(tmp_path, tiny_folder), "--grop-size", "64")
    assert outcome.exit_code == 2
    assert "No such option '--grop-size'" in outcome.stderr


def test_a_dry_run_needs_no_weights(tmp_path: Path, tiny_folder: Path) -> None:
    shape = str(tiny_folder / "config.json")
    config = write_config(tmp_path, "no-org/no-model", base__config=shape)
    outcome = run_qsun("quantize", config, "--dry-run", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert len(json.loads(outcome.stdout)["plan"]["layers"]) == 2 * 7
    assert "--dry-run plans from" in refused(config, 4)
