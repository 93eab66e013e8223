"""Engine qsun, interrupted and resumed: the same module, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qsun.calibrate.streams import Streams
from qsun.decode_recipe import decode_recipe
from qsun.jobs import measuring, quantize, quantize_blocks
from qsun.jobs.block_walk import BlockWalk
from qsun.jobs.search_state import SearchState
from qsun.quantize import block_perplexity
from qsun.records import read_record
from tests.searching import (
    BLOCKS,
    EVERY_BLOCK,
    FAILURE,
    copy_search,
    cut_short,
    digests,
    fail,
    finished_search,
    interrupt,
    names,
    search,
    state,
    stop_at,
    write_search,
)

REPOSITORY = Path(__file__).parent.parent
QSUN = [sys.executable, "-c", "from qsun.cli.main import main; main()"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a search that was never interrupted; tests work on copies."""
    return finished_search(tmp_path_factory.mktemp("search"))


@pytest.fixture
def config(whole: Path, tmp_path: Path) -> Path:
    """The same search, not yet begun."""
    return copy_search(whole, tmp_path / "copy")


@pytest.fixture
def left(config: Path) -> Path:
    """The same search, interrupted."""
    interrupt(config)
    return config


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def quantized(patch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are searched from here on."""
    searched: list[int] = []
    original = BlockWalk.quantize

    def noting(walk: BlockWalk, index: int) -> Any:
        searched.append(index)
        return original(walk, index)

    patch.setattr(BlockWalk, "quantize", noting)
    return searched


def measurements(patch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from here on."""
    done: list[str] = []
    original = block_perplexity.perplexity_by_blocks

    def noting(*arguments: Any) -> float:
        done.append(arguments[-1])
        return original(*arguments)

    patch.setattr(measuring, "perplexity_by_blocks", noting)
    return done


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


BASE = ["perplexity, full precision", "perplexity, round to nearest"]
QUANTIZED = ["perplexity, quantized"]
# In place of which call the search stops, and the block that it then goes on from.
MOMENTS: list[tuple[Any, str, int, int]] = [
    (BlockWalk, "advance", 0, 0),  # behind block 0, whose streams are not kept
    (Streams, "moments", 6, 1),  # in the midst of block 1
    (SearchState, "keep_block", 1, 2),  # block 2 is searched and not kept
    (BlockWalk, "quantize", 1, 3),
    (quantize_blocks, "_write", 0, BLOCKS - 1),  # all is searched
    (quantize_blocks, "check_written", 0, BLOCKS - 1),  # all is written
    (quantize, "new_record", 0, BLOCKS - 1),
]


def test_a_search_goes_on_from_wherever_it_was_interrupted(
    whole: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    for number, (owner, name, at, _) in enumerate(MOMENTS):
        with monkeypatch.context() as patch:
            searched, measured = quantized(patch), measurements(patch)
            stop_at(patch, owner, name, at, terminate)
            outcome = search(config, *EVERY_BLOCK, *(["--resume"] if number else []))
        assert measured == ([] if number else BASE) + (QUANTIZED if name == "new_record" else [])
        assert outcome.exit_code == 130, outcome.stderr
        assert f"What is finished waits in {state(config)}" in outcome.message
        assert "the same command with --resume goes on from it" in outcome.message
        assert names(config) == ["module.quantization"]
        begun += searched[:1]
    searched, measured = quantized(monkeypatch), measurements(monkeypatch)
    outcome = search(config, "--resume")  # how often streams are kept may change
    assert outcome.exit_code == 0, outcome.stderr
    assert measured == []
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
            with pytest.raises(RuntimeError, match=FAILURE):
                search(config, *resume)
    assert sorted(path.name for path in state(config).iterdir()) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "perplexity.json",
        "run.json",
    ]
    searched = quantized(monkeypatch)
    assert search(config, "--resume").exit_code == 0
    assert searched == [*range(BLOCKS)]
    assert digests(config) == digests(whole)


def test_what_ends_before_a_block_is_found_leaves_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, Streams, "moments", 1, terminate)
    outcome = search(config, *EVERY_BLOCK)
    assert outcome.exit_code == 130
    assert "interrupted; nothing was published" in outcome.message
    assert names(config) == []


def test_a_search_that_is_killed_goes_on(tmp_path: Path) -> None:
    config = write_search(tmp_path, sweeps=100)  # slow enough to be killed on the way
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


def test_inputs_may_lie_elsewhere_on_resuming(whole: Path, left: Path) -> None:
    folder = left.parent.parent
    (folder / "lora").rename(folder / "adapter")
    left.write_text(left.read_text().replace("../lora", "../adapter"))
    assert search(left, "--resume").exit_code == 0
    assert digests(left) == digests(whole)


def test_half_a_block_that_no_streams_lie_behind_is_made_again(whole: Path, left: Path) -> None:
    shutil.copy(state(left) / "block-00001.safetensors", state(left) / "block-00002.safetensors")
    cut_short(state(left) / "block-00002.safetensors")
    (state(left) / ".streams-00003.partial").mkdir()
    (state(left) / ".streams-00003.partial" / "0-exact.safetensors").write_bytes(b"half")
    assert search(left, "--resume").exit_code == 0
    assert digests(left) == digests(whole)
