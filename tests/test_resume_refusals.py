"""Searches that cannot be resumed: refused by the name of what changed or is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import tiny_model
from tests.searching import (
    SHAPE,
    copy_search,
    cut_short,
    interrupt,
    names,
    search,
    state,
    write_adapter,
    write_rows,
    write_search,
)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an interrupted search; tests work on copies."""
    folder = tmp_path_factory.mktemp("search") / "interrupted"
    interrupt(write_search(folder))
    return folder


@pytest.fixture
def left(interrupted: Path, tmp_path: Path) -> Path:
    """The config of a copy of it."""
    shutil.copytree(interrupted, tmp_path / "copy")
    return tmp_path / "copy" / "run" / "run.yaml"


def test_there_must_be_something_to_resume(left: Path, tmp_path: Path) -> None:
    config = copy_search(left, tmp_path / "new")
    outcome = search(config, "--resume")
    assert outcome.exit_code == 7
    assert f"--resume: there is no interrupted search in {state(config)}" in outcome.message
    assert names(config) == []


def test_an_interrupted_search_is_not_overwritten(left: Path) -> None:
    before = sorted(state(left).iterdir())
    outcome = search(left)
    assert outcome.exit_code == 7
    assert f"an interrupted search lies in {state(left)}" in outcome.message
    assert "Go on with it by --resume, or remove it yourself" in outcome.message
    assert sorted(state(left).iterdir()) == before


def test_the_other_engine_keeps_nothing_to_resume(left: Path) -> None:
    outcome = search(left, "--engine", "llmcompressor", "--set", "quantize.search={}", "--resume")
    assert outcome.exit_code == 3
    assert "--resume: engine llmcompressor keeps nothing to go on from" in outcome.message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("quantize.bits=3", "settings.bits: 4 then, 3 now"),
        ("quantize.search.damping=0.02", "settings.search.damping: 0.2 then, 0.02 now"),
        ("seed=4", "seed: 0 then, 4 now"),
    ],
)
def test_a_changed_setting_is_refused(left: Path, changed: str, said: str) -> None:
    outcome = search(left, "--resume", "--set", changed)
    assert outcome.exit_code == 3
    assert f"--resume: the search in {state(left)} was started differently" in outcome.message
    assert f"  - {said}\n" in outcome.message
    assert outcome.message.count(" then, ") == 1


def other_rows(folder: Path) -> None:
    write_rows(folder / "run", seed=9)


def other_sources(folder: Path) -> None:
    """The two sources with each other's names: the same tokens, through each other's modules."""
    path = folder / "run" / "calibration.yaml"
    text = path.read_text()
    for name, other in (("sums", "swapped"), ("more", "sums"), ("swapped", "more")):
        text = text.replace(f"name: {name}\n", f"name: {other}\n")
    path.write_text(text)


def other_adapter(folder: Path) -> None:
    write_adapter(folder, seed=5)


def other_module(folder: Path) -> None:
    tiny_model(folder / "full", seed=5, **SHAPE)


def other_base(folder: Path) -> None:
    tiny_model(folder / "base", seed=5, **SHAPE)


def other_config(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_rows, "calibration.sha256: "),
        (other_sources, "calibration.sources: ['sums', 'more'] then, ['more', 'sums'] now"),
        (other_adapter, "prefill.sums: "),
        (other_module, "prefill.more: "),
        (other_base, "base.model.safetensors: "),
        (other_config, "config.rms_norm_eps: 1e-06 then, 1e-05 now"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_changed_inputs_are_refused(left: Path, change: Callable[[Path], None], said: str) -> None:
    change(left.parent.parent)
    outcome = search(left, "--resume")
    assert outcome.exit_code == 3
    assert f"  - {said}" in outcome.message
    assert outcome.message.count(" then, ") == 1
    assert state(left).is_dir()


def test_another_number_of_threads_is_refused(left: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        outcome = search(left, "--resume")
    finally:
        torch.set_num_threads(threads)
    assert outcome.exit_code == 3
    assert f"hardware.threads: {threads} then, {threads + 1} now" in outcome.message


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("block-00000.safetensors", cut_short),
        ("block-00001.safetensors", Path.unlink),
        ("streams-00002/0-exact.safetensors", cut_short),
        ("streams-00002/1-prompts.safetensors", Path.unlink),
        ("streams-00002/0-exact.safetensors", lambda path: path.write_bytes(b"")),
        ("streams-00002/contents.json", Path.unlink),
        ("perplexity.json", cut_short),
        ("run.json", cut_short),
        ("run.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_search_is_refused(left: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(state(left) / name)
    outcome = search(left, "--resume")
    assert outcome.exit_code == 7
    assert f"--resume: the search in {state(left)} is damaged:\n  - {name}: " in outcome.message
    assert "Remove the folder and start anew" in outcome.message
