"""The search for codes, against brute force and plain definitions."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.config import SearchConfig
from qsun.quantize.clipping import best_ranges, whole_range
from qsun.quantize.compensation import compensated, damped, inverted
from qsun.quantize.layer_search import Inputs, corrections, output_error, search_layers
from qsun.quantize.refinement import refined
from qsun.quantize.smoothing import best_scales, candidates
from qsun.rounding import round_to_nearest

INPUTS, OUTPUTS, ROWS, GROUP = 128, 24, 400, 32
DTYPE = torch.bfloat16


def args(bits: int, symmetric: bool = False) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP
    )


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated rows, some channels far larger than others."""
    mixed: torch.Tensor = drawn(ROWS, INPUTS, seed=0) @ drawn(INPUTS, INPUTS, seed=1)
    return torch.mul(mixed / INPUTS**0.5, torch.linspace(-1, 2, INPUTS).exp())


@pytest.fixture
def gram(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.t() @ inputs


@pytest.fixture
def weight() -> torch.Tensor:
    """`[in, out]`, with a few outliers, values that bfloat16 holds."""
    found = 0.05 * drawn(INPUTS, OUTPUTS, seed=2)
    found[5, 3] = 0.9
    return found.to(DTYPE).float()


def error(gram: torch.Tensor, wrong: torch.Tensor) -> float:
    return float(output_error(gram, wrong).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_whole_range_rounded_is_round_to_nearest(
    weight: torch.Tensor, bits: int, symmetric: bool
) -> None:
    grid = whole_range(weight, args(bits, symmetric), torch.float32)
    found = grid.values(grid.rounded(weight))
    wanted = round_to_nearest(weight.t().contiguous(), args(bits, symmetric)).t()
    # Halfway between two codes either is the nearest.
    assert torch.allclose((found - weight).abs(), (wanted - weight).abs(), rtol=1e-3, atol=1e-6)
    layer = grid.layer("one", grid.rounded(weight))
    assert torch.equal(layer.weight(), found.t())
    assert int(layer.codes.min()) >= -(2 ** (bits - 1))
    assert int(layer.codes.max()) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_step_makes_the_error_smaller(
    weight: torch.Tensor, gram: torch.Tensor, bits: int
) -> None:
    whole = whole_range(weight, args(bits), DTYPE)
    clipped = best_ranges(weight, gram, args(bits), DTYPE)
    steps = compensated(weight, gram, inverted(damped(gram, 0.01)), clipped)
    grid, after = refined(weight, damped(gram, 0.01), clipped, steps, 3)
    errors = [
        error(gram, one.values(codes) - weight)
        for one, codes in (
            (whole, whole.rounded(weight)),
            (clipped, steps),
            (grid, after),
        )
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_ranges_are_the_best_of_those_tried_for_each_group(
    weight: torch.Tensor, gram: torch.Tensor
) -> None:
    found, whole = best_ranges(weight, gram, args(2), DTYPE), whole_range(weight, args(2), DTYPE)
    for group in range(INPUTS // GROUP):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        block = gram[rows, rows]
        ours = found.values(found.rounded(weight))[rows] - weight[rows]
        widest = whole.values(whole.rounded(weight))[rows] - weight[rows]
        assert bool((output_error(block, ours) <= output_error(block, widest) * 1.0001).all())


def test_uncorrelated_inputs_leave_nothing_to_compensate(weight: torch.Tensor) -> None:
    grid = whole_range(weight, args(3), DTYPE)
    diagonal = torch.diag(torch.linspace(1, 9, INPUTS))
    assert torch.equal(
        compensated(weight, diagonal, inverted(damped(diagonal, 0.01)), grid), grid.rounded(weight)
    )
    same, steps = refined(weight, diagonal, grid, grid.rounded(weight), 1)
    assert torch.equal(steps, grid.rounded(weight))
    assert same is grid


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_refinement_never_makes_its_own_error_larger(
    weight: torch.Tensor, gram: torch.Tensor, sweeps: int
) -> None:
    grid, target = whole_range(weight, args(2), DTYPE), damped(gram, 0.01)
    steps = grid.rounded(weight)
    before = error(target, grid.values(steps) - weight)
    for _ in range(sweeps):
        grid, steps = refined(weight, target, grid, steps, 2)
        after = error(target, grid.values(steps) - weight)
        assert after <= before * (1 + 1e-5)
        before = after
    assert torch.equal(grid.scales, grid.scales.to(DTYPE).float())


def test_scales_are_those_that_brute_force_over_the_samples_finds(
    weight: torch.Tensor, inputs: torch.Tensor, gram: torch.Tensor
) -> None:
    halves = [weight[:, :10], weight[:, 10:]]
    absolute = inputs.abs().mean(dim=0)
    found = best_scales(halves, gram, absolute, args(3), 20, DTYPE)

    def measured(scales: torch.Tensor) -> float:
        wrong = 0.0
        for half in halves:
            scaled = half * scales.unsqueeze(1)
            grid = whole_range(scaled, args(3), DTYPE)
            stand_in = grid.values(grid.rounded(scaled)) / scales.unsqueeze(1)
            wrong += float((inputs.double() @ (stand_in - half).double()).square().sum())
        return wrong

    tried = [torch.ones(INPUTS), *candidates(weight, absolute, args(3), 20)]
    best = min(tried, key=measured)
    assert torch.equal(found.values, best)
    assert found.after == pytest.approx(measured(best), rel=1e-4)
    assert found.before == pytest.approx(measured(tried[0]), rel=1e-4)
    assert found.after < 0.95 * found.before


def test_corrections_are_the_least_squares_solution(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    disturbed = inputs + 0.3 * drawn(ROWS, INPUTS, seed=7)
    gram, cross = disturbed.t() @ disturbed, inputs.t() @ disturbed
    added = corrections(weight, gram, inverted(damped(gram, 1e-6)), cross)
    wanted = torch.linalg.lstsq(disturbed.double(), (inputs @ weight).double()).solution
    assert torch.allclose((weight + added).double(), wanted, rtol=1e-2, atol=1e-3)
    before = (disturbed @ weight - inputs @ weight).norm()
    assert (disturbed @ (weight + added) - inputs @ weight).norm() < 0.75 * before


def test_layers_of_the_same_inputs_are_told_apart(weight: torch.Tensor, gram: torch.Tensor) -> None:
    named = {"a": weight[:, :10].t(), "b": weight[:, 10:].t()}
    found = search_layers(named, Inputs(gram, None), args(3), SearchConfig(), DTYPE)
    assert [one.layer.name for one in found] == ["a", "b"]
    for one, exact in zip(found, named.values(), strict=True):
        wrong = (one.layer.weight() - exact).t()
        whole = error(gram, exact.t())
        assert one.error == pytest.approx((error(gram, wrong) / whole) ** 0.5, rel=1e-3)
        assert one.error < one.rounded_error


def test_inputs_that_never_come_leave_round_to_nearest(weight: torch.Tensor) -> None:
    nothing = torch.zeros(INPUTS, INPUTS)
    found = search_layers(
        {"a": weight.t()}, Inputs(nothing, nothing), args(4), SearchConfig(sweeps=0), DTYPE
    )
    grid = whole_range(weight, args(4), DTYPE)
    assert torch.equal(found[0].layer.weight(), grid.values(grid.rounded(weight)).t())
