"""Prefill modules on disk: what is written loads again, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qsun.checkpoint_files import Tensors
from qsun.errors import ModelError
from qsun.models import load_model
from qsun.prefill_module import PrefillTensors, load_prefill, save_prefill
from tests.builders import tiny_model
from tests.reference import merged, with_adapter


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


def test_an_adapter_is_merged_as_peft_merges_it(adapter: Path, tiny_folder: Path) -> None:
    expected = merged(load_prefill(adapter, tiny_folder, "float32")).state_dict()
    base = load_model(tiny_folder, "float32").state_dict()
    with PrefillTensors(adapter, tiny_folder) as tensors:
        names = tensors.names()
        found = {name: tensors[name] for name in names}
        assert all(name in tensors for name in names)
        assert "lm_head.weight" not in tensors  # tied, and so not stored
    assert {*names, "lm_head.weight"} == expected.keys()
    changed = [name for name in names if not torch.equal(found[name].float(), base[name])]
    assert changed == [name for name in names if name.endswith("_proj.weight")]
    for name in names:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], expected[name].to(torch.bfloat16)), name


def test_layers_that_an_adapter_leaves_out_are_the_base_models(
    adapter: Path, tiny_folder: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    kept = {name: one for name, one in load_file(path).items() if ".layers.0." in name}
    save_file(kept, path)
    with PrefillTensors(adapter, tiny_folder) as tensors, Tensors(tiny_folder) as base:
        changed = [name for name in base.names() if not torch.equal(tensors[name], base[name])]
    assert len(changed) == 7
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_a_checkpoints_own_tensors_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "full", seed=5)
    for folder, source in ((tmp_path / "full", tmp_path / "full"), (None, tiny_folder)):
        with PrefillTensors(folder, tiny_folder) as tensors, Tensors(source) as expected:
            assert tensors.names() == expected.names()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected.names())


def test_a_damaged_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "full")
    weights = tmp_path / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="has damaged weight files"):
        PrefillTensors(tmp_path / "full", tiny_folder)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern {'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern {'q_proj': 1}"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['embed_tokens'\]"),
        ({"layer_replication": [(0, 2), (1, 2)]}, r"layer_replication \[\[0, 2\], \[1, 2\]\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_beyond_plain_lora_is_not_merged(
    tiny_folder: Path, tmp_path: Path, lora: dict[str, Any], said: str
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], **lora)
    module = get_peft_model(load_model(tiny_folder, "float32"), config)
    save_prefill(module, tmp_path / "beyond", torch.bfloat16, "org/base")
    with pytest.raises(ModelError, match=f"uses .*{said}.*: qsun merges plain LoRA alone"):
        PrefillTensors(tmp_path / "beyond", tiny_folder)


def test_a_factor_without_its_other_one_is_refused(adapter: Path, tiny_folder: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj: lora_A is missing"):
        PrefillTensors(adapter, tiny_folder)


def test_a_rank_that_is_not_the_tensors_is_refused(adapter: Path, tiny_folder: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 16}))
    with pytest.raises(ModelError, match=r"shape \[4, 128\], rank 16 in adapter_config.json"):
        PrefillTensors(adapter, tiny_folder)


def test_an_adapter_of_another_shape_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "wide", hidden=192)
    with pytest.raises(ModelError, match="fit no layer"):
        PrefillTensors(adapter, tmp_path / "wide")
