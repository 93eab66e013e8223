"""Engine qsun's checkpoints: layers go in and come back, and others read them as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsun import packed_checkpoint
from qsun.decode_checkpoint import (
    DecodeCheckpoint,
    QuantizedLayer,
    load_dequantized,
    weights_digest,
)
from qsun.models import load_model
from qsun.packed_checkpoint import write_packed
from qsun.scheme import Scheme
from tests.builders import model_config, tensors_on_disk, tiny_model, write_config
from tests.command import run_qsun

GROUP_SIZE = 32
CONFIG = {**model_config().to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
OTHERS = {
    "model.norm.weight": torch.rand(64).to(torch.bfloat16),
    "model.embed_tokens.weight": torch.rand(50, 64).to(torch.bfloat16),
}
QUICK = {"sweeps": 1, "positions": "all"}


def layers(bits: int, symmetric: bool) -> list[QuantizedLayer]:
    """Layers of all codes and zeros that there are; 44 rows fill no whole number of words."""
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.int8, generator=generator)

    return [
        QuantizedLayer(
            f"model.layers.{index}.mlp.up_proj",
            draw(44, inputs),
            torch.zeros(44, inputs // GROUP_SIZE, dtype=torch.int8)
            if symmetric
            else draw(44, inputs // GROUP_SIZE),
            torch.rand(44, inputs // GROUP_SIZE, generator=generator).to(torch.bfloat16),
        )
        for index, inputs in enumerate((64, 96, 32))
    ]


def written(folder: Path, bits: int = 4, symmetric: bool = False) -> list[QuantizedLayer]:
    made = layers(bits, symmetric)
    scheme = Scheme("compressed-tensors", bits, GROUP_SIZE, symmetric)
    write_packed(OTHERS.items(), made, CONFIG, scheme, ["lm_head"], folder)
    return made


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_come_back(tmp_path: Path, bits: int, symmetric: bool) -> None:
    made = written(tmp_path, bits, symmetric)
    with DecodeCheckpoint(tmp_path) as checkpoint:
        scheme = checkpoint.scheme
        assert (scheme.bits, scheme.group_size, scheme.symmetric) == (bits, GROUP_SIZE, symmetric)
        for before, after in zip(made, checkpoint.layers(), strict=True):
            assert after.name == before.name
            for part in ("codes", "zeros", "scales"):
                assert torch.equal(getattr(after, part), getattr(before, part)), part
                assert getattr(after, part).dtype == getattr(before, part).dtype
        others = dict(checkpoint.other_tensors())
    assert others.keys() == OTHERS.keys()
    assert all(torch.equal(others[name], OTHERS[name]) for name in OTHERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_several_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_checkpoint, "SHARD_BYTES", 2500)
    made = written(tmp_path)
    shards = {path.name: load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))}
    count = len(shards)
    assert count > 2
    assert list(shards) == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    bytes_of = {name: sum(one.nbytes for one in held.values()) for name, held in shards.items()}
    alone = [name for name, held in shards.items() if len(held) == 1]
    assert all(held <= 2500 or name in alone for name, held in bytes_of.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    assert index["metadata"]["total_size"] == sum(bytes_of.values())
    with DecodeCheckpoint(tmp_path) as checkpoint:
        read = [layer.digest() for layer in checkpoint.layers()]
    assert read == [layer.digest() for layer in made]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_model(folder, hidden=64, intermediate=96, tied=False)
    return folder


@pytest.fixture(scope="module")
def module(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What engine qsun makes of it."""
    return quantized(tmp_path_factory.mktemp("module"), base)


def quantized(folder: Path, base: Path, *options: str, **changes: Any) -> Path:
    engine = {"quantize__engine": "qsun", "quantize__search": QUICK}
    config = write_config(folder / "run", base, **(engine | changes))
    outcome = run_qsun("quantize", config, "--out", folder / "out", *options)
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "out"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_a_folder_is_as_the_other_engine_writes_it(
    base: Path, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    scheme = {"quantize__bits": bits, "quantize__symmetric": symmetric}
    module = quantized(tmp_path / "ours", base, **scheme)
    older = {"quantize__engine": "llmcompressor", "quantize__search": {}}
    other = quantized(tmp_path / "theirs", base, **scheme, **older)
    ours, theirs = config_of(module), config_of(other)
    for config in (ours, theirs):
        # How llm-compressor looked for ranges, which says nothing of what was found.
        del config["quantization_config"]["config_groups"]["group_0"]["weights"]["observer"]
    assert ours == theirs
    assert {path.name for path in module.iterdir()} == {path.name for path in other.iterdir()}
    stored = [
        {name: (one.dtype, one.shape) for name, one in tensors_on_disk(folder)}
        for folder in (module, other)
    ]
    assert stored[0] == stored[1]


TOKENS = torch.tensor([[5, 77, 300, 41, 9, 123, 8, 450]])


def test_format_awq_holds_the_same_module(base: Path, module: Path, tmp_path: Path) -> None:
    other = quantized(tmp_path, base, "--format", "awq")
    with DecodeCheckpoint(other) as checkpoint:
        assert checkpoint.scheme.format == "awq"
    assert weights_digest(other) == weights_digest(module)
    one, two = load_dequantized(module), load_dequantized(other)
    assert torch.equal(one(TOKENS).logits, two(TOKENS).logits)


def test_transformers_own_loader_computes_the_same(module: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(module, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        found, expected = theirs(TOKENS).logits, load_dequantized(module)(TOKENS).logits
    assert torch.equal(found, expected)


def test_what_smoothing_made_of_norms_is_written(base: Path, tmp_path: Path) -> None:
    smoothed = quantized(
        tmp_path, base, quantize__bits=8, quantize__search={**QUICK, "smoothing": "awq"}
    )
    norm = "model.layers.0.post_attention_layernorm.weight"
    before, after = (dict(tensors_on_disk(folder))[norm] for folder in (base, smoothed))
    assert not torch.equal(before, after)
    with torch.no_grad():
        expected = load_model(base, "bfloat16")(TOKENS).logits.float()
        found = load_dequantized(smoothed)(TOKENS).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()
