"""`qsun evaluate` on a tiny bundle: the scorecard, its samples, floors, comparisons, a resume."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsun.bundle import read_bundle
from qsun.evaluate import run
from qsun.evaluate.samples import read_samples
from qsun.evaluate.statistics import exact_interval, mcnemar
from qsun.records import Record, read_record
from tests.evaluating import TESTS, evaluate, evaluated, scored_bundle, without_seconds
from tests.lm_eval_tasks import hurried

SCORECARD = "records/scorecard.json"
SAMPLES = "records/scorecard"


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests share it and write elsewhere."""
    return scored_bundle(tmp_path_factory.mktemp("evaluated") / "tiny")


@pytest.fixture(scope="module")
def out(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole evaluation of it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    evaluated(bundle, out=folder)
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return read_record(out / SCORECARD, "scorecard").result


def floors(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "floors.yaml"
    path.write_text(yaml.safe_dump({"floors": list(entries)}), encoding="utf-8")
    return path


def stop_at(monkeypatch: pytest.MonkeyPatch, asked: int, stop: Any) -> list[str]:
    """Call `stop` in place of the `asked`th system and test set; gives those that were asked."""
    done: list[str] = []
    ask = run.ask

    def stopping(asking: Any, test_set: Any, system: str, lm: Any) -> Any:
        if len(done) == asked:
            stop()
        done.append(f"{system}--{test_set.name}")
        return ask(asking, test_set, system, lm)

    monkeypatch.setattr(run, "ask", stopping)
    return done


def test_a_scorecard_is_a_record_of_what_was_right(bundle: Path, out: Path) -> None:
    record = read_record(out / SCORECARD, "scorecard")
    assert record.command.startswith("qsun evaluate")
    assert record.versions["torch"]
    found = record.result["systems"]
    assert sorted(found) == sorted(TESTS)
    assert all(list(systems) == ["base", "qsun"] for systems in found.values())
    qsun = found["math.sums"]["qsun"]
    assert (qsun["accuracy"], qsun["correct"], qsun["total"]) == (5 / 8, 5, 8)
    assert tuple(qsun["interval_95"]) == exact_interval(5, 8)
    assert (qsun["mean_tokens"], qsun["unfinished"], qsun["invalid"]) == (6.0, 1.0, 0.0)
    assert qsun["tokens_per_second"] > 0
    assert record.result["values"]["math.sums"]["qsun"] == "11111000"
    assert record.result["bundle"] == read_bundle(bundle).digest
    assert (record.result["limit"], record.result["served"]) == (None, False)


def test_pairs_follow_from_the_values(result: dict[str, Any]) -> None:
    (pair,) = [one for one in result["pairs"] if one["test"] == "math.sums"]
    qsun, base = (
        [int(one) for one in result["values"]["math.sums"][name]] for name in ("qsun", "base")
    )
    assert base[4:] == [0, 1, 1, 0]
    assert (pair["first"], pair["second"]) == ("qsun", "base")
    assert pair["difference"] == (sum(qsun) - sum(base)) / 8
    assert pair["only_first"] == sum(one > other for one, other in zip(qsun, base, strict=True))
    assert pair["only_second"] == 2
    assert pair["p"] == mcnemar(pair["only_first"], 2)
    low, high = pair["interval_95"]
    assert low < pair["difference"] < high


def test_samples_are_complete_and_judge_what_was_said(out: Path, result: dict[str, Any]) -> None:
    names = {f"{system}--{test}.jsonl.gz" for test in TESTS for system in ("base", "qsun")}
    assert {path.name for path in (out / SAMPLES).iterdir()} == names
    for path in (out / SAMPLES).iterdir():
        samples = read_samples(path)
        assert [row.index for row in samples.rows] == list(range(3 if "more" in path.name else 8))
        assert samples.digest == result["tests"][samples.test]["sha256"]
        assert len({row.prompt_sha256 for row in samples.rows}) == len(samples.rows)
        kept = "".join(str(int(row.value)) for row in samples.rows)
        assert kept == result["values"][samples.test][samples.system]
        assert all(row.response and row.tokens == 6 and row.ended is False for row in samples.rows)
    numbers = read_samples(out / SAMPLES / "qsun--code.sums.jsonl.gz").rows
    assert [row.invalid for row in numbers] == [
        not any(character.isdigit() for character in row.response) for row in numbers
    ]


def test_the_scorecard_is_written_last_and_nothing_else_is_left(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []
    write = Record.write

    def writing(record: Record, path: Path) -> None:
        there.append({one.name for one in (tmp_path / "out" / SAMPLES).iterdir()})
        assert (tmp_path / "out.evaluation").is_dir()
        write(record, path)

    monkeypatch.setattr(Record, "write", writing)
    evaluated(bundle, "--tasks", "math.more", out=tmp_path / "out")
    assert there == [{f"{system}--math.more.jsonl.gz" for system in ("base", "qsun")}]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_numbers_come_twice_also_into_the_bundle_itself(
    bundle: Path, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    monkeypatch.chdir(copy)
    again = evaluated(Path())
    assert without_seconds(again) == without_seconds(result)
    assert read_record(copy / SCORECARD, "scorecard").result == again
    assert read_bundle(copy).digest == result["bundle"]
    monkeypatch.chdir(tmp_path)
    fewer = evaluated(copy, "--tasks", "math.more")
    assert sorted(path.name for path in (copy / SAMPLES).iterdir()) == [
        "base--math.more.jsonl.gz",
        "qsun--math.more.jsonl.gz",
    ]
    assert (
        without_seconds(fewer)["systems"]["math.more"]
        == (without_seconds(result)["systems"]["math.more"])
    )


def test_an_interrupted_evaluation_goes_on_where_it_was(
    bundle: Path, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        done = stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = evaluate(bundle, out=tmp_path / "out")
    kept = tmp_path / "out.evaluation"
    assert outcome.exit_code == 130
    assert "no scorecard was written" in outcome.message
    assert f"waits in {kept}" in outcome.message
    assert "--resume" in outcome.message
    assert not (tmp_path / "out").exists()
    assert {path.name for path in kept.glob("*.gz")} == {f"{one}.jsonl.gz" for one in done}

    refused = evaluate(bundle, out=tmp_path / "out")
    assert refused.exit_code == 7
    assert f"an interrupted evaluation lies in {kept}" in refused.message
    changed = evaluate(bundle, "--resume", "--limit", "3", out=tmp_path / "out")
    assert changed.exit_code == 3
    assert "limit: None then, 3 now" in changed.message
    changed = evaluate(
        bundle, "--resume", "--systems", "qsun", "--set", "evaluate.seed=4", out=tmp_path / "out"
    )
    assert changed.exit_code == 3
    assert "seed: 0 then, 4 now" in changed.message
    assert "modules.math, base, prefill" in changed.message

    left = stop_at(monkeypatch, 99, None)
    resumed = evaluated(bundle, "--resume", out=tmp_path / "out")
    assert without_seconds(resumed) == without_seconds(result)
    assert len(left) == 6 - 2
    assert not set(left) & set(done)
    assert not kept.exists()


def test_a_failure_on_the_way_leaves_what_was_finished(
    bundle: Path, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        stop_at(patch, 3, fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            evaluate(bundle, "--tasks", "math", out=tmp_path / "out")
    # A resume may ask for more: its scorecard names the modules of that too.
    resumed = evaluated(bundle, "--resume", out=tmp_path / "out")
    assert without_seconds(resumed) == without_seconds(result)


def test_a_full_disk_loses_no_sample(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_record: Record, _path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", full)
        outcome = evaluate(bundle, "--tasks", "math.more", out=tmp_path / "out")
    assert outcome.exit_code == 7
    assert "No space left on device" in outcome.message
    assert "go on by --resume" in outcome.message
    asked = stop_at(monkeypatch, 99, None)
    evaluated(bundle, "--resume", "--tasks", "math.more", out=tmp_path / "out")
    assert asked == []


def test_there_must_be_something_to_resume(bundle: Path, tmp_path: Path) -> None:
    outcome = evaluate(bundle, "--resume", out=tmp_path / "out")
    assert outcome.exit_code == 7
    assert "there is no interrupted evaluation in" in outcome.message


def test_a_limit_is_the_first_rows_and_a_large_one_all(
    bundle: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    three = evaluated(bundle, "--limit", "3", "--tasks", "math.sums", out=tmp_path / "three")
    assert {one["total"] for one in three["systems"]["math.sums"].values()} == {3}
    values = {name: one[:3] for name, one in result["values"]["math.sums"].items()}
    assert three["values"]["math.sums"] == values
    assert three["limit"] == 3
    more = evaluated(bundle, "--limit", "99", "--tasks", "math.sums", out=tmp_path / "all")
    assert more["values"]["math.sums"] == result["values"]["math.sums"]


def test_floors_that_are_met_change_nothing(
    bundle: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    path = floors(
        tmp_path,
        {"system": "qsun", "test": "math.sums", "accuracy": 0.625},
        {"system": "qsun", "test": "math.sums", "of": "base", "ratio": 1.0},
    )
    found = evaluated(bundle, "--tasks", "math.sums", "--floor", path, out=tmp_path / "out")
    assert found["values"]["math.sums"] == result["values"]["math.sums"]
    assert [one["accuracy"] for one in found["floors"]] == [0.625, None]
    assert (found["floors"][1]["of"], found["floors"][1]["ratio"]) == ("base", 1.0)
    assert result["floors"] == []


def test_missed_floors_are_all_named_unrounded_beside_a_whole_scorecard(
    bundle: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    base = result["systems"]["math.sums"]["base"]["accuracy"]
    path = floors(
        tmp_path,
        {"system": "qsun", "test": "math.sums", "accuracy": 0.6250001},
        {"system": "base", "test": "math.sums", "of": "qsun", "ratio": 0.97},
        {"system": "base", "test": "math.sums", "accuracy": 0.1},
    )
    outcome = evaluate(bundle, "--tasks", "math.sums", "--floor", path, out=tmp_path / "out")
    assert outcome.exit_code == 13
    assert "math.sums: qsun 0.625 is below 0.6250001" in outcome.message
    least = 0.97 * 0.625
    assert f"math.sums: base {base} is below {least} (0.97 of qsun's 0.625)" in outcome.message
    assert outcome.message.count("is below") == 2
    assert (tmp_path / "out" / SCORECARD).is_file()


def test_an_earlier_scorecard_is_compared_by_sample(
    bundle: Path, out: Path, tmp_path: Path
) -> None:
    found = evaluated(bundle, "--compare", out / SCORECARD, out=tmp_path / "again")["compared"]
    assert [(one["test"], one["first"]) for one in found] == [
        (test, f"{system} now") for test in sorted(TESTS) for system in ("base", "qsun")
    ]
    assert {(one["difference"], one["p"]) for one in found} == {(0.0, 1.0)}
    options = ("--compare", out / SCORECARD, "--tasks", "math.sums")
    fewer = evaluate(bundle, *options, "--limit", "5", out=tmp_path / "fewer")
    assert fewer.exit_code == 6
    assert "math.sums: other samples (another limit, data or prompt)" in fewer.message
    assert not (tmp_path / "fewer").exists()
    text = evaluate(bundle, *options, out=tmp_path / "text").stdout
    assert "against the earlier scorecard" in text
    assert "qsun now - qsun before" in text


def test_the_printed_table_has_what_the_record_has(
    bundle: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    text = evaluate(bundle, out=tmp_path / "out").stdout
    assert "math.sums qsun  62.5% (24.5% to 91.5%)" in text
    assert f"written to {tmp_path / 'out' / SCORECARD}" in text
    assert "WARNING" not in text
    assert json.dumps(result["warnings"]) == "[]"
