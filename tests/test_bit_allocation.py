"""The allocation of bits, against all there are, and the table of errors against plain rounding."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize import bit_allocation
from qsun.quantize.bit_allocation import StageLosses, allocate
from qsun.quantize.bit_errors import LayerErrors, layer_errors, stage_losses
from qsun.quantize.clipping import best_ranges
from qsun.scheme import Scheme

BITS = (2, 3, 4, 8)


def drawn(seed: int, count: int) -> list[StageLosses]:
    """Stages whose errors fall about fourfold with each bit, as rounding's do."""
    draw = random.Random(seed)
    return [
        StageLosses(
            (f"{index}.a", f"{index}.b"),
            draw.choice((3, 5, 16)),
            {bits: scale * draw.uniform(0.6, 1.6) * 0.25**bits for bits in BITS},
        )
        for index, scale in enumerate(draw.uniform(0.1, 10) for _ in range(count))
    ]


def mean_bits(stages: list[StageLosses], found: dict[str, int]) -> float:
    total = sum(stage.weights for stage in stages)
    return sum(found[stage.layers[0]] * stage.weights for stage in stages) / total


def loss(stages: list[StageLosses], found: dict[str, int]) -> float:
    return sum(stage.losses[found[stage.layers[0]]] for stage in stages)


@pytest.mark.parametrize("target", [2.0, 2.4, 3.0, 3.25, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_within_the_size_and_the_best_of_all(seed: int, target: float) -> None:
    stages = drawn(seed, 6)
    found = allocate(stages, target)
    assert found.keys() == {name for stage in stages for name in stage.layers}
    assert all(found[first] == found[second] for first, second in (one.layers for one in stages))
    assert mean_bits(stages, found) <= target
    every = (
        {name: bits for one, bits in zip(stages, tried, strict=True) for name in one.layers}
        for tried in product(BITS, repeat=len(stages))
    )
    fitting = [tried for tried in every if mean_bits(stages, tried) <= target]
    best = min(loss(stages, tried) for tried in fitting)
    assert loss(stages, found) == pytest.approx(best, rel=1e-12)


def test_many_stages_fill_the_size() -> None:
    stages = drawn(7, 120)
    assert 3.24 < mean_bits(stages, allocate(stages, 3.25)) <= 3.25


def test_sizes_without_a_common_measure_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = drawn(3, 40)
    exact = loss(stages, allocate(stages, 3.25))
    monkeypatch.setattr(bit_allocation, "MOST_UNITS", 150)
    found = allocate(stages, 3.25)
    assert mean_bits(stages, found) <= 3.25
    assert exact <= loss(stages, found) < 1.5 * exact


def test_a_step_without_gain_may_be_on_the_way_to_one() -> None:
    stages = [StageLosses(("a",), 1, {2: 1.0, 3: 1.0, 4: 0.1})]
    assert allocate(stages, 4.0) == {"a": 4}
    assert allocate(stages, 3.5) == {"a": 2}


def test_bits_that_win_nothing_are_not_spent() -> None:
    assert allocate([StageLosses(("a",), 1, {2: 0.0, 3: 0.0, 8: 0.0})], 8.0) == {"a": 2}


def test_less_than_the_fewest_bits_is_an_error() -> None:
    with pytest.raises(ValueError, match="fewer bits than 2"):
        allocate(drawn(0, 3), 1.9)


def test_the_errors_are_those_of_clipped_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weights = {name: torch.randn(16, 64, generator=generator) for name in ("q", "k")}
    gram = inputs.t() @ inputs
    scheme = Scheme("compressed-tensors", 8, 32, False)
    found = layer_errors(weights, gram, scheme, BITS, torch.bfloat16)
    assert [one.name for one in found] == ["q", "k"]
    for one in found:
        weight = weights[one.name].t()
        assert one.weights == weight.numel()
        assert one.outputs == pytest.approx(float((inputs @ weight).square().sum()), rel=1e-4)
        for bits in BITS:
            args = QuantizationArgs(**scheme.arguments(bits))
            grid = best_ranges(weight, gram, args, torch.bfloat16)
            wrong = inputs @ (grid.values(grid.rounded(weight)) - weight)
            assert one.errors[bits] == pytest.approx(float(wrong.square().sum()), rel=1e-3)
        ordered = [one.errors[bits] for bits in BITS]
        assert ordered == sorted(ordered, reverse=True)


def test_layers_of_dead_inputs_cost_nothing() -> None:
    losses = stage_losses([LayerErrors("a", 10, 0.0, {2: 0.0, 3: 0.0})])
    assert losses.losses == {2: 0.0, 3: 0.0}
    assert losses.weights == 10
