"""`qsun doctor` and `qsun inspect`: what is here, and what mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.builders import tiny_model
from tests.command import run_qsun

REPOSITORY = Path(__file__).parent.parent


def test_the_doctor_names_what_it_found() -> None:
    outcome = run_qsun("doctor")
    assert "transformers: 5.17.0" in outcome.stdout
    assert "disk: " in outcome.stdout
    assert outcome.exit_code == (8 if "PROBLEM" in outcome.stdout else 0)


def test_the_doctor_misses_the_serving_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSUN_SERVING_PYTHON", "/nowhere/python")
    outcome = run_qsun("doctor")
    assert outcome.exit_code == 8
    assert "PROBLEM  serving environment: " in outcome.stdout
    assert "/nowhere/python" in outcome.stdout
    assert "-> make setup" in outcome.stdout
    assert "1 problem(s) found" in outcome.message


def test_the_doctor_speaks_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSUN_SERVING_PYTHON", "/nowhere/python")
    findings = json.loads(run_qsun("doctor", "--json").stdout)
    problems = [finding for finding in findings if finding["level"] == "problem"]
    assert [problem["about"] for problem in problems] == ["serving environment"]
    assert problems[0]["remedy"] == "make setup"


def test_inspect_a_full_precision_model(tiny_folder: Path) -> None:
    found = json.loads(run_qsun("inspect", tiny_folder, "--json").stdout)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["dtype"] == "bfloat16"
    assert found["tied_embeddings"] is True
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2
    assert found["scheme"] is None
    assert found["weight_bytes"] == (tiny_folder / "model.safetensors").stat().st_size


def test_inspect_a_sharded_model_without_tied_embeddings(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", tied=False, max_shard_size="200KB")
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    found = json.loads(run_qsun("inspect", tmp_path / "model", "--json").stdout)
    assert found["tied_embeddings"] is False
    assert found["weight_bytes"] == sum(shard.stat().st_size for shard in shards)


def test_inspect_a_decode_module(tiny_module: Path) -> None:
    outcome = run_qsun("inspect", tiny_module)
    assert outcome.exit_code == 0, outcome.stderr
    assert "W4A16 asymmetric, group 32, compressed-tensors" in outcome.stdout
    assert "records/quantization.json, all files match" in outcome.stdout
    found = json.loads(run_qsun("inspect", tiny_module, "--json").stdout)
    assert found["quantized_layers"] == 14
    tensors = load_file(tiny_module / "model.safetensors")
    quantized = sum(t.nbytes for name, t in tensors.items() if ".weight_" in name)
    assert found["quantized_layer_bytes"] == quantized


def test_inspect_a_decode_module_that_was_changed(tiny_module: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_module, tmp_path / "module")
    (folder / "chat_template.jinja").write_text("something else")
    (folder / "tokenizer.json").unlink()
    outcome = run_qsun("inspect", folder)
    assert outcome.exit_code == 4
    assert "2 files changed" in outcome.stdout
    assert "is not what its record says" in outcome.message
    assert "chat_template.jinja" in outcome.message
    assert "tokenizer.json" in outcome.message


def test_inspect_a_config_alone() -> None:
    path = REPOSITORY / "configs" / "models" / "llama-3.1-8b" / "config.json"
    outcome = run_qsun("inspect", path)
    assert outcome.exit_code == 0
    assert json.loads(run_qsun("inspect", path, "--json").stdout)["kv"]["rope_parameters"] == {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    assert "32 layers x 8 heads x 128, 131072 bytes a token" in outcome.stdout
    assert "llama3, theta 500000, factor 8, 131072 tokens" in outcome.stdout


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "empty"])
def test_inspect_what_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("shopping")
    (tmp_path / "empty").mkdir()
    outcome = run_qsun("inspect", tmp_path / name)
    assert outcome.exit_code == 4
    assert str(tmp_path / name) in outcome.message
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_inspect_a_config_beyond_qsun(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    shipped = REPOSITORY / "configs" / "models" / "llama-3.1-8b" / "config.json"
    config = json.loads(shipped.read_text()) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    outcome = run_qsun("inspect", path)
    assert outcome.exit_code == 4
    assert named in outcome.message
