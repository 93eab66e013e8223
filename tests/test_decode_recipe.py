"""The recipe of a decode module: all that its weights follow from, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qsun.config import SearchConfig
from qsun.decode_recipe import decode_recipe

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs" / "records" / "smollm2-135m-w4-awq.json"
TUNED_THROUGH = ROOT / "exports" / "reference" / "qsun-math" / "records" / "tuning.json"

Value = dict[str, Any]
Change = Callable[[Value, Value], object]  # of section `quantize`, and of the result


def recipe(folder: Path, record: Value, change: Change = lambda quantize, result: None) -> str:
    changed = copy.deepcopy(record)
    change(changed["config"]["quantize"], changed["result"])
    path = folder / "quantization.json"
    path.write_text(json.dumps(changed))
    found = decode_recipe(path)
    assert found is not None
    return found


@pytest.fixture
def before() -> Value:
    """A record from before there was another engine."""
    record: Value = json.loads(RECORD.read_text(encoding="utf-8"))
    assert not {"engine", "search"} & record["config"]["quantize"].keys()
    return record


@pytest.fixture
def ours(before: Value) -> Value:
    """A record of engine qsun, with a prefill module for each source."""
    prefill = [{"task": task, "module": f"../{task}"} for task in ("math", "tools")]
    search = json.loads(json.dumps(asdict(SearchConfig()) | {"prefill": prefill}))
    before["config"]["quantize"] |= {"engine": "qsun", "search": search}
    before["result"]["prefill"] = {"math": "ab", "tools": "cd"}
    return before


def test_the_recipe_that_the_reference_module_was_tuned_through_is_still_found() -> None:
    tuning = json.loads(TUNED_THROUGH.read_text(encoding="utf-8"))
    assert decode_recipe(RECORD) == tuning["result"]["decode_recipe"]


def test_records_of_the_older_engine_have_the_recipe_that_they_had(
    before: Value, tmp_path: Path
) -> None:
    plain = json.loads(json.dumps(asdict(SearchConfig())))

    def as_written_now(quantize: Value, result: Value) -> None:
        quantize |= {"engine": "llmcompressor", "search": plain}
        result["prefill"] = {}

    assert recipe(tmp_path, before, as_written_now) == decode_recipe(RECORD)


def test_without_a_record_there_is_no_recipe(tmp_path: Path) -> None:
    assert decode_recipe(tmp_path / "quantization.json") is None


CHANGES: dict[str, Change] = {
    "engine": lambda quantize, _: quantize.update(engine="llmcompressor"),
    "bits": lambda quantize, _: quantize.update(bits=3),
    "grid points": lambda quantize, _: quantize.update(grid_points=11),
    "smoothing": lambda quantize, _: quantize["search"].update(smoothing="awq"),
    "sweeps": lambda quantize, _: quantize["search"].update(sweeps=3),
    "positions": lambda quantize, _: quantize["search"].update(positions="all"),
    "a module": lambda _, result: result["prefill"].update(math="ef"),
    "modules of each other": lambda _, result: result.update(prefill={"math": "cd", "tools": "ab"}),
    "no module": lambda _, result: result["prefill"].pop("tools"),
    "tokens": lambda _, result: result["calibration"].update(sha256="00"),
    "sources of each other": lambda _, result: result["calibration"]["sources"].reverse(),
    "base": lambda _, result: result["base"].update(sha256={"model.gguf": "00"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_differs_with_what_weights_follow_from(
    ours: Value, tmp_path: Path, change: Change
) -> None:
    assert recipe(tmp_path, ours, change) != recipe(tmp_path, ours)


def elsewhere(quantize: Value, _: Value) -> None:
    quantize["search"]["prefill"] = [{"task": "math", "module": "/elsewhere"}]


ALIKE: dict[str, Change] = {
    "format": lambda quantize, _: quantize.update(format="awq"),
    "calibration's path": lambda quantize, _: quantize.update(calibration="elsewhere.yaml"),
    "held-out text": lambda quantize, _: quantize.update(heldout="elsewhere.yaml"),
    "tensor parallelism": lambda quantize, _: quantize.update(tensor_parallel=2),
    "what is kept for a resume": lambda quantize, _: quantize["search"].update(keep_every_s=0.0),
    "modules' paths": elsewhere,
    "time": lambda _, result: result["cost"].update(wall_s=1.0),
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_it_is_the_same_whatever_else_differs(ours: Value, tmp_path: Path, change: Change) -> None:
    assert recipe(tmp_path, ours, change) == recipe(tmp_path, ours)
