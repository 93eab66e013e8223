"""A tile's turns as one operation: the same codes as row by row, compiled or not."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize import compensation, fused, refinement
from qsun.quantize.clipping import whole_range
from qsun.quantize.compensation import damped, inverted

ARGS = QuantizationArgs(num_bits=3, type="int", symmetric=False, strategy="group", group_size=32)
Case = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def case() -> Case:
    drawn = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 40, generator=drawn)
    inputs = torch.randn(400, 96, generator=drawn) @ torch.randn(96, 96, generator=drawn)
    return weight, inputs.t() @ inputs


def searched(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    weight, gram = case
    grid, more = whole_range(weight, ARGS, torch.bfloat16), damped(gram, 0.1)
    steps = compensation.compensated(weight, gram, inverted(more), grid)
    return steps, refinement.refined(weight, more, grid, steps, 2)[1]


def by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator."""
    for module in (compensation, refinement):
        monkeypatch.setattr(module, "_one_by_one", module._fused)


@pytest.mark.parametrize("compiles", [False, True])
def test_codes_are_the_same(case: Case, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four inputs at once for the compiler's sake.
    for module in (compensation, refinement):
        monkeypatch.setattr(module, "at_once", lambda _device: 4 if compiles else 32)
    expected = searched(case)
    if not compiles:
        monkeypatch.setattr(fused, "compiled", lambda turns: turns)
    by_tiles(monkeypatch)
    found = searched(case)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours == theirs).float().mean() > 0.999  # ties may fall either way
    assert not torch.equal(expected[0], expected[1])


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with fused.one_thread():
        within = torch.get_num_threads()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (within, after) == (1, 2)
