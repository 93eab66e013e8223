"""Perplexity block by block: the whole model's numbers, whatever the architecture and the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.block import Weights
from qsun.checkpoint_files import Tensors, read_config_file
from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.models import load_model
from qsun.quantize import block_perplexity
from qsun.quantize.block_perplexity import RoundedWeights, perplexity_by_blocks
from qsun.quantize.perplexity import perplexity
from qsun.rounding import round_layers
from qsun.scheme import Scheme
from tests.builders import VOCABULARY, Architecture, tiny_model

CPU = torch.device("cpu")
LAYERS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture(params=["llama", "qwen3"])
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return "qwen3" if request.param == "qwen3" else "llama"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, architecture: Architecture, tmp_path: Path) -> Path:
    tiny_model(tmp_path / "base", architecture=architecture, tied=request.param)
    return tmp_path / "base"


@pytest.fixture
def texts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(3)
    return [
        torch.randint(VOCABULARY, (count,), generator=drawn).tolist() for count in (2, 60, 33, 47)
    ]


def by_blocks(weights: Weights, folder: Path, texts: list[list[int]]) -> float:
    config = read_config_file(folder / "config.json")
    states: dict[str, torch.Tensor] = {}
    found = perplexity_by_blocks(weights, config, CPU, texts, states, "by blocks")
    assert states == {}
    return found


def test_it_is_the_whole_models(
    folder: Path, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_perplexity, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    wanted = perplexity(load_model(folder, "bfloat16"), texts, "whole")
    assert by_blocks(Tensors(folder), folder, texts) == pytest.approx(wanted, rel=1e-5)


def test_rounded_to_nearest_too(folder: Path, texts: list[list[int]]) -> None:
    model = load_model(folder, "bfloat16")
    names = [f"model.layers.{index}.{name}" for index in range(2) for name in LAYERS]
    full = perplexity(model, texts, "whole")
    round_layers(model, names, Scheme("compressed-tensors", 3, 32, False))
    args = QuantizationArgs(num_bits=3, symmetric=False, strategy="group", group_size=32)
    rounded = RoundedWeights(Tensors(folder), dict.fromkeys(names, args), torch.bfloat16, CPU)
    wanted = perplexity(model, texts, "whole")
    assert by_blocks(rounded, folder, texts) == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted / full - 1) > 1e-3


def test_a_written_module_too(tiny_module: Path, texts: list[list[int]]) -> None:
    wanted = perplexity(load_dequantized(tiny_module), texts, "whole")
    with DecodeCheckpoint(tiny_module) as checkpoint:
        assert by_blocks(checkpoint, tiny_module, texts) == pytest.approx(wanted, rel=1e-5)
