"""Reasons of layers' errors: on layers that were made to have one, quantized by the real search."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.calibrate.moments import Moments
from qsun.calibrate.row_pairs import RowPairs
from qsun.config import SearchConfig
from qsun.quantize.diagnosis import Diagnosis, diagnose, independence, reach
from qsun.quantize.layer_search import Inputs, search_layers
from qsun.quantize.reasons import FACTORS, FEW, few_positions, typical, worst_layers

INPUTS, OUTPUTS, ROWS, GROUP = 64, 48, 1000, 32
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
DEFAULT = SearchConfig()
ARGS = QuantizationArgs(num_bits=3, type="int", symmetric=False, strategy="group", group_size=GROUP)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int = 0) -> torch.Tensor:
    """Rows of inputs whose energy lies in few directions."""
    energies = torch.linspace(1, -2, INPUTS).exp()
    turned, _ = torch.linalg.qr(drawn(INPUTS, INPUTS, seed=9))
    rows: torch.Tensor = (drawn(ROWS, INPUTS, seed=seed) * energies) @ turned
    return rows


def weight(seed: int = 1) -> torch.Tensor:
    return 0.05 * drawn(OUTPUTS, INPUTS, seed=seed)


def searched(
    name: str,
    rows: torch.Tensor,
    weights: torch.Tensor,
    exact: torch.Tensor | None = None,
    search: SearchConfig = DEFAULT,
) -> tuple[dict[str, Any], dict[str, Any], Diagnosis]:
    """A layer's result and its stage, as a record has them."""
    summed = Moments.of(rows.shape[1], CPU, exact is not None)
    summed.add(rows, exact)
    if exact is not None:
        summed.pairs = RowPairs(len(rows))
        summed.pairs.add(rows, exact)
    named = {name: weights}
    [found] = search_layers(named, Inputs(summed.gram, summed.cross), ARGS, search, DTYPE)
    told = diagnose(named, [found], summed, None, ARGS, DTYPE)
    layer = {"name": name, "bits": 3, "error": found.error, "rtn_error": found.rounded_error}
    return layer | {"numbers": asdict(told.layers[name])}, asdict(told.stage), told


def among_ordinary(
    rows: torch.Tensor, weights: torch.Tensor, search: SearchConfig = DEFAULT
) -> tuple[str, dict[str, float]]:
    """The reason and the factors of a layer among six ordinary ones."""
    ordinary = [(f"ordinary-{seed}", correlated(seed), weight(seed)) for seed in range(6)]
    layers = [*ordinary, ("odd", rows, weights)]
    found = [searched(name, x, w, None, search) for name, x, w in layers]
    worst = worst_layers([one[0] for one in found], [one[1] for one in found])
    assert [reason.layer["name"] for reason in worst[:1]] == ["odd"]
    assert all(reason.text == "no worse than the typical layer" for reason in worst[-3:])
    return worst[0].text, worst[0].factors


@pytest.mark.parametrize("sequential", [False, True])
def test_an_error_is_the_product_of_its_factors(sequential: bool) -> None:
    exact = correlated() if sequential else None
    rows = correlated() + (0.05 * drawn(ROWS, INPUTS, seed=3) if sequential else 0)
    layer, _, _ = searched("one", rows, weight(), exact)
    product = math.prod(factor.value(layer) for factor in FACTORS)
    assert product == pytest.approx(layer["error"], rel=1e-3)
    usual = typical([layer])
    assert usual.error == pytest.approx(layer["error"])


def test_a_weight_far_from_the_others_of_its_group() -> None:
    odd = weight()
    odd[:, ::GROUP] *= 12
    text, factors = among_ordinary(correlated(), odd)
    assert text.startswith("weights far apart within their groups: a range is ")
    assert max(factors, key=lambda word: factors[word]) == "weights"


def test_outputs_that_are_small_beside_their_inputs() -> None:
    rows, odd = correlated(), weight()
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    strong = directions[:16]
    text, factors = among_ordinary(rows, odd - 0.97 * odd @ strong.t() @ strong)
    assert text.startswith("outputs small against the inputs: 0.")
    assert factors["outputs"] > 1.5


def test_inputs_that_tell_nothing_of_each_other() -> None:
    text, factors = among_ordinary(drawn(ROWS, INPUTS, seed=4), weight())
    assert text.startswith("inputs tell little of each other: 9")
    assert factors["search"] > 1.4


def test_rounding_that_falls_on_a_strong_input() -> None:
    rows, odd = correlated(), weight()
    rows[:, 7] *= 12
    # Nearly all rounding error is in the strong input's group, nearly all weight in the other.
    odd[:, 0] = 0.6 * odd[:, 0].sign()
    odd[:, 7] = 0.16 * odd[:, 7].sign()
    odd[:, GROUP:] = 0.2 * odd[:, GROUP:].sign()
    plain = SearchConfig(rounding="nearest", clip=False, sweeps=0)
    text, factors = among_ordinary(rows, odd, plain)
    assert "rounding falls on the strong inputs: one of 64 holds 7" in text
    assert factors["search"] == pytest.approx(1)


def ordinary() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Four layers and their stages, none of them remarkable."""
    found = [searched(str(seed), correlated(seed), weight(seed)) for seed in range(4)]
    return [one[0] for one in found], [one[1] for one in found]


def test_no_single_cause() -> None:
    layers, stages = ordinary()
    for name in ("weight_rounding", "rounding_reach"):
        layers[2]["numbers"][name] *= 1.5
    layers[2] |= {
        "error": 1.5**3 * layers[2]["error"],
        "rtn_error": 1.5**2 * layers[2]["rtn_error"],
    }
    [reason] = worst_layers(layers, stages, 1)
    assert reason.layer["name"] == "2"
    assert reason.text == "no single cause"
    assert sorted(value > 1.3 for value in reason.factors.values()) == [False, True, True, True]


def test_fewer_bits_are_named_as_such() -> None:
    layers, stages = ordinary()
    layers[2]["numbers"]["weight_rounding"] *= 2
    for name in ("error", "rtn_error"):
        layers[2][name] *= 2
    layers[2]["bits"] = 2
    [reason] = worst_layers(layers, stages, 1)
    assert reason.text == "2 bits, where layers have 2.8 on average"


def test_what_is_exact_has_no_factors() -> None:
    steps = torch.randint(0, 8, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(5))
    steps[:, ::GROUP], steps[:, 1::GROUP] = 0, 7
    exact, stage, _ = searched("exact", correlated(), (steps - 3) * 0.25)
    dead, dead_stage, _ = searched("dead", correlated(), torch.zeros(OUTPUTS, INPUTS))
    assert exact["rtn_error"] == dead["error"] == 0
    other, other_stage, _ = searched("other", correlated(), weight())
    reasons = worst_layers([exact, dead, other], [stage, dead_stage, other_stage])
    assert reasons[0].layer["name"] == "other"
    assert {reason.text for reason in reasons[1:]} == {"no single cause: round-to-nearest is exact"}


def test_what_comes_with_the_inputs_is_told_from_what_the_codes_do() -> None:
    exact = correlated()
    changed = exact + 0.3 * drawn(ROWS, INPUTS, seed=6)
    layer, stage, told = searched("one", changed, weight(), exact)
    outputs = exact @ weight().t()
    inherited = float(((changed - exact) @ weight().t()).norm() / outputs.norm())
    numbers = layer["numbers"]
    assert numbers["inherited_error"] == pytest.approx(inherited, rel=0.15)  # on a sample
    assert numbers["total_error"] > layer["error"]
    assert stage["input_change"] == pytest.approx(
        float((changed - exact).norm() / exact.norm()), rel=0.1
    )
    _, alone, _ = searched("one", exact, weight())
    assert alone["input_change"] is None
    assert told.layers["one"].group_width > 3


def test_directions_and_independence_have_their_bounds() -> None:
    _, spread, _ = searched("one", drawn(ROWS, INPUTS, seed=4), weight())
    assert spread["directions"] == pytest.approx(INPUTS, rel=0.1)
    assert independence(torch.eye(INPUTS)) == pytest.approx(1)
    alike = drawn(ROWS, 1, seed=0).expand(ROWS, INPUTS)
    _, one, _ = searched("one", alike.contiguous(), weight())
    assert one["directions"] == pytest.approx(1, rel=1e-3)
    assert one["independence"] < 0.1
    assert one["largest_channel"] == pytest.approx(1 / INPUTS, rel=1e-3)
    assert reach(torch.eye(INPUTS), weight().t()) == pytest.approx(1, rel=1e-3)


def test_independence_is_what_weaker_inputs_leave_of_each_input() -> None:
    rows = correlated().double()
    order = rows.square().sum(dim=0).argsort()
    left = 0.0
    for at, one in enumerate(order.tolist()):
        weaker, wanted = rows[:, order[:at]], rows[:, one : one + 1]
        told = weaker @ torch.linalg.lstsq(weaker, wanted).solution if at else 0
        left += float((wanted - told).square().sum())
    share = left / float(rows.square().sum())
    found = independence((rows.t() @ rows).float(), damping=1e-6)
    assert found == pytest.approx(share, rel=0.01)


def test_few_positions_are_fewer_than_so_many_for_each_input() -> None:
    _, few, _ = searched("one", correlated()[: FEW * INPUTS - 1], weight())
    _, enough, _ = searched("two", correlated()[: FEW * INPUTS], weight())
    assert few_positions([few, enough]) == [few]


def test_pairs_are_the_same_rows_however_they_are_cut() -> None:
    rows = torch.arange(1000.0).unsqueeze(1)
    whole, cut = RowPairs(1000), RowPairs(1000)
    whole.add(rows, rows + 0.5)
    for start in range(0, 1000, 7):
        cut.add(rows[start : start + 7], rows[start : start + 7] + 0.5)
    assert torch.equal(whole.inputs, cut.inputs)
    assert torch.equal(whole.inputs + 0.5, cut.exact)
    assert len(whole.inputs) == 334  # every third
