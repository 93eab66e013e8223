"""A search within the memory it is given: the same module with its streams on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.calibrate.shelf import DiskShelf, MemoryShelf, Shelf
from qsun.files import GIB, bytes_of
from qsun.jobs.block_walk import BlockWalk
from tests.command import run_qsun
from tests.searching import (
    EVERY_BLOCK,
    FAILURE,
    copy_search,
    digests,
    fail,
    finished_search,
    names,
    search,
    state,
    stop_at,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a search that held its streams in memory; tests work on copies."""
    return finished_search(tmp_path_factory.mktemp("search"))


@pytest.fixture
def config(whole: Path, tmp_path: Path) -> Path:
    return copy_search(whole, tmp_path / "copy")


def estimate(config: Path, *options: str) -> dict[str, Any]:
    outcome = run_qsun("quantize", config, "--dry-run", "--json", *options)
    found: dict[str, Any] = json.loads(outcome.stdout)["estimate"]
    return found


def just_enough(config: Path) -> tuple[str, str]:
    """Room for a block, and none for the streams."""
    return "--memory", f"{estimate(config)['needed_bytes']}B"


def test_streams_on_disk_give_the_same_module(whole: Path, config: Path) -> None:
    assert not estimate(config)["streams_on_disk"]
    little = just_enough(config)
    assert estimate(config, *little)["streams_on_disk"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryShelf, "__setitem__", lambda *_: pytest.fail("kept in memory"))
        outcome = search(config, *little)
    assert outcome.exit_code == 0, outcome.stderr
    assert digests(config) == digests(whole)
    assert names(config) == ["module"]


def test_a_search_goes_on_with_another_amount_of_memory(whole: Path, config: Path) -> None:
    little = just_enough(config)
    for at, options in ((2, little), (1, ["--resume"])):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, BlockWalk, "quantize", at, fail)
            with pytest.raises(RuntimeError, match=FAILURE):
                search(config, *EVERY_BLOCK, *options)
        assert not (state(config) / ".walk").exists()
    assert search(config, *little, "--resume").exit_code == 0
    assert digests(config) == digests(whole)


def test_what_ends_before_a_block_is_found_leaves_no_streams(config: Path) -> None:
    little = just_enough(config)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, BlockWalk, "quantize", 0, fail)
        with pytest.raises(RuntimeError, match=FAILURE):
            search(config, *little)
    assert names(config) == []


def test_too_little_for_one_block_is_refused(config: Path) -> None:
    outcome = search(config, "--memory", "100MiB")
    assert outcome.exit_code == 10
    assert "one decoder block and what is summed of its inputs need about" in outcome.message
    assert "100.00 MiB are given by quantize.search.memory" in outcome.message
    assert "opening the base model" not in outcome.stderr
    assert names(config) == []
    told = run_qsun("quantize", config, "--dry-run", "--memory", "100MiB")
    assert told.exit_code == 0
    assert "100.00 MiB are given by quantize.search.memory" in told.stderr


@pytest.mark.parametrize("text", ["lots", "8", "8 GiBs", "-1GiB"])
def test_what_is_no_size_is_refused(config: Path, text: str) -> None:
    outcome = search(config, f"--memory={text}")
    assert outcome.exit_code == 3
    assert "quantize.search.memory: " in outcome.message


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 * GIB), ("1.5 KiB", 1536), ("2MB", 2_000_000), ("17B", 17)]
)
def test_sizes(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.fixture(params=["memory", "disk"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    (tmp_path / "shelf").mkdir()
    return MemoryShelf() if request.param == "memory" else DiskShelf(tmp_path / "shelf")


def test_a_shelf_gives_what_was_put_there_last(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    first = torch.randn(3, 5).to(torch.bfloat16).t()
    shelf["0-exact"] = first
    held = shelf["0-exact"]
    shelf.store("0-exact", tmp_path / "kept")
    shelf["0-exact"] = torch.zeros(2)
    assert torch.equal(shelf["0-exact"], torch.zeros(2))
    assert torch.equal(held, first)
    assert torch.equal(DiskShelf(tmp_path / "kept")["0-exact"], first)
    assert list(shelf) == ["0-exact"]
    assert "1-exact" not in shelf
    del shelf["0-exact"]
    assert len(shelf) == 0
    with pytest.raises(KeyError):
        shelf["0-exact"]
    with pytest.raises(KeyError):
        del shelf["0-exact"]
