"""Lanes: a search over several devices sums the same, and the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsun.block import Block, Stage, block_weights
from qsun.calibrate.lanes import Lanes
from qsun.calibrate.moments import Moments
from qsun.calibrate.pieces import cut_as_served
from qsun.calibrate.shelf import MemoryShelf
from qsun.checkpoint_files import Tensors, read_config_file
from qsun.jobs import quantize_blocks
from tests.builders import tiny_model
from tests.searching import copy_search, digests, interrupt, search, write_search
from tests.test_blocks import samples

CPU = torch.device("cpu")


def walked(folder: Path, devices: int, dtype: torch.dtype) -> Iterator[Moments]:
    """The moments of every stage, of a decode module whose weights are spoilt on the way."""
    config = read_config_file(folder / "config.json")
    weights = Tensors(folder)
    table = weights["model.embed_tokens.weight"].to(dtype)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens, table)

    pieces = cut_as_served(samples(), 1)
    lanes = Lanes(
        lambda device: Block(config, dtype, device),
        [CPU] * devices,
        pieces,
        embed,
        {"one": embed},
        True,
        MemoryShelf(),
    )
    for index in range(int(config["num_hidden_layers"])):
        lanes.write_prompts("one", index, block_weights(weights, index))
        lanes.load(index, block_weights(weights, index))
        for stage in Stage:
            yield lanes.moments(stage)
            for name in stage.value:
                lanes.quantized.linear(name).weight.mul_(1.1)
        lanes.advance()


@torch.no_grad()
@pytest.mark.parametrize("devices", [2, 3, 9])
def test_several_devices_sum_what_one_does(tmp_path: Path, devices: int) -> None:
    tiny_model(tmp_path / "base", layers=3)
    one, several = (walked(tmp_path / "base", count, torch.float32) for count in (1, devices))
    for found, other in zip(one, several, strict=True):
        assert found.rows == other.rows
        assert found.cross is not None
        assert other.cross is not None
        for first, second in ((found.gram, other.gram), (found.cross, other.cross)):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


@torch.no_grad()
def test_several_devices_sum_the_same_bits_each_time(tmp_path: Path) -> None:
    tiny_model(tmp_path / "base", layers=3)
    first = list(walked(tmp_path / "base", 2, torch.bfloat16))
    for _ in range(3):
        for found, other in zip(first, walked(tmp_path / "base", 2, torch.bfloat16), strict=True):
            assert torch.equal(found.gram, other.gram)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]


def test_a_search_over_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_search(tmp_path / "one", batch_tokens=64)
    left = copy_search(config, tmp_path / "left")
    interrupt(left)
    again = copy_search(config, tmp_path / "again")
    monkeypatch.setattr(quantize_blocks, "search_devices", lambda: [CPU, CPU])
    for one in (config, again):
        outcome = search(one)
        assert outcome.exit_code == 0, outcome.stderr
    assert digests(config) == digests(again)
    refused = search(left, "--resume")
    assert refused.exit_code == 3
    assert "  - hardware.devices: 1 then, 2 now\n" in refused.message
