"""The comparison of peers: made once, judged once, compared row by row, and shown."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.errors import ModelError
from qsun.models import load_model
from qsun.prefill_module import save_prefill
from qsun.records import Record
from tests.builders import tiny_model
from tests.compare_peers import FULL, MEASURES, Comparison, refuse, results, summary
from tests.gpu.compare_peers import BITS, Model
from tests.judging import Judging
from tests.peers.request import COST
from tests.peers.subjects import OURS, SUBJECTS
from tests.reference import with_adapter
from tests.tuning import write_task

ROOT = Path(__file__).parent.parent
RTN = "round-to-nearest"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "base")
    return tmp_path / "base"


def test_a_comparison_from_samples_to_results(base: Path, tmp_path: Path) -> None:
    save_prefill(
        with_adapter(load_model(base, "bfloat16"), 3), tmp_path / "lora", torch.bfloat16, "../base"
    )
    write_task(tmp_path)
    prefill = {"task": tmp_path / "lora"}
    comparison = Comparison(tmp_path / "state", base, 2, prefill, 1)
    assert comparison.write_texts()["samples"] == 2
    comparison.make(RTN, 2)
    judging = Judging(base, prefill, 5, 3, tmp_path, {"task": "tests"})
    for name, bits in ((FULL, 0), (RTN, 2)):
        comparison.judge(name, bits, judging, list(MEASURES))
    shutil.copy(comparison.judged(FULL, 0), comparison.judged(OURS, 2))
    full = summary(comparison.found(FULL, 0), judging)
    [(name, found)] = results(comparison, [RTN], 2, judging)
    assert name == RTN
    assert set(found) == {"cost", "nats_per_token", "perplexity", "right", "qsun"}
    assert found["perplexity"] != full["perplexity"]
    ahead = found["nats_per_token"]["task"] - full["nats_per_token"]["task"]
    assert found["qsun"]["lower_by"]["task"]["difference"] == pytest.approx(ahead)
    assert list(found["qsun"]["more_right_by"]) == ["task.tests"]


def test_what_is_judged_is_not_judged_again_unless_on_other_rows(
    base: Path, tmp_path: Path
) -> None:
    comparison = Comparison(tmp_path / "state", base, 2, {}, 1)
    path = comparison.judged(RTN, 3)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"likelihood": {"of": 5, "found": {}}}), encoding="utf-8")
    comparison.judge(RTN, 3, Judging(base, {}, rows=5), ["likelihood"])
    with pytest.raises(ModelError):  # there is no checkpoint to judge
        comparison.judge(RTN, 3, Judging(base, {}, rows=6), ["likelihood"])


def test_what_is_made_is_not_made_again(base: Path, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "state", base, 2, {}, 1)
    out = comparison.folder("round-to-nearest", 3)
    out.mkdir(parents=True)
    (out / COST).write_text("{}", encoding="utf-8")
    comparison.make("round-to-nearest", 3)
    assert [path.name for path in out.iterdir()] == [COST]


def test_what_cannot_run_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        refuse(["awq", "qsun"], {"math": tmp_path / "nowhere"})
    assert "awq: one of round-to-nearest" in str(refused.value)
    assert "nowhere is missing" in str(refused.value)


def told(ahead: float | None = None) -> dict[str, Any]:
    """A subject's part of a record."""
    found: dict[str, Any] = {
        "cost": {"wall_s": 90.0, "peak_memory_bytes": 2**30, "versions": {"gptqmodel": "7"}},
        "nats_per_token": {"math": 0.5, "code": 1.5},
        "perplexity": 12.0,
        "right": {"math.seen": 0.25},
    }
    if ahead is not None:
        interval = {"difference": ahead, "interval": [ahead - 0.01, ahead + 0.01]}
        found["qsun"] = {
            "lower_by": {"math": interval, "code": interval},
            "more_right_by": {"math.seen": interval},
        }
    return found


def test_the_table_has_every_subject_and_how_far_qsun_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    peers_table = importlib.import_module("peers_table")
    result = {
        "samples": {"samples": 32, "sources": [{"name": "math"}, {"name": "tools"}]},
        "rows": 48,
        "tests": 8,
        "response_tokens": {"math": 100, "code": 100},
        "full precision": told(),
    }
    hardware = {"cores": 2, "processor": "one"}
    for name, subjects in (("a", {"gptqmodel": told(0.1)}), ("b", {"qsun": told()})):
        part = result | {"bits": {"w3": subjects}}
        record = Record("peers-comparison", {}, 0, part, hardware=hardware)
        record.write(tmp_path / f"{name}.json")
    table = peers_table.table(tmp_path)
    row = "| 3 bits: gptqmodel | 0.500 (+0.090 to +0.110) | 1.500 (+0.090 to +0.110) | 25.0 "
    assert f"{row}(+9.0 to +11.0) | 12.0 | 1.5 | 1.0 |  |" in table
    assert "| 3 bits: **qsun** | 0.500 | 1.500 | 25.0 | 12.0 | 1.5 | 1.0 |  |" in table
    assert "no sample is of code" in table
    assert "gptqmodel 7" in table


def test_on_gpus_each_judging_follows_its_making_and_is_of_the_same_checkpoint(
    tmp_path: Path,
) -> None:
    model = Model("small", tmp_path, ("--rows=4",), ("base",), 8, 20, 30)
    jobs = list(model.jobs())
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs)
    assert {job.gib for job in jobs if not job.name.endswith("-judged")} == {30}
    assert by_name["small-first"].needs == ("base",)
    judged = [job for job in jobs if job.name.endswith("-judged")]
    assert len(judged) == len(BITS) * len(SUBJECTS)
    for job in judged:
        [making] = job.needs
        assert by_name[making].needs == ("small-first",)
        assert by_name[making].command()[-1] == "--only-make"
        assert by_name[making].command()[4:-1] == job.command()[4:]
        assert job.done == Path(job.command()[3])
        job.done.parent.mkdir(exist_ok=True)
        job.done.touch()
    assert model.judged_subjects() == list(SUBJECTS)
    judged[0].done.unlink()
    assert model.judged_subjects() == list(SUBJECTS)[1:]
