"""Settings: precedence, types, bounds, and every mistake named at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsun.calibrate.definition import TextDefinition
from qsun.config import QuantizeConfig, RunConfig, load_config
from qsun.errors import ConfigError
from qsun.settings import load_settings
from qsun.tasks.definition import load_task
from tests.builders import write_config, write_definition

REPOSITORY = Path(__file__).parent.parent


def quantize_settings(path: Path, *overrides: str) -> QuantizeConfig:
    settings = load_config(path, overrides).quantize
    assert settings is not None
    return settings


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_setting_comes_from_the_file_or_its_default(tmp_path: Path) -> None:
    settings = quantize_settings(write_config(tmp_path, "./model", quantize__bits=8))
    assert settings.bits == 8
    assert settings.symmetric is False
    assert settings.keep_full_precision == ("lm_head",)


def test_an_override_wins_and_the_last_one_most(tmp_path: Path) -> None:
    path = write_config(tmp_path, "./model", quantize__bits=8)
    assert quantize_settings(path, "quantize.bits=3").bits == 3
    assert quantize_settings(path, "quantize.bits=3", "quantize.bits=4").bits == 4


def test_an_override_reaches_a_section_that_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nbase: {model: ./m}\nquantize: {calibration: c, heldout: h}\n")
    run = load_config(path, ["load_check.python=~/vllm/bin/python", "load_check.prompts=3"])
    assert run.load_check.python == "~/vllm/bin/python"
    assert run.load_check.prompts == 3


def test_an_override_may_hold_a_list_or_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path, "./model", base__revision="main")
    run = load_config(path, ["quantize.keep_full_precision=[lm_head, o_proj]", "base.revision="])
    assert run.quantize is not None
    assert run.quantize.keep_full_precision == ("lm_head", "o_proj")
    assert run.base.revision is None


def test_a_config_is_frozen(tmp_path: Path) -> None:
    run = load_config(write_config(tmp_path, "./model"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantize__bits": "four"}, "quantize.bits: 'four' must be of type int"),
        ({"quantize__bits": True}, "quantize.bits: True must be of type int"),
        ({"quantize__symmetric": 1}, "quantize.symmetric: 1 must be of type bool"),
        ({"quantize__format": "gptq"}, "'gptq' is not one of compressed-tensors, awq"),
        ({"quantize__tensor_parallel": 0}, "quantize.tensor_parallel: 0 is below 1"),
        ({"quantize__grid_points": 101}, "quantize.grid_points: 101 is above 100"),
        ({"quantize__keep_full_precision": "lm_head"}, "keep_full_precision: must be a list"),
        ({"quantize__keep_full_precision": [3]}, "keep_full_precision[0]: 3 must be of type str"),
        ({"base": "./model"}, "base: must be a section with keys of its own"),
        (
            {"load_check__max_mean_difference": -0.1},
            "load_check.max_mean_difference: -0.1 is below",
        ),
        ({"load_check__max_mean_difference": float("nan")}, "load_check.max_mean_difference: nan"),
        (
            {"load_check__max_mean_difference": ".inf"},
            "max_mean_difference: '.inf' must be of type",
        ),
        ({"load_check__max_greedy_gap": "inf"}, "max_greedy_gap: inf is not a finite number"),
        ({"load_check__max_greedy_gap": 10**400}, "must be of type float"),
        ({"load_check__max_greedy_gap": True}, "max_greedy_gap: True must be of type float"),
        ({"nonsense": 1}, "nonsense: no such setting (known: name, base, quantize"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    assert said in mistakes(write_config(tmp_path, "./model", **change))


def test_a_whole_number_will_do_for_a_fraction(tmp_path: Path) -> None:
    run = load_config(write_config(tmp_path, "./model", load_check__max_mean_difference=1))
    assert run.load_check.max_mean_difference == 1.0


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-2, without a dot, as text.
    run = load_config(write_config(tmp_path, "./model"), ["load_check.max_mean_difference=1e-2"])
    assert run.load_check.max_mean_difference == 0.01


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("nam: a\nbase: {}\nquantize: {calibration: c, heldout: h, bits: 5}\n")
    message = mistakes(path, "quantize.groupsize=64", "seed", "load_check.mode=off")
    assert "7 mistake(s)" in message
    for said in (
        "nam: no such setting (did you mean name?)",
        "name: missing",
        "base.model: missing",
        "quantize.bits: 5 is not one of 2, 3, 4, 8",
        "quantize.groupsize: no such setting (did you mean group_size?)",
        "--set seed: write it as key=value",
        "load_check.mode: False must be of type str",
    ):
        assert said in message


def test_lists_of_sections_name_the_entry(tmp_path: Path) -> None:
    source = {"name": "a", "kind": "jsonl", "path": "a.jsonl", "text": "t"}
    path = write_definition(tmp_path / "t.yaml", source, source | {"kind": "csv", "txt": "t"})
    with pytest.raises(ConfigError) as caught:
        load_settings(TextDefinition, path)
    assert "sources[1].kind: 'csv' is not one of huggingface, jsonl, package" in str(caught.value)
    assert "sources[1].txt: no such setting (did you mean text?)" in str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_config_is_valid(path: Path) -> None:
    run = load_config(path)
    assert isinstance(run, RunConfig)
    quantize = run.quantize
    for definition in (quantize.calibration, quantize.heldout) if quantize else ():
        assert load_settings(TextDefinition, path.parent / definition).sources
    for task in run.tasks:
        assert load_task(path.parent / task).train
