"""Bits by layer under a size, from a config to a module that others read as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qsun.block import Stage
from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.decode_recipe import decode_recipe
from qsun.jobs import choose_bits
from qsun.records import read_record
from qsun.verdict import Outcome
from qsun.verify.numeric.decode_module import codes_checks
from qsun.verify.static.expected_tensors import tensor_misfits
from qsun.verify.static.model_folder import ModelFolder
from tests.builders import tensors_on_disk
from tests.searching import BLOCKS, digests, interrupt, search, state, write_search

TARGET = 3.25
ASKED = ("--target-bits", str(TARGET))
TOKENS = torch.arange(40, 60).unsqueeze(0)
RECORD = Path("records") / "quantization.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def module(config: Path) -> Path:
    done = search(config, *ASKED)
    assert done.exit_code == 0, done.stderr
    return config.parent.parent / "out" / "module"


def result_of(module: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_record(module / RECORD, "quantization").result
    return found


def test_the_mean_is_within_the_target_and_bits_differ(module: Path) -> None:
    result = result_of(module)
    layers = result["quantization"]["layers"]
    with DecodeCheckpoint(module) as checkpoint:
        counts = {layer.name: layer.codes.numel() for layer in checkpoint.layers()}
        assert {one["name"]: one["bits"] for one in layers} == checkpoint.scheme.layer_bits
        assert checkpoint.scheme.stored_bits is None
    mean = sum(one["bits"] * counts[one["name"]] for one in layers) / sum(counts.values())
    assert 3 < mean <= TARGET
    plan = result["plan"]
    assert plan["mean_bits"] == plan["mean_stored_bits"] == pytest.approx(mean)
    assert (plan["target_bits"], plan["layers"]) == (TARGET, 7 * BLOCKS)
    assert len({one["bits"] for one in layers}) > 1


def test_layers_that_servers_run_as_one_have_the_same_bits(module: Path) -> None:
    with DecodeCheckpoint(module) as checkpoint:
        bits = checkpoint.scheme.layer_bits
    for index in range(BLOCKS):
        for stage in Stage:
            assert len({bits[f"model.layers.{index}.{name}"] for name in stage.value}) == 1


def test_others_read_it_as_it_is_meant(module: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(module, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, load_dequantized(module)(TOKENS).logits)
    opened = ModelFolder(module)
    assert opened.scheme is not None
    assert not tensor_misfits(opened.config, opened.scheme, opened.headers)


def test_the_estimate_is_of_the_target(config: Path, module: Path) -> None:
    told = search(config, *ASKED, "--dry-run")
    expected = json.loads(told.stdout)["estimate"]["checkpoint_bytes"]
    found = sum(tensor.nbytes for _, tensor in tensors_on_disk(module))
    assert 0.97 * found < expected < 1.03 * found


def test_a_resumed_search_has_the_same_bits_without_another_table(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_search(tmp_path)
    interrupt(config, *ASKED)
    assert (state(config) / "errors.json").exists()

    def measured(*_: object) -> None:
        raise AssertionError("the table is measured again")

    monkeypatch.setattr(choose_bits, "_measured", measured)
    done = search(config, *ASKED, "--resume")
    assert done.exit_code == 0, done.stderr
    assert digests(config) == digests(module.parent.parent / "run" / "run.yaml")


def test_another_target_is_another_search(tmp_path: Path) -> None:
    config = write_search(tmp_path)
    interrupt(config, *ASKED)
    done = search(config, "--target-bits", "3.5", "--resume")
    assert done.exit_code == 3
    assert "settings.bits.target: 3.25 then, 3.5 now" in done.stderr


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq"])
def test_few_bits_are_served_in_4(layout: str, tmp_path: Path) -> None:
    config = write_search(tmp_path)
    done = search(config, *ASKED, "--set", "quantize.stored_bits=4", "--format", layout)
    assert done.exit_code == 0, done.stderr
    folder = tmp_path / "out" / "module"
    with DecodeCheckpoint(folder) as checkpoint:
        scheme = checkpoint.scheme
    assert (scheme.stored_sizes, scheme.format) == ((4,), layout)
    assert {2, 3, 4} >= set(scheme.layer_bits.values()) > set()
    assert (result_of(folder)["plan"]["mean_bits"], 4) <= (TARGET, 4)
    assert result_of(folder)["plan"]["mean_stored_bits"] == 4
    assert [check.outcome for check in codes_checks(folder)] == [Outcome.PASSED] * 2


def test_the_recipe_is_of_the_target_and_not_of_the_bits_beside_it(
    module: Path, tmp_path: Path
) -> None:
    record = json.loads((module / RECORD).read_text())

    def recipe(**changes: Any) -> str | None:
        changed = record | {"config": record["config"] | {}}
        changed["config"]["quantize"] = record["config"]["quantize"] | changes
        path = tmp_path / "record.json"
        path.write_text(json.dumps(changed))
        return decode_recipe(path)

    assert recipe() == recipe(bits=3) == recipe(stored_bits=8)
    assert len({recipe(), recipe(target_bits=3.5), recipe(stored_bits=4)}) == 3
