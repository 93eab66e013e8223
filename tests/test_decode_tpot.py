"""The plan of the TPOT sweeps on GPUs: formats that compressed-tensors knows, and honest floors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig

from qsun.skeleton import skeleton
from tests.gpu.decode_tpot import FORMATS, Format, shape_config, step_bytes, sweeps

SHAPE = "llama-3.1-8b"


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_a_format_is_one_of_compressed_tensors(one: Format) -> None:
    quantization = one.quantization()
    if quantization is None:
        assert one.weight_bits == 16
        return
    found = QuantizationConfig(**quantization)
    assert found.format == one.packing
    (scheme,) = found.config_groups.values()
    assert scheme.weights.num_bits == int(one.weight_bits)
    assert (scheme.input_activations is None) == ("W4A16" in one.name)


def test_a_step_reads_every_weight_but_the_embeddings_once() -> None:
    config = shape_config(SHAPE)
    read = skeleton(config).parameters - config["vocab_size"] * config["hidden_size"]
    full = step_bytes(SHAPE, FORMATS[0], 0, 0)
    assert full == pytest.approx(2 * read, rel=1e-4)  # norms aside
    assert step_bytes(SHAPE, FORMATS[0], 4, 1000) - full == 4 * 1000 * 2 * 32 * 8 * 128 * 2
    four = next(one for one in FORMATS if one.name == "W4A16 symmetric")
    head = 2 * config["vocab_size"] * config["hidden_size"]
    assert step_bytes(SHAPE, four, 0, 0) - head == pytest.approx(
        (full - head) * (4 + 16 / 128) / 16, rel=1e-4
    )


def test_every_sweep_has_a_model_and_a_place_of_its_own(tmp_path: Path) -> None:
    found = list(sweeps([SHAPE, "qwen3-8b-base"], tmp_path, ""))
    assert len({one.name for one in found}) == len(found) == 2 * len(FORMATS)
    for one in found:
        config = json.loads((one.write_model() / "config.json").read_text())
        assert config.get("quantization_config") == one.format.quantization()
        command = one.job("python", "1", "512").command()
        assert (command[0] == "env") == bool(one.format.disabled)
    assert [
        one.shape for one in sweeps([SHAPE, "qwen3-8b-base"], tmp_path, "qwen3-8b-base-fp8")
    ] == ["qwen3-8b-base"]
