"""Measured curves: read between their points, and refused with everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsun.errors import DataError, QsunError
from qsun.simulate.curve_records import read_curves
from qsun.simulate.curves import Line, StepTimes
from tests.simulating import latency_result, write_curves


def test_a_point_between_is_on_the_line_between(tmp_path: Path) -> None:
    curves = read_curves([write_curves(tmp_path / "latency.json")])
    full, low = curves.steps["bfloat16"], curves.steps["W4A16"]
    assert full(8, 512) == pytest.approx(0.018)
    assert full(8, 320) == pytest.approx(0.016)
    assert full(12, 128) == pytest.approx(0.017)
    assert full(12, 320) == pytest.approx((0.016 + 0.025) / 2)
    assert low(12, 320) == pytest.approx(0.6 * (0.016 + 0.025) / 2)
    assert curves.prefill_s(288) == pytest.approx(0.04)
    assert curves.hand_off_s == 0.003
    assert full.largest_batch == 16
    assert full.largest_within(0.0161, 320) == 8


def test_beyond_the_longest_the_last_slope_goes_on_and_never_down(tmp_path: Path) -> None:
    curves = read_curves([write_curves(tmp_path / "latency.json")])
    full = curves.steps["bfloat16"]
    assert full(8, 896) == pytest.approx(0.022)
    assert full(12, 5120) == pytest.approx((full(8, 5120) + full(16, 5120)) / 2)
    assert curves.prefill_s(960) == pytest.approx(0.10)
    assert Line((1, 2), (3, 2.9))(100) == 2.9


def test_below_the_shortest_its_time_counts(tmp_path: Path) -> None:
    curves = read_curves([write_curves(tmp_path / "latency.json")])
    assert curves.prefill_s(2) == 0.02
    assert curves.steps["bfloat16"](1, 1) == 0.010
    assert StepTimes({4: Line((1,), (0.5,)), 8: Line((1,), (0.9,))})(2, 9) == 0.5


def test_batches_may_be_measured_at_different_contexts() -> None:
    dice = np.random.default_rng(5)
    measured = {
        batch: Line(tuple(at), tuple(np.sort(dice.uniform(0.01, 0.1, 3))))
        for batch, at in ((1, (64, 100, 900)), (5, (80, 400, 500)), (9, (10, 20, 3000)))
    }
    steps = StepTimes(measured)
    for batch in range(1, 10):
        low, high = (1, 5) if batch < 5 else (5, 9)
        for context in (1, 64, 90, 333, 700, 2000, 9000):
            part = (batch - low) / (high - low)
            expected = (1 - part) * measured[low](context) + part * measured[high](context)
            assert steps(batch, context) == pytest.approx(expected)
    falling, rising = Line((1, 2), (3, 2.9)), Line((1, 2), (3, 5))
    assert StepTimes({1: falling, 3: rising})(2, 4) == pytest.approx((2.9 + 9) / 2)


def test_formats_may_come_from_several_records(tmp_path: Path) -> None:
    whole = latency_result()
    paths = []
    for name in ("bfloat16", "W4A16"):
        rows = [row for row in whole["tpot"] if row["format"] == name]
        path = tmp_path / f"{name}.json"
        paths.append(write_curves(path, whole | {"tpot": rows}))
    curves = read_curves(paths)
    assert list(curves.steps) == ["bfloat16", "W4A16"]
    assert [one["formats"] for one in curves.origin] == [["bfloat16"], ["W4A16"]]
    with pytest.raises(DataError, match="format bfloat16 is in another record, too"):
        read_curves([paths[0], paths[0]])


def row(**changes: Any) -> dict[str, Any]:
    return {"format": "W4A16", "batch": 2, "context_tokens": 128, "tpot_s": 0.007} | changes


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tpot": []}, "tpot: no rows"),
        ({"prefill": []}, "prefill: no rows"),
        ({"prefill": None}, "prefill: no rows"),
        ({"tpot": [row(tpot_s=0)]}, "tpot[0]: tpot_s: 0 is not a number above 0"),
        ({"tpot": [row(tpot_s=float("nan"))]}, "tpot[0]: tpot_s: nan is not a number above 0"),
        ({"tpot": [row(batch=1.5)]}, "tpot[0]: batch: 1.5 is not a whole number"),
        ({"tpot": [row(batch=True)]}, "tpot[0]: batch: True is not a number above 0"),
        ({"tpot": [row(format="")]}, "tpot[0]: format: '' is no name"),
        ({"tpot": [3]}, "tpot[0]: 3 is no row"),
        ({"tpot": [row(), row()]}, "tpot of W4A16, batch 2: 128 tokens, more than once"),
        (
            {"tpot": [row(), row(batch=4, tpot_s=0.005)]},
            "tpot of W4A16, 128 tokens: batch 4 takes 0.005 s, less than 2 (0.007 s)",
        ),
        (
            {"tpot": [row(), row(context_tokens=256, tpot_s=0.005)]},
            "tpot of W4A16, batch 2: 256 tokens takes 0.005 s, less than 128 (0.007 s)",
        ),
        (
            {"prefill": [{"prompt_tokens": n, "seconds": 1 / n} for n in (8, 16)]},
            "prefill: 16 tokens takes 0.0625 s, less than 8 (0.125 s)",
        ),
        ({"hand_off_s": -1}, "hand_off_s: -1 is not a number of seconds"),
        ({"hand_off_s": "fast"}, "hand_off_s: 'fast' is not a number of seconds"),
    ],
)
def test_wrong_curves_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read_curves([write_curves(tmp_path / "latency.json", latency_result() | change)])
    assert f"latency.json: {problem}" in str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    wrong = {"tpot": [row(batch=0), row(tpot_s="quick")], "prefill": [], "hand_off_s": None}
    with pytest.raises(DataError) as caught:
        read_curves([write_curves(tmp_path / "latency.json", wrong)])
    for part in ("tpot[0]: batch", "tpot[1]: tpot_s", "prefill: no rows", "hand_off_s: None"):
        assert part in str(caught.value)


def test_a_little_less_time_is_noise_and_is_noted(tmp_path: Path) -> None:
    rows = [row(), row(batch=4, tpot_s=0.0069)]
    curves = read_curves([write_curves(tmp_path / "a.json", latency_result() | {"tpot": rows})])
    assert curves.steps["W4A16"](4, 128) == 0.0069
    assert "batch 4 takes 0.0069 s" in curves.notes[0]


def test_other_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QsunError, match="is a scorecard of schema 1, not a latency of schema 1"):
        read_curves([write_curves(tmp_path / "latency.json", kind="scorecard")])
    path = write_curves(tmp_path / "latency.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": [1]}))
    with pytest.raises(DataError, match="result is no mapping"):
        read_curves([path])
