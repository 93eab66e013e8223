"""What `qsun evaluate` refuses before it opens a model: the exit code, and what to do instead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import tasks

from qsun.bundle import read_bundle
from qsun.config import VerifyConfig
from qsun.evaluate import run
from qsun.records import new_record
from tests.builders import write_jsonl
from tests.evaluating import evaluated, write_definition
from tests.lm_eval_tasks import local_task
from tests.refusing import Refused, bundle, hurry, own_task, refused, shared

__all__ = ["bundle", "hurry", "refused", "shared"]


def floors(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "floors.yaml"
    path.write_text(yaml.safe_dump({"floors": list(entries)}), encoding="utf-8")
    return path


def write_verdict(folder: Path, **changes: Any) -> None:
    checks = [
        {"name": f"{level}.all", "outcome": "passed", "message": "agrees"}
        for level in ("static", "numeric")
    ]
    result = {"bundle": read_bundle(folder).digest, "compatible": True, "checks": checks}
    record = new_record("verdict", VerifyConfig(), 0, result | changes)
    record.write(folder / "records" / "verdict.json")


def test_unknown_tasks_and_systems_are_told_the_nearest_name(
    bundle: Path, refused: Refused
) -> None:
    message = refused(3, bundle, "--tasks", "maths,math.sum,quiz:gsm8k,code.sums")
    assert "'maths' (did you mean math?)" in message
    assert "'math.sum' (did you mean math.sums?)" in message
    assert "'quiz:gsm8k'" in message
    assert "code.sums'" not in message
    message = refused(3, bundle, "--systems", "qsum,sun,base")
    assert "there is no system 'qsum' (did you mean qsun?)" in message
    assert "task math: sun needs sun" in message
    assert "task code: sun needs sun" in message


def test_a_bundle_that_was_never_verified_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / "records" / "verdict.json").unlink()
    message = refused(11, bundle)
    assert "was never verified. Run `qsun verify" in message


def test_another_bundles_verdict_or_half_a_one_is_refused(bundle: Path, refused: Refused) -> None:
    write_verdict(bundle, bundle="0" * 64)
    assert "is the verdict of another bundle" in refused(11, bundle)
    write_verdict(bundle, checks=[{"name": "static.all", "outcome": "passed", "message": ""}])
    assert "lacks the level numeric" in refused(11, bundle)


def test_a_failed_check_is_refused_until_it_is_allowed_by_name(
    bundle: Path, refused: Refused, tmp_path: Path
) -> None:
    failed = {"name": "numeric.cache", "outcome": "failed", "message": "K differs"}
    passed = {"name": "static.all", "outcome": "passed", "message": "agrees"}
    write_verdict(bundle, checks=[passed, failed])
    assert "did not pass:\n  - numeric.cache: K differs" in refused(11, bundle)
    assert "numeric.cache" in refused(11, bundle, "--allow", "numeric.all")
    options = ("--allow", "numeric.cache", "--tasks", "math.more", "--limit", "1")
    assert evaluated(bundle, *options, out=tmp_path / "out")["systems"]


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, refused: Refused) -> None:
    assert "is no bundle: it has no bundle.json" in refused(11, tmp_path)


def test_a_test_set_whose_rows_lack_the_answer_is_refused(bundle: Path, refused: Refused) -> None:
    write_jsonl(bundle / "verification" / "math-sums.jsonl", [{"prompt": "How many?"}])
    message = refused(6, bundle, "--tasks", "math.sums")
    assert "math.sums: source sums: there is no column 'response'" in message


def test_a_test_set_without_rows_is_refused(bundle: Path, refused: Refused) -> None:
    write_jsonl(bundle / "verification" / "math-more.jsonl", [])
    message = refused(6, bundle, "--tasks", "math.more,code")
    assert "math.more: source more: it is empty" in message
    assert "code" not in message


def test_every_test_set_that_cannot_be_read_is_named(bundle: Path, refused: Refused) -> None:
    for name in ("math-sums", "code-sums"):
        (bundle / "verification" / f"{name}.jsonl").unlink()
    message = refused(6, bundle)
    assert "these test sets cannot be used" in message
    for name in ("math-sums.jsonl", "code-sums.jsonl"):
        assert name in message


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_limit_that_leaves_no_sample_is_refused(
    bundle: Path, refused: Refused, limit: str
) -> None:
    message = refused(3, bundle, f"--limit={limit}")
    assert f"--limit {limit} leaves no sample: give 1 or more" in message


def test_a_bundle_without_test_sets_says_what_to_name(bundle: Path, refused: Refused) -> None:
    shutil.rmtree(bundle / "verification")
    assert "no task has one: name a definition, or TASK:NAME of lm-eval's" in refused(3, bundle)


def test_answers_that_leave_no_room_for_a_prompt_are_refused(
    bundle: Path, refused: Refused
) -> None:
    write_definition(bundle / "verification", "code", ("sums",), max_new_tokens=256)
    message = refused(3, bundle)
    assert "the modules read 256 tokens, which leaves no room for a prompt" in message
    assert "code.sums: max_new_tokens is 256" in message
    assert "math" not in message


def test_lm_evals_tasks_that_cannot_be_asked_are_refused(
    bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some of its folders: listing all takes seconds.
    folders = [Path(tasks.__file__).parent / name for name in ("gsm8k", "arc", "mmlu", "humaneval")]
    some = tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(run, "_manager", lambda _own: some)
    wrong = ("gsm8kk", "arc_esay", "mmlu", "ai2_arc")
    message = refused(3, bundle, "--tasks", ",".join(f"math:{name}" for name in wrong))
    assert "lm-eval has no task 'gsm8kk' (did you mean gsm8k" in message
    assert "lm-eval has no task 'arc_esay' (did you mean arc_easy" in message
    assert "'mmlu' is a group of lm-eval's: name its tasks, such as mmlu_" in message
    assert "'ai2_arc' is a group of lm-eval's: name its tasks" in message
    names = ("gsm8k", "mmlu_abstract_algebra", "humaneval")
    message = refused(6, bundle, "--tasks", ",".join(f"math:{name}" for name in names))
    for name in names:
        assert f"math.{name}: it cannot be read: " in message
    # What was refused leaves nothing behind, so that the next command is no resume.
    assert not (bundle.parent / "new").exists()


def test_whole_texts_and_unsafe_code_of_lm_evals_are_refused(
    bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own_task(monkeypatch, local_task("loglikelihood_rolling"))
    message = refused(6, bundle, "--tasks", "math:own")
    assert "it scores whole texts, which has no accuracy: ask it by qsun-lm-eval" in message
    unsafe = local_task("generate_until", unsafe_code=True, num_fewshot=0)
    own_task(monkeypatch, unsafe)
    message = refused(6, bundle, "--tasks", "math:own")
    assert "it runs generated code without a sandbox: set evaluate.unsafe_code=true" in message
    options = ("--tasks", "math:own", "--limit", "2", "--set", "evaluate.unsafe_code=true")
    assert evaluated(bundle, *options, out=tmp_path / "out")["systems"]["math.own"]


def test_lm_evals_own_tasks_are_scored_by_what_says_right_or_wrong(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    own_task(monkeypatch, local_task("loglikelihood", metric_list=metrics))
    found = evaluated(bundle, "--tasks", "math:own", out=tmp_path / "out")["systems"]["math.own"]
    assert {one["metric"] for one in found.values()} == {"acc"}
    assert {one["total"] for one in found.values()} == {6}


def test_floors_of_what_is_not_measured_are_refused(bundle: Path, refused: Refused) -> None:
    path = floors(
        bundle,
        {"system": "sun", "test": "math.sums", "accuracy": 0.5},
        {"system": "qsun", "test": "math.other", "accuracy": 0.5},
        {"system": "qsun", "test": "math.sums", "of": "full-ft", "ratio": 0.9},
        {"system": "qsun", "test": "math.sums", "of": "base", "ratio": 0.9},
    )
    message = refused(3, bundle, "--floor", path)
    assert "these floors would never be looked at" in message
    assert message.count("is not evaluated") == 3
    assert "math.sums: sun is not evaluated" in message
    assert "math.other: qsun is not evaluated" in message
    assert "math.sums: full-ft is not evaluated" in message


def test_floors_with_mistakes_name_all_of_them(bundle: Path, refused: Refused) -> None:
    one = {"system": "qsun", "test": "math.sums"}
    path = floors(
        bundle, one, one | {"accuracy": 0.5, "ratio": 0.5}, {"system": "qsum", "test": "math"}
    )
    message = refused(3, bundle, "--floor", path)
    assert "floors[0]: give either accuracy, or of and ratio" in message
    assert "floors[1]: give either accuracy, or of and ratio" in message
    assert "floors[2]: there is no system 'qsum' (did you mean qsun?)" in message
    assert "floors: there is none" in refused(3, bundle, "--floor", floors(bundle))
    path = floors(bundle, one | {"accuracy": 50.0})
    assert "accuracy" in refused(3, bundle, "--floor", path)


def test_what_is_no_scorecard_cannot_be_compared_with(bundle: Path, refused: Refused) -> None:
    verdict = bundle / "records" / "verdict.json"
    message = refused(1, bundle, "--compare", verdict)
    assert "is a verdict of schema 1, not a scorecard" in message


def test_an_output_that_takes_no_files_is_refused(bundle: Path, refused: Refused) -> None:
    file = bundle / "bundle.json"
    assert "cannot write" in refused(7, bundle, out=file)
    assert "cannot write" in refused(7, bundle, out=file / "below")
    assert "cannot write" in refused(7, bundle, out=Path("/proc/nothing/there"))
