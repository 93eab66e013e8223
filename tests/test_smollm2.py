"""The main job on the real SmolLM2-135M-Instruct: both layouts, W3, and a damaged scale."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.checkpoint_files import Tensors
from qsun.config import LoadCheckConfig, load_config
from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.environments import find_serving_environment
from qsun.errors import LoadCheckError
from qsun.gemm_checkpoint import rewrite_as_gemm
from qsun.inspection import inspect
from qsun.jobs.prepare import prepare
from qsun.jobs.quantize import run_quantize
from qsun.models import load_tokenizer
from qsun.quantize.write import check_written
from qsun.records import read_record
from qsun.verify.load_check import Reference, check_load, make_reference, require_pass

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2-135m-w4-awq.yaml"
SERVED = ROOT / "configs" / "smollm2-135m-w3.yaml"
QUICK = (
    "quantize.calibration=quick-calibration.yaml",
    "quantize.heldout=quick-heldout.yaml",
    "quantize.grid_points=3",
    "load_check.prompts=12",
    "load_check.greedy_prompts=1",
)

LOCAL_BASE = "base.model=../base"  # the same weights, converted once for several runs


@dataclass(frozen=True)
class Quantized:
    """A published decode module and the result in its record."""

    folder: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def workplace(smollm2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped config and texts, smaller text sets beside them, and the base as a folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("configs", "calib"):
        shutil.copytree(ROOT / name, folder / name)
    for shipped, quick, samples in (
        ("math-tools", "quick-calibration", ("32", "4")),
        ("math-tools-served", "quick-served", ("128", "12")),
        ("heldout", "quick-heldout", ("64", "12")),
    ):
        text = (folder / "calib" / f"{shipped}.yaml").read_text(encoding="utf-8")
        shorter = text.replace(f"samples: {samples[0]}", f"samples: {samples[1]}")
        assert shorter != text
        (folder / "configs" / f"{quick}.yaml").write_text(shorter, encoding="utf-8")
    shutil.copytree(smollm2_base, folder / "base")
    (folder / "exports").symlink_to(ROOT / "exports")  # the prefill modules
    return folder


def quantize(workplace: Path, name: str, *changes: str, shipped: Path = CONFIG) -> Quantized:
    config = workplace / "configs" / shipped.name
    run = load_config(config, [*QUICK, *changes])
    out = workplace / name
    run_quantize(prepare(run, config, out, dry_run=False))
    record = read_record(out / "records" / "quantization.json", "quantization")
    return Quantized(out, record.result)


@pytest.fixture(scope="session")
def w4(workplace: Path) -> Quantized:
    return quantize(workplace, "w4", LOCAL_BASE)


@pytest.fixture(scope="session")
def w4_awq(w4: Quantized, workplace: Path) -> Path:
    """The same module in AutoAWQ's layout, as `qsun export --format awq` rewrites it."""
    folder = workplace / "w4-awq"
    rewrite_as_gemm(w4.folder, folder)
    return folder


@dataclass(frozen=True)
class Scored:
    """The quantized module in transformers, and what it makes of a few held-out prompts."""

    model: Any
    reference: Reference
    settings: LoadCheckConfig


@pytest.fixture(scope="session")
def scored(w4: Quantized) -> Scored:
    settings = LoadCheckConfig(prompts=8, greedy_prompts=1, greedy_tokens=8)
    model = load_dequantized(w4.folder)
    prompts = [
        "A train leaves at 3 pm and travels 60 miles an hour for 4 hours. How far does it go?",
        "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, n):",
        "The three largest oceans of the world are the Pacific, the Atlantic and the Indian.",
        "To make bread you need flour, water, salt and yeast, and a few hours of patience.",
    ]
    tokenizer = load_tokenizer(w4.folder)
    tokens = [tokenizer(prompt).input_ids for prompt in prompts]
    return Scored(model, make_reference(model, tokens, settings), settings)


def test_quantized_layers_take_at_most_0_30_of_their_16_bit_bytes(w4: Quantized) -> None:
    quantization = w4.result["quantization"]
    assert len(quantization["layers"]) == 7 * 30
    assert quantization["size_ratio"] <= 0.30
    on_disk = sum(path.stat().st_size for path in w4.folder.glob("*.safetensors"))
    assert on_disk < 0.5 * quantization["base_bytes"]


def test_awq_loses_less_than_round_to_nearest(w4: Quantized) -> None:
    perplexity = w4.result["quantization"]["perplexity"]
    assert perplexity["full_precision"] < perplexity["quantized"] < perplexity["round_to_nearest"]
    layers = w4.result["quantization"]["layers"]
    better = sum(layer["error"] < layer["rtn_error"] for layer in layers)
    assert better > len(layers) / 2
    # o_proj has nothing to smooth it through: AWQ leaves it as round-to-nearest has it.
    for layer in layers:
        if layer["name"].endswith("o_proj"):
            assert layer["error"] == pytest.approx(layer["rtn_error"], rel=0.05)
    for smoothing in w4.result["quantization"]["smoothing"]:
        assert smoothing["after"] <= smoothing["before"]


def test_three_bits_by_the_default_engine_are_far_below_round_to_nearest(workplace: Path) -> None:
    text, skip = "quantize.calibration=quick-served.yaml", "load_check.mode=skip"
    w3 = quantize(workplace, "w3", LOCAL_BASE, text, skip, shipped=SERVED)
    perplexity = w3.result["quantization"]["perplexity"]
    assert perplexity["quantized"] < 0.6 * perplexity["round_to_nearest"]
    assert w3.result["prefill"].keys() == {"math", "tools"}
    assert w3.result["load_check"] == {"mode": "skip"}


def test_vllm_computes_what_was_quantized(w4: Quantized) -> None:
    check = w4.result["load_check"]["quantized"]
    assert check["prompts"] == 12
    assert check["mean_difference"] <= 0.1
    assert check["answer"]


def test_vllm_computes_the_same_in_the_other_layout(w4_awq: Path, scored: Scored) -> None:
    serving = find_serving_environment()
    check = check_load(w4_awq, scored.reference, scored.model, serving, scored.settings)
    require_pass(check, scored.settings)


def test_noise_of_the_comparison_is_measured_beside_it(w4: Quantized) -> None:
    noise = w4.result["load_check"]["full_precision"]
    assert noise["prompts"] == 12
    assert 0 < noise["mean_difference"] <= 0.1


def test_both_formats_hold_the_same_module(w4: Quantized, w4_awq: Path) -> None:
    digests = {layer["name"]: layer["sha256"] for layer in w4.result["quantization"]["layers"]}
    with DecodeCheckpoint(w4.folder) as packed, DecodeCheckpoint(w4_awq) as gemm:
        assert str(packed.scheme) != str(gemm.scheme)
        check_written(gemm.layers(), digests)


def test_embeddings_stay_as_they_are(w4: Quantized, w4_awq: Path) -> None:
    name = "model.embed_tokens.weight"
    for folder in (w4.folder, w4_awq):
        with Tensors(folder) as tensors:
            assert "lm_head.weight" not in tensors  # tied, so neither stored nor quantized
            assert tensors[name].dtype == torch.bfloat16
            assert tensors[name].shape == (49152, 576)
    with Tensors(w4.folder) as ours, Tensors(w4_awq) as theirs:
        assert torch.equal(ours[name], theirs[name])


def test_the_record_knows_every_file(w4: Quantized) -> None:
    found = inspect(w4.folder)
    assert found.record
    assert found.files_changed == []
    assert set(w4.result["files"]) >= {"config.json", "tokenizer.json", "model.safetensors"}


def test_one_damaged_scale_fails_every_check(w4: Quantized, scored: Scored, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(w4.folder, damaged)
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight_scale"][0, 0] *= 256  # one bit of its exponent
    save_file(tensors, weights, metadata={"format": "pt"})

    digests = {layer["name"]: layer["sha256"] for layer in w4.result["quantization"]["layers"]}
    with DecodeCheckpoint(damaged) as checkpoint, pytest.raises(RuntimeError, match=name):
        check_written(checkpoint.layers(), digests)
    assert inspect(damaged).files_changed == ["model.safetensors"]

    serving = find_serving_environment()
    check = check_load(damaged, scored.reference, scored.model, serving, scored.settings)
    with pytest.raises(LoadCheckError, match="does not compute what was quantized"):
        require_pass(check, scored.settings)
    # Not even without the greedy texts.
    with pytest.raises(LoadCheckError, match="log-probabilities differ"):
        require_pass(replace(check, greedy_gaps=[]), scored.settings)


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="vLLM multiplies in int8 on AMX processors only"
)
def test_int8_activations_are_told_from_16_bit_ones(w4: Quantized, scored: Scored) -> None:
    serving = find_serving_environment()
    sixteen = w4.result["load_check"]["quantized"]["mean_difference"]
    eight = check_load(
        w4.folder,
        scored.reference,
        scored.model,
        serving,
        scored.settings,
        environment={"VLLM_CPU_INT4_W4A8": "1"},
    )
    assert eight.mean_difference > 1.5 * sixteen
