"""The state of a search: what is kept comes back, and what is unfinished is never taken for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.calibrate.shelf import MemoryShelf
from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import ConfigError, OutputError
from qsun.jobs.search_state import KeptBlock, SearchState
from tests.searching import cut_short

IDENTITY: dict[str, Any] = {"seed": 0, "settings": {"bits": 4, "search": {"clip": True}}}


def block(seed: int = 0) -> KeptBlock:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        QuantizedLayer(
            f"model.layers.{seed}.{name}",
            torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=generator),
            torch.randint(-8, 8, (3, 2), dtype=torch.int8, generator=generator),
            torch.rand(3, 2, generator=generator).to(torch.bfloat16),
        )
        for name in ("mlp.up_proj", "mlp.gate_proj")
    ]
    others = {f"model.layers.{seed}.input_layernorm.weight": torch.rand(64, generator=generator)}
    return KeptBlock(layers, others, {"errors": {"mlp.up_proj": 1 / 3}, "gains": []})


def opened(tmp_path: Path, resume: bool = False, every_s: float = 0.0) -> SearchState:
    return SearchState(tmp_path / "out", IDENTITY, resume, every_s)


def streams(value: float) -> Callable[[Path], None]:
    shelf = MemoryShelf({"0-exact": torch.full((2, 3), value)})
    return lambda folder: shelf.store("0-exact", folder)


def unasked(folder: Path) -> None:
    pytest.fail(f"asked for {folder}")


def names(state: SearchState) -> list[str]:
    return sorted(path.name for path in state.folder.iterdir())


def test_a_block_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    kept = [block(0), block(1)]
    state = opened(tmp_path)
    for index, one in enumerate(kept):
        state.keep_block(index, one)
    for before, after in zip(kept, opened(tmp_path, resume=True).blocks(2), strict=True):
        assert [one.name for one in after.layers] == [one.name for one in before.layers]
        for layer, other in zip(before.layers, after.layers, strict=True):
            assert other.digest() == layer.digest()
            assert other.scales.dtype == torch.bfloat16
        assert after.others.keys() == before.others.keys()
        assert all(torch.equal(after.others[name], one) for name, one in before.others.items())
        assert after.report == before.report


def test_the_last_streams_come_back_and_earlier_ones_are_gone(tmp_path: Path) -> None:
    state = opened(tmp_path)
    for index in range(12):
        state.keep_block(index, block(index))
        state.keep_streams(index + 1, streams(float(index)))
    assert [name for name in names(state) if "streams" in name] == ["streams-00012"]
    kept = opened(tmp_path, resume=True).streams()
    assert kept is not None
    assert kept.block == 12
    assert list(kept.tensors) == ["0-exact"]
    assert torch.equal(kept.tensors["0-exact"], torch.full((2, 3), 11.0))


def test_earlier_streams_that_were_left_do_no_harm(tmp_path: Path) -> None:
    state = opened(tmp_path)
    for index in range(10):
        state.keep_block(index, block(index))
    state.keep_streams(10, streams(10.0))
    shutil.copytree(state.folder / "streams-00010", state.folder / "streams-00009")
    cut_short(state.folder / "streams-00009" / "0-exact.safetensors")
    found = opened(tmp_path, resume=True).streams()
    assert found is not None
    assert found.block == 10


def test_streams_are_kept_when_it_has_been_a_while(tmp_path: Path) -> None:
    state = opened(tmp_path, every_s=60.0)
    state.keep_block(0, block())
    state.keep_streams(1, unasked)
    assert state.streams() is None
    state._kept_at -= 61
    state.keep_streams(2, streams(2.0))
    state.keep_streams(3, unasked)
    kept = state.streams()
    assert kept is not None
    assert kept.block == 2


def test_streams_that_could_not_be_kept_leave_the_earlier_ones(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.keep_block(0, block())
    state.keep_streams(1, streams(1.0))
    before = names(state)
    (state.folder / ".streams-00002.partial").mkdir()  # of a process that was killed

    def half(folder: Path) -> None:
        streams(2.0)(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        state.keep_streams(2, half)
    assert names(state) == before


def test_there_is_no_state_before_a_block_is_finished(tmp_path: Path) -> None:
    state = opened(tmp_path)
    before = state.is_started
    assert not before
    assert list(tmp_path.iterdir()) == []
    state.keep_block(0, block())
    assert state.is_started
    with pytest.raises(OutputError, match="an interrupted search lies in"):
        opened(tmp_path)
    state.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="there is no interrupted search in"):
        opened(tmp_path, resume=True)


def test_what_an_unfinished_removal_left_is_of_no_other_search(tmp_path: Path) -> None:
    state = opened(tmp_path)
    for index in range(3):
        state.keep_block(index, block(index))
    state.keep_streams(3, streams(3.0))
    state.keep_measured("ab", {"full_precision": 2.0})
    (state.folder / "run.json").unlink()  # the first to go
    another = opened(tmp_path)
    another.keep_block(0, block(7))
    assert names(another) == ["block-00000.safetensors", "run.json"]
    assert another.streams() is None


def test_everything_that_changed_is_named_and_nothing_else(tmp_path: Path) -> None:
    opened(tmp_path).keep_block(0, block())
    now = {"settings": {"bits": 3, "search": {"clip": True}}, "seed": 0, "prefill": {"math": "ab"}}
    with pytest.raises(ConfigError) as caught:
        SearchState(tmp_path / "out", now, True, 0.0)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert lines == ["  - prefill.math: None then, 'ab' now", "  - settings.bits: 4 then, 3 now"]


def test_what_was_measured_is_kept_with_the_first_block_and_by_its_text(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.keep_measured("ab", {"full_precision": 1 / 3})
    assert list(tmp_path.iterdir()) == []
    state.keep_block(0, block())
    resumed = opened(tmp_path, resume=True)
    assert resumed.measured("ab") == {"full_precision": 1 / 3}
    assert resumed.measured("cd") == {}
    resumed.keep_measured("ab", {"full_precision": 1 / 3, "quantized": 2.0})
    assert opened(tmp_path, resume=True).measured("ab")["quantized"] == 2.0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.quantization").write_text("years of work")
    with pytest.raises(OutputError, match=r"cannot write to .*out\.quantization: File exists"):
        opened(tmp_path).keep_block(0, block())
    assert (tmp_path / "out.quantization").read_text() == "years of work"


def test_a_table_of_errors_comes_back_to_its_own_search_alone(tmp_path: Path) -> None:
    table = [[{"name": "a", "errors": {"2": 1 / 3}}]]
    opened(tmp_path).keep_errors(table)
    state = opened(tmp_path, resume=True)
    assert state.errors() == table
    (state.folder / "run.json").unlink()  # as an unfinished close leaves it
    anew = opened(tmp_path)
    assert anew.errors() is None
    anew.keep_block(0, block())
    assert not (anew.folder / "errors.json").exists()


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).keep_errors([])
    state = opened(tmp_path, resume=True)
    (state.folder / "errors.json").write_text("[[")
    with pytest.raises(OutputError, match=r"errors\.json"):
        state.errors()
