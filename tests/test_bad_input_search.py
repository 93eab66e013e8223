"""Searches of engine qsun that cannot work: refused before any weight is opened, with a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.builders import tiny_model, write_definition, write_jsonl
from tests.command import refused, run_qsun
from tests.searching import PREFILL, write_search

OPENED = "opening the base model"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "copy"
    write_search(folder)
    return folder


@pytest.fixture
def config(written: Path, tmp_path: Path) -> Path:
    """The config of a search that works; `run` and what lies beside it are a copy."""
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy" / "run" / "run.yaml"


def settings(**search: Any) -> list[str]:
    return [f"--set=quantize.search.{name}={json.dumps(value)}" for name, value in search.items()]


def source(name: str, **columns: str) -> dict[str, str]:
    return {"name": name, "kind": "jsonl", "path": "sums.jsonl", **columns}


def change_adapter(config: Path, **changes: Any) -> None:
    path = config.parent.parent / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_refused_here_works_otherwise(config: Path) -> None:
    outcome = run_qsun("quantize", config, "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr


def test_the_other_engine_has_no_such_settings(config: Path) -> None:
    message = refused(config, 3, "--engine", "llmcompressor")
    assert "quantize.search is engine qsun's, and quantize.engine is llmcompressor" in message


def test_an_engine_that_there_is_not(config: Path) -> None:
    message = refused(config, 3, "--set", "quantize.engine=gptq")
    assert "quantize.engine: 'gptq' is not one of qsun, llmcompressor" in message


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("positions", "answers", "'answers' is not one of responses, all"),
        ("rounding", "up", "'up' is not one of compensated, nearest"),
        ("smoothing", "qsun", "'qsun' is not one of none, awq"),
        ("damping", 0, "0.0 is below 1e-06"),
        ("sweeps", 101, "101 is above 100"),
        ("batch_tokens", 0, "0 is below 1"),
        ("keep_every_s", -1, "-1.0 is below 0"),
        ("sweps", 1, "no such setting (did you mean sweeps?)"),
    ],
)
def test_a_setting_out_of_bounds(config: Path, setting: str, value: Any, said: str) -> None:
    message = refused(config, 3, *settings(**{setting: value}))
    assert f"quantize.search.{setting}: {said}" in message


def test_everything_that_contradicts_the_calibration_is_named(config: Path) -> None:
    chosen = [{**PREFILL[0], "task": "sms"}, PREFILL[1], PREFILL[1], {**PREFILL[0], "task": "zz"}]
    message = refused(config, 3, *settings(prefill=chosen, positions="all"))
    assert "this search cannot be made" in message
    assert (
        "quantize.search.prefill: the calibration has no source 'sms' (did you mean sums?)"
        in message
    )
    assert (
        "quantize.search.prefill: the calibration has no source 'zz' (known: sums, more)" in message
    )
    assert "quantize.search.prefill: task 'more' is named 2 times" in message
    assert "quantize.search.positions is all: whole texts are read by the decode module" in message
    assert "leave quantize.search.prefill out" in message
    assert message.count("\n  - ") == 4


def test_whole_texts_need_no_prefill_module(config: Path) -> None:
    options = settings(prefill=[], positions="all")
    assert run_qsun("quantize", config, "--dry-run", *options).exit_code == 0
    assert "quantize.search.positions is all" in refused(config, 3, *settings(positions="all"))


def test_sources_without_responses_are_all_named(config: Path) -> None:
    write_definition(
        config.parent / "calibration.yaml",
        source("sums", prompt="prompt"),
        source("more", prompt="prompt", response="response"),
        source("plain", text="prompt"),
    )
    message = refused(config, 3, *settings(prefill=[]))
    for name in ("sums", "plain"):
        assert f"source {name} has no responses" in message
    assert "source more" not in message
    assert "give it prompt and response, or set quantize.search.positions to all" in message
    options = settings(prefill=[], positions="all")
    assert run_qsun("quantize", config, "--dry-run", *options).exit_code == 0


def test_a_head_that_is_to_be_quantized(config: Path) -> None:
    base = config.parent.parent / "base"
    shutil.rmtree(base)
    tiny_model(base, hidden=64, intermediate=64, layers=4, tied=False)
    message = refused(config, 3, "--set", "quantize.keep_full_precision=[]")
    assert "lm_head is in no decoder block" in message
    assert "name it in quantize.keep_full_precision" in message


def test_missing_modules_are_all_named(config: Path) -> None:
    chosen = [{**one, "module": f"../nowhere-{one['task']}"} for one in PREFILL]
    message = refused(config, 4, *settings(prefill=chosen))
    assert "these modules write no cache for the base model" in message
    folder = config.parent.parent.resolve()
    for name in ("sums", "more"):
        assert f"task {name}: {folder / f'nowhere-{name}'} is not a model folder" in message


def test_a_module_of_another_kv_layout(config: Path) -> None:
    shutil.rmtree(config.parent.parent / "full")
    tiny_model(config.parent.parent / "full", hidden=64, intermediate=64, layers=4, kv_heads=1)
    message = refused(config, 4)
    assert "task more: another KV layout than the base model's (base, module): " in message
    assert "kv_heads" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern {'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern {'q_proj': 8}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication [[0, 4], [2, 4]]"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens [3, 4]"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_is_more_than_plain_lora(
    config: Path, changes: dict[str, Any], said: str
) -> None:
    change_adapter(config, **changes)
    message = refused(config, 4)
    assert f"lora uses {said}: qsun merges plain LoRA alone" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter: qsun reads LORA"),
        ({"r": 8}, "shape [4, 64], rank 8 in adapter_config.json"),
        ({"r": 0}, "gives no rank r above 0 and no lora_alpha"),
        ({"lora_alpha": None}, "gives no rank r above 0 and no lora_alpha"),
    ],
)
def test_an_adapter_whose_config_is_not_its_own(
    config: Path, changes: dict[str, Any], said: str
) -> None:
    change_adapter(config, **changes)
    message = refused(config, 4)
    assert "task sums: " in message
    assert said in message


def test_half_an_adapter(config: Path) -> None:
    path = config.parent.parent / "lora" / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"]
    save_file(weights, path)
    message = refused(config, 4)
    assert "lora is no whole adapter" in message
    assert "model.layers.2.mlp.up_proj: lora_B is missing" in message


def test_an_adapter_of_another_model(config: Path) -> None:
    shutil.rmtree(config.parent.parent / "base")
    tiny_model(config.parent.parent / "base", hidden=64, intermediate=96, layers=4)
    message = refused(config, 4, *settings(prefill=PREFILL[:1]))
    assert "lora was not trained on this base model: these tensors fit no layer of it" in message
    assert "model.layers.0.mlp.down_proj.lora_A.weight [4, 64]" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(config: Path, name: str) -> None:
    (config.parent.parent / "lora" / name).write_bytes(b"{")
    message = refused(config, 4)
    assert f"{name} cannot be read" in message


def test_no_module_is_opened_before_a_refusal(config: Path) -> None:
    change_adapter(config, use_dora=True)
    outcome = run_qsun("quantize", config, "--out", config.parent / "out")
    assert outcome.exit_code == 4
    assert OPENED not in outcome.stderr


def test_a_source_of_which_no_response_is_left(config: Path) -> None:
    long = "word " * 60
    write_jsonl(config.parent / "long.jsonl", [{"prompt": long, "response": "No."}] * 4)
    columns = {"prompt": "prompt", "response": "response"}
    write_definition(
        config.parent / "calibration.yaml",
        source("sums", **columns),
        {**source("more", **columns), "path": "long.jsonl"},
        max_tokens=40,
    )
    message = refused(config, 6)
    assert "no sample of more keeps a response within max_tokens 40: raise it" in message
    assert "or set quantize.search.positions to all" in message
