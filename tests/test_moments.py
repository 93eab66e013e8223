"""Moments: a stand-in's output error from sums alone, and sums that do not depend on batches."""

from __future__ import annotations

import pytest
import torch

from qsun.calibrate.moments import Moments
from qsun.quantize.layer_search import output_error

INPUTS, OUTPUTS, ROWS = 48, 20, 300


def rows(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Inputs with an outlying channel and a large mean, as Transformers have."""
    drawn = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(seed)) + 0.5
    drawn[:, 3] *= 40
    return drawn.to(dtype)


def summed(inputs: torch.Tensor, at_once: int, exact: torch.Tensor | None = None) -> Moments:
    found = Moments.of(INPUTS, torch.device("cpu"), exact is not None)
    for start in range(0, len(inputs), at_once):
        piece = slice(start, start + at_once)
        found.add(inputs[piece], None if exact is None else exact[piece])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_from_the_gram_matrix_is_the_one_measured_on_samples(dtype: torch.dtype) -> None:
    inputs = rows(dtype)
    wrong = 0.01 * torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(1))
    measured = (inputs.double() @ wrong.double()).square().sum(dim=0)
    found = output_error(summed(inputs, 64).gram, wrong).double()
    assert torch.allclose(found, measured, rtol=1e-4)


def test_sums_are_those_of_all_rows_however_they_are_cut() -> None:
    inputs, exact = rows(torch.bfloat16), rows(torch.bfloat16, seed=1)
    whole, cut = summed(inputs, ROWS, exact), summed(inputs, 7, exact)
    joined = summed(inputs[:100], 64, exact[:100])
    joined.join(summed(inputs[100:], 64, exact[100:]))
    reference = exact.double().t() @ inputs.double()
    for one in (whole, cut, joined):
        assert one.rows == ROWS
        assert one.cross is not None
        assert torch.allclose(one.cross.double(), reference, rtol=1e-5, atol=1e-3)
        assert torch.allclose(one.absolute, inputs.float().abs().sum(dim=0), rtol=1e-5)
        assert torch.allclose(one.gram, one.gram.t(), rtol=1e-5, atol=1e-3)


def test_products_of_bfloat16_are_summed_in_float32() -> None:
    inputs = rows(torch.bfloat16)
    reference = inputs.double().t() @ inputs.double()
    error = (summed(inputs, ROWS).gram.double() - reference).norm() / reference.norm()
    assert error < 1e-6  # 2e-3 were the sums kept as bfloat16


def test_a_row_of_weight_three_counts_as_three_rows() -> None:
    inputs, exact = rows(torch.bfloat16), rows(torch.bfloat16, seed=1)
    thrice = summed(torch.cat([inputs] * 3), ROWS, torch.cat([exact] * 3))
    found = Moments.of(INPUTS, torch.device("cpu"), True)
    found.add(inputs, exact, 3.0)
    assert found.rows == ROWS
    assert found.weight == thrice.weight == 3 * ROWS
    assert found.cross is not None
    assert thrice.cross is not None
    for ours, theirs in (
        (found.gram, thrice.gram),
        (found.cross, thrice.cross),
        (found.absolute, thrice.absolute),
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-2)
