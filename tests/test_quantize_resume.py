"""Engine qsun, interrupted and resumed: the same module, bit for bit, or a refusal by name."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.calibrate.streams import Streams
from qsun.decode_recipe import decode_recipe
from qsun.jobs import quantize, quantize_blocks
from qsun.jobs.block_walk import BlockWalk
from qsun.jobs.search_state import SearchState
from qsun.records import read_record
from tests.builders import tiny_model
from tests.searching import BLOCKS, SHAPE, digests, search, write_adapter, write_rows, write_search

REPOSITORY = Path(__file__).parent.parent
QSUN = [sys.executable, "-c", "from qsun.cli.main import main; main()"]
EVERY_BLOCK = ("--set", "quantize.search.keep_every_s=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a search that was never interrupted; tests work on copies."""
    config = write_search(tmp_path_factory.mktemp("search"))
    outcome = search(config)
    assert outcome.exit_code == 0, outcome.stderr
    return config


@pytest.fixture
def config(whole: Path, tmp_path: Path) -> Path:
    """The same search, not yet begun."""
    shutil.copytree(whole.parent.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    return tmp_path / "copy" / "run" / "run.yaml"


@pytest.fixture(scope="module")
def interrupted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same search, interrupted in its third block with streams kept."""
    folder = tmp_path_factory.mktemp("interrupted") / "copy"
    shutil.copytree(whole.parent.parent, folder, ignore=shutil.ignore_patterns("out"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, BlockWalk, "quantize", 2, fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            search(folder / "run" / "run.yaml", *EVERY_BLOCK)
    return folder


@pytest.fixture
def left(interrupted: Path, tmp_path: Path) -> Path:
    """The config of a copy of the interrupted search."""
    shutil.copytree(interrupted, tmp_path / "copy")
    return tmp_path / "copy" / "run" / "run.yaml"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("no such kernel")


def stop_at(
    patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, stop: Callable[[], None] = terminate
) -> None:
    """Stop in place of the `at`th call."""
    original, calls = getattr(owner, name), []

    def stopping(*arguments: Any, **named: Any) -> Any:
        if len(calls) == at:
            stop()
        calls.append(None)
        return original(*arguments, **named)

    patch.setattr(owner, name, stopping)


def quantized(patch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are searched from here on."""
    searched: list[int] = []
    original = BlockWalk.quantize

    def noting(walk: BlockWalk, index: int) -> Any:
        searched.append(index)
        return original(walk, index)

    patch.setattr(BlockWalk, "quantize", noting)
    return searched


def state(config: Path) -> Path:
    return config.parent.parent / "out" / "module.quantization"


def names(config: Path) -> list[str]:
    return sorted(path.name for path in (config.parent.parent / "out").iterdir())


def record(config: Path) -> Path:
    return config.parent.parent / "out" / "module" / "records" / "quantization.json"


def found(config: Path) -> dict[str, Any]:
    """What the record tells of a search, but for the time that it took."""
    result = read_record(record(config), "quantization").result
    return {name: one for name, one in result["quantization"].items() if name != "search_s"}


def test_a_search_gives_the_same_module_twice(whole: Path, config: Path) -> None:
    outcome = search(config, *EVERY_BLOCK)
    assert outcome.exit_code == 0, outcome.stderr
    assert digests(config) == digests(whole)
    assert found(config) == found(whole)
    assert decode_recipe(record(config)) == decode_recipe(record(whole))
    assert names(config) == ["module"]
    assert len({layer["sha256"] for layer in found(config)["layers"]}) == BLOCKS * 7


# In place of which call the search stops, and the block that it then goes on from.
MOMENTS: list[tuple[Any, str, int, int]] = [
    (BlockWalk, "advance", 0, 0),  # behind block 0, whose streams are not kept
    (Streams, "moments", 6, 1),  # in the midst of block 1
    (SearchState, "keep_block", 1, 2),  # block 2 is searched and not kept
    (BlockWalk, "quantize", 1, 3),
    (quantize_blocks, "_write", 0, BLOCKS - 1),  # all is searched
    (quantize_blocks, "load_dequantized", 0, BLOCKS - 1),  # all is written
    (quantize, "new_record", 0, BLOCKS - 1),
]


def test_a_search_goes_on_from_wherever_it_was_interrupted(
    whole: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    for number, (owner, name, at, _) in enumerate(MOMENTS):
        with monkeypatch.context() as patch:
            searched = quantized(patch)
            stop_at(patch, owner, name, at)
            outcome = search(config, *EVERY_BLOCK, *(["--resume"] if number else []))
        assert outcome.exit_code == 130, outcome.stderr
        assert f"What is finished waits in {state(config)}" in outcome.message
        assert "the same command with --resume goes on from it" in outcome.message
        assert names(config) == ["module.quantization"]
        begun += searched[:1]
    searched = quantized(monkeypatch)
    outcome = search(config, "--resume")  # how often streams are kept may change
    assert outcome.exit_code == 0, outcome.stderr
    assert [*begun[1:], searched[0]] == [expected for *_, expected in MOMENTS]
    assert digests(config) == digests(whole)
    assert found(config) == found(whole)
    assert names(config) == ["module"]


def test_without_streams_a_search_finds_the_same_codes_again(
    whole: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resume, at in (([], 5), (["--resume"], 9)):
        with monkeypatch.context() as patch:
            stop_at(patch, Streams, "moments", at, fail)
            with pytest.raises(RuntimeError, match="no such kernel"):
                search(config, *resume)
    assert sorted(path.name for path in state(config).iterdir()) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "run.json",
    ]
    searched = quantized(monkeypatch)
    assert search(config, "--resume").exit_code == 0
    assert searched == [*range(BLOCKS)]
    assert digests(config) == digests(whole)


def test_what_ends_before_a_block_is_found_leaves_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, Streams, "moments", 1)
    outcome = search(config, *EVERY_BLOCK)
    assert outcome.exit_code == 130
    assert "interrupted; nothing was published" in outcome.message
    assert names(config) == []


def test_a_search_that_is_killed_goes_on(tmp_path: Path) -> None:
    config = write_search(tmp_path, sweeps=40)  # slow enough to be killed on the way
    assert search(config).exit_code == 0
    undisturbed = digests(config)
    out = tmp_path / "out" / "module"
    shutil.rmtree(out)
    rng = random.Random()
    block, delay_s = rng.randrange(BLOCKS - 1), rng.uniform(0, 0.2)
    print(f"killed {delay_s:.3f} s after block {block} was kept")
    process = subprocess.Popen(
        [*QSUN, "quantize", config, "--out", out, *EVERY_BLOCK],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    kept = state(config) / f"block-{block:05d}.safetensors"
    while process.poll() is None and not kept.exists():
        time.sleep(0.002)
    time.sleep(delay_s)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    outcome = search(config, "--resume")
    assert outcome.exit_code == 0, outcome.stderr
    assert digests(config) == undisturbed
    assert [name for name in names(config) if not name.startswith(".")] == ["module"]


def test_there_must_be_something_to_resume(config: Path) -> None:
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
        ("quantize.search.damping=0.02", "settings.search.damping: 0.01 then, 0.02 now"),
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


def test_inputs_may_lie_elsewhere_on_resuming(whole: Path, left: Path) -> None:
    folder = left.parent.parent
    (folder / "lora").rename(folder / "adapter")
    left.write_text(left.read_text().replace("../lora", "../adapter"))
    assert search(left, "--resume").exit_code == 0
    assert digests(left) == digests(whole)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("block-00000.safetensors", cut_short),
        ("block-00001.safetensors", Path.unlink),
        ("streams-00002.safetensors", cut_short),
        ("streams-00002.safetensors", lambda path: path.write_bytes(b"")),
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


def test_half_a_block_that_no_streams_lie_behind_is_made_again(whole: Path, left: Path) -> None:
    shutil.copy(state(left) / "block-00001.safetensors", state(left) / "block-00002.safetensors")
    cut_short(state(left) / "block-00002.safetensors")
    (state(left) / ".streams-00003.safetensors.partial").write_bytes(b"half")
    assert search(left, "--resume").exit_code == 0
    assert digests(left) == digests(whole)
