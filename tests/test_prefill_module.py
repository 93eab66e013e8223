"""Prefill modules on disk: what is written loads again, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.errors import ModelError
from qsun.models import load_model
from qsun.prefill_module import load_prefill, save_prefill
from tests.builders import tiny_model
from tests.reference import with_adapter


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    module = with_adapter(load_model(tiny_folder, "float32"))
    save_prefill(module, tmp_path / "adapter", torch.bfloat16, "org/base")
    return tmp_path / "adapter"


def test_an_adapter_comes_back_as_it_was_written(adapter: Path, tiny_folder: Path) -> None:
    module = load_prefill(adapter, tiny_folder, "bfloat16")
    loaded = dict(module.named_parameters())
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)
    assert not any(weight.requires_grad for weight in loaded.values())
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert not (adapter / "README.md").exists()


def test_a_checkpoint_comes_back_too(tiny_folder: Path) -> None:
    module = load_prefill(tiny_folder, tiny_folder, "bfloat16")
    assert not any(weight.requires_grad for weight in module.parameters())


def test_an_adapter_of_another_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "wide", hidden=192)
    with pytest.raises(ModelError, match="fit no layer") as caught:
        load_prefill(adapter, tmp_path / "wide", "bfloat16")
    assert "layers.0.self_attn.q_proj" in str(caught.value)


def test_an_adapter_for_layers_that_are_not_there_is_refused(
    adapter: Path, tiny_folder: Path
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    stray = {name.replace("q_proj", "w_pack"): tensor for name, tensor in weights.items()}
    save_file(stray, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="w_pack"):
        load_prefill(adapter, tiny_folder, "bfloat16")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", '{"peft_type": "IA3"}', "IA3 adapter: qsun reads LORA"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_model.safetensors", "no tensors", "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused(
    adapter: Path, tiny_folder: Path, name: str, content: str, said: str
) -> None:
    (adapter / name).write_text(content)
    with pytest.raises(ModelError, match=said):
        load_prefill(adapter, tiny_folder, "bfloat16")


def test_a_pickled_adapter_is_not_read(adapter: Path, tiny_folder: Path) -> None:
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        load_prefill(adapter, tiny_folder, "bfloat16")
