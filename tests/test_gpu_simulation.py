"""The simulation of what was measured on a GPU, from the committed loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsun.records import read_record
from tests.gpu.simulate_systems import checked, planned

RECORDS = Path(__file__).parents[1] / "docs" / "records"
LOADS = RECORDS / "loads-gpu"


def rounded(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


def simulated() -> Any:
    return rounded(read_record(RECORDS / "gpu-simulation.json", "gpu-simulation").result)


def test_the_record_is_what_the_loads_give() -> None:
    found = list(checked(LOADS))
    assert rounded(found) == simulated()["checked"]
    assert {one["system"] for one in found} == {"sun-1", "qsun-1"}
    of_bench = read_record(LOADS / "sun-1-alpha-3.json", "bench").result["points"][0]["runs"][0]
    (last,) = [one for one in found if (one["system"], one["alpha"]) == ("sun-1", 3)]
    assert last["measured"]["tokens_per_s"] == of_bench["tokens_per_s"]


def test_every_layout_is_beside_the_isolated_one_of_its_load() -> None:
    rows = list(planned(LOADS / "isolated-4-alpha-3.json", LOADS))
    told = simulated()["a_gpu_a_decode_worker"]
    assert rounded(rows) == [one for one in told if one["alpha"] == 3]
    assert set(rows[0]["to_isolated"].values()) == {1.0}
    assert [one["system"] for one in rows] == ["isolated-4", "sun-4", "sun-2", "qsun-4", "qsun-2"]
