"""Codes packed in more bits than they have: the same module, told as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from transformers import AutoModelForCausalLM

from qsun.decode_checkpoint import DecodeCheckpoint, QuantizedLayer, load_dequantized
from qsun.errors import ModelError
from qsun.files import write_json
from qsun.gemm_checkpoint import rewrite_as_gemm
from qsun.models import load_model
from qsun.packed_checkpoint import write_packed
from qsun.records import read_record
from qsun.rounding import round_layers, round_to_nearest
from qsun.scheme import Scheme, scheme_of
from qsun.verdict import Outcome
from qsun.verify.numeric.decode_module import codes_checks
from qsun.verify.static.expected_tensors import tensor_misfits
from qsun.verify.static.model_folder import ModelFolder
from tests.builders import model_config, tensors_on_disk, write_config
from tests.command import run_qsun

TOKENS = torch.arange(40, 60).unsqueeze(0)
QUICK = {"sweeps": 1, "positions": "all"}
LAYOUTS = ("compressed-tensors", "awq")
CONFIG = {**model_config().to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")


def quantized(folder: Path, base: Path, engine: str, **changes: Any) -> Path:
    """A module of `base`; `changes` are settings of section `quantize`."""
    settings = {f"quantize__{name}": value for name, value in changes.items()}
    if engine == "qsun":
        settings["quantize__search"] = QUICK
    config = write_config(folder / "run", base, quantize__engine=engine, **settings)
    done = run_qsun("quantize", config, "--out", folder / "out")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def digests(checkpoint: DecodeCheckpoint) -> dict[str, str]:
    return {layer.name: layer.digest() for layer in checkpoint.layers()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["qsun", "llmcompressor"])
def test_the_codes_are_those_of_the_bits_that_they_have(
    engine: str, layout: str, tiny_folder: Path, tmp_path: Path
) -> None:
    plain = quantized(tmp_path / "plain", tiny_folder, engine, bits=3)
    stored = {"bits": 3, "stored_bits": 4, "format": layout}
    roomy = quantized(tmp_path / "roomy", tiny_folder, engine, **stored)
    with DecodeCheckpoint(plain) as one, DecodeCheckpoint(roomy) as two:
        assert two.scheme == Scheme(layout, 3, 32, False, stored_bits=4)
        assert str(two.scheme) == f"W3A16 asymmetric, group 32, stored in 4 bits, {layout}"
        assert digests(one) == digests(two)
        assert two.layer_bytes() > one.layer_bytes()
    assert config_of(roomy)["code_bits"] == 3
    assert "code_bits" not in config_of(plain)
    with torch.no_grad():
        expected, found = (load_dequantized(one)(TOKENS).logits for one in (plain, roomy))
    assert torch.equal(expected, found)
    opened = ModelFolder(roomy)
    assert not tensor_misfits(opened.config, opened.scheme, opened.headers)
    assert [check.outcome for check in codes_checks(roomy)] == [Outcome.PASSED] * 2


def test_a_server_sees_4_bits_alone(tiny_folder: Path, tmp_path: Path) -> None:
    folder = quantized(tmp_path, tiny_folder, "qsun", bits=2, stored_bits=4)
    seen = config_of(folder)["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in seen.values()] == [4]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, load_dequantized(folder)(TOKENS).logits)


def test_the_record_tells_both_and_the_size_is_the_stored_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = quantized(tmp_path, tiny_folder, "qsun", bits=3, stored_bits=4)
    result = read_record(folder / "records" / "quantization.json", "quantization").result
    plan = result["plan"]
    assert (plan["bits"], plan["stored_bits"]) == (3, 4)
    assert (plan["mean_bits"], plan["mean_stored_bits"]) == (3, 4)
    assert {
        (layer["bits"], layer["stored_bits"]) for layer in result["quantization"]["layers"]
    } == {(3, 4)}
    packed = ("weight_packed", "weight_scale", "weight_zero_point")
    on_disk = sum(
        tensor.nbytes for name, tensor in tensors_on_disk(folder) if name.endswith(packed)
    )
    shapes = 14 * 2 * 8  # of 14 layers, two numbers each
    assert result["quantization"]["layer_bytes"] == on_disk + shapes
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert plan["stored_bits_per_weight"] == on_disk * 8 / weights == 4 + 20 / 32


def test_a_dry_run_tells_both(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__bits=3, quantize__stored_bits=4)
    told = run_qsun("quantize", config, "--dry-run")
    assert "W3A16 asymmetric, group 32, stored in 4 bits, compressed-tensors" in told.stdout
    sizes = [
        json.loads(run_qsun("quantize", config, "--dry-run", "--json", *options).stdout)
        for options in ((), ("--set", "quantize.bits=4"), ("--set", "quantize.stored_bits=null"))
    ]
    stored, four, three = (one["estimate"]["checkpoint_bytes"] for one in sizes)
    assert stored == four > three


def test_fewer_bits_than_codes_have_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_folder, quantize__bits=4, quantize__stored_bits=3)
    done = run_qsun("quantize", config, "--out", tmp_path / "out")
    assert done.exit_code == 5
    assert "stored_bits 3 does not hold codes of 4 bits" in done.stderr


def packed_layers(bits: tuple[int, ...]) -> list[QuantizedLayer]:
    """A layer for each of `bits`, of all codes and zeros that it has."""
    generator = torch.Generator().manual_seed(5)

    def draw(columns: int, own: int) -> torch.Tensor:
        half = 2 ** (own - 1)
        return torch.randint(-half, half, (48, columns), dtype=torch.int8, generator=generator)

    return [
        QuantizedLayer(name, draw(64, own), draw(2, own), torch.rand(48, 2).to(torch.bfloat16))
        for name, own in zip(NAMES, bits, strict=True)
    ]


@pytest.mark.parametrize("stored", [None, 8])
def test_layers_of_several_bits_come_back(stored: int | None, tmp_path: Path) -> None:
    own = (2, 3, 8)
    made = packed_layers(own)
    bits = dict(zip(NAMES, own, strict=True))
    scheme = Scheme("compressed-tensors", 8, 32, False, stored, bits)
    write_packed([], made, CONFIG, scheme, ["lm_head"], tmp_path)
    groups = config_of(tmp_path)["quantization_config"]["config_groups"].values()
    named = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert named == ({8: ["Linear"]} if stored else {2: [NAMES[0]], 3: [NAMES[1]], 8: [NAMES[2]]})
    with DecodeCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.scheme == scheme
        read = digests(checkpoint)
    assert read == {layer.name: layer.digest() for layer in made}
    assert str(scheme).startswith("W2+3+8A16 (1, 1, 1 layers) asymmetric, group 32")


def test_few_bits_are_rewritten_in_autoawqs_layout(tmp_path: Path) -> None:
    own = (2, 4, 3)
    bits = dict(zip(NAMES, own, strict=True))
    made = packed_layers(own)
    for layer in made:
        layer.scales.copy_(layer.scales.half().bfloat16())  # such as float16 holds
    scheme = Scheme("compressed-tensors", 4, 32, False, None, bits)
    (tmp_path / "packed").mkdir()
    write_packed([], made, CONFIG, scheme, ["lm_head"], tmp_path / "packed")
    rewrite_as_gemm(tmp_path / "packed", tmp_path / "gemm")
    with DecodeCheckpoint(tmp_path / "gemm") as checkpoint:
        assert checkpoint.scheme == Scheme("awq", 4, 32, False, 4, bits)
        read = digests(checkpoint)
    assert read == {layer.name: layer.digest() for layer in made}


def test_codes_outside_of_the_bits_that_are_told_fail(tmp_path: Path) -> None:
    made = packed_layers((4, 3, 3))
    scheme = Scheme("compressed-tensors", 3, 32, False, stored_bits=4)
    write_packed([], made, CONFIG, scheme, ["lm_head"], tmp_path)
    scales, bits = codes_checks(tmp_path)
    assert scales.outcome is Outcome.PASSED
    assert (bits.name, bits.outcome) == ("numeric.code_bits", Outcome.FAILED)
    assert NAMES[0] in bits.message
    assert NAMES[1] not in bits.message


@pytest.mark.parametrize("own", [5, 1, "3", {"model.layers.0.mlp.up_proj": 8}, True])
def test_code_bits_that_cannot_be_are_refused(own: object, tmp_path: Path) -> None:
    scheme = Scheme("compressed-tensors", 4, 32, False)
    write_packed([], packed_layers((4, 4, 4)), CONFIG, scheme, ["lm_head"], tmp_path)
    config = config_of(tmp_path) | {"code_bits": own}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ModelError, match="code_bits"):
        scheme_of(config)


def test_several_groups_tell_the_codes_bits_already(tmp_path: Path) -> None:
    bits = dict(zip(NAMES, (2, 3, 4), strict=True))
    scheme = Scheme("compressed-tensors", 4, 32, False, None, bits)
    write_packed([], packed_layers((2, 3, 4)), CONFIG, scheme, ["lm_head"], tmp_path)
    with pytest.raises(ModelError, match="code_bits"):
        scheme_of(config_of(tmp_path) | {"code_bits": 2})


@pytest.mark.parametrize("targets", [["Linear"], [NAMES[1]], ["re:.*up_proj"]])
def test_groups_that_do_not_name_each_layer_once_are_refused(
    targets: list[str], tmp_path: Path
) -> None:
    bits = dict(zip(NAMES, (2, 3, 4), strict=True))
    scheme = Scheme("compressed-tensors", 4, 32, False, None, bits)
    write_packed([], packed_layers((2, 3, 4)), CONFIG, scheme, ["lm_head"], tmp_path)
    config = config_of(tmp_path)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = targets
    with pytest.raises(ModelError, match="do not name each of their layers, once"):
        scheme_of(config)


def test_a_layer_without_bits_of_its_own_is_a_misfit(tmp_path: Path) -> None:
    made = packed_layers((2, 3, 4))
    bits = {NAMES[0]: 2, NAMES[1]: 3}
    scheme = Scheme("compressed-tensors", 4, 32, False, 4, bits)
    write_packed([], made, CONFIG, scheme, ["lm_head"], tmp_path)
    opened = ModelFolder(tmp_path)
    found = tensor_misfits(opened.config, opened.scheme, opened.headers)
    assert f"{NAMES[2]}: quantized, the config does not say to how many bits" in found
    assert not any("how many bits" in line and NAMES[0] in line for line in found)


@pytest.mark.parametrize("layer_bits", [{}, {NAMES[0]: 2}])
def test_the_control_is_rounded_to_the_codes_own_bits(
    layer_bits: dict[str, int], tiny_folder: Path
) -> None:
    scheme = Scheme("compressed-tensors", 3, 32, False, 4, layer_bits)
    rounded, exact = load_model(tiny_folder, "bfloat16"), load_model(tiny_folder, "bfloat16")
    round_layers(rounded, NAMES, scheme)
    for name in NAMES:
        args = QuantizationArgs(**scheme.arguments(layer_bits.get(name, 3)))
        expected = round_to_nearest(exact.get_submodule(name).weight, args)
        assert torch.equal(rounded.get_submodule(name).weight, expected)
