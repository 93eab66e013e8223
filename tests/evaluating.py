"""Tiny bundles with tasks that some systems get partly right, and `qsun evaluate` on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from qsun.evaluate.samples import read_samples
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_tests
from tests.builders import problems, write_jsonl
from tests.bundles import build_bundle, write_passed_verdict
from tests.command import Outcome, run_qsun

QUICK = ("--set", "evaluate.tpot=skip")
TESTS = ("math.sums", "math.more", "code.sums")
ROWS = 8


def rows_source(name: str, path: str, **changes: Any) -> dict[str, Any]:
    columns = {"prompt": "prompt", "response": "response"}
    return {"name": name, "kind": "jsonl", "path": path, **columns, **changes}


def write_definition(folder: Path, task: str, tests: tuple[str, ...], **changes: Any) -> Path:
    """A task's definition whose test sets are `TASK-TEST.jsonl` beside it."""
    definition = {
        "name": task,
        "description": "tiny",
        "train": [rows_source("train", f"{task}-{tests[0]}.jsonl")],
        "tests": [rows_source(test, f"{task}-{test}.jsonl", answer="response") for test in tests],
        "checker": "exact-match",
        "max_tokens": 128,
        "max_new_tokens": 6,
        **changes,
    }
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(definition), encoding="utf-8")
    return path


def write_definitions(folder: Path) -> None:
    """Tasks `math`, with two test sets and any text as answers, and `code`, with numbers."""
    folder.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate((("math-sums", ROWS), ("math-more", 3)), start=2):
        write_jsonl(folder / f"{name}.jsonl", problems(count, seed))
    numbers = [row | {"response": row["response"].split()[-2]} for row in problems(ROWS, 4)]
    write_jsonl(folder / "code-sums.jsonl", numbers)
    write_definition(folder, "math", ("sums", "more"))
    write_definition(folder, "code", ("sums",), checker="final-number", stop=["\n\n"])


def verified_bundle(folder: Path, **shape: Any) -> Path:
    """A bundle of `build_bundle` with its tasks' definitions and a verdict that passes."""
    build_bundle(folder, **shape)
    write_definitions(folder / "verification")
    write_passed_verdict(folder)
    return folder


def scored_bundle(folder: Path) -> Path:
    """The same, where qsun gets rows 0 to 4 of `math.sums` right, base 4 to 6, none row 7."""
    first = verified_bundle(folder.with_name("first"))
    evaluated(first, "--tasks", "math.sums", out=folder.with_name("answers"))
    texts = {one: responses(folder.with_name("answers"), one) for one in ("qsun", "base")}
    shutil.copytree(first, folder)
    rows = problems(ROWS, 2)
    order = {row["prompt"]: number for number, row in enumerate(rows)}
    asked = prompts_in_order(folder / "verification" / "math.yaml")
    for index, prompt in enumerate(asked):
        system = "qsun" if index < 5 else "base"
        answer = "never said" if index == 7 else texts[system][index]
        rows[order[prompt]]["response"] = answer
    assert texts["qsun"][4] != texts["base"][4]
    write_jsonl(folder / "verification" / "math-sums.jsonl", rows)
    return folder


def prompts_in_order(definition: Path) -> list[str]:
    """What the first test set asks, in the order that it asks it."""
    sets = read_tests(load_task(definition), definition.parent)
    return [one.text for one in next(iter(sets.values()))]


def evaluate(subject: Path, *options: str | Path, out: Path | None = None) -> Outcome:
    """`qsun evaluate` without TPOT."""
    chosen = () if out is None else ("--out", out)
    return run_qsun("evaluate", subject, *QUICK, *chosen, *options)


def evaluated(subject: Path, *options: str | Path, out: Path | None = None) -> dict[str, Any]:
    """The result of a `qsun evaluate` that must end well."""
    outcome = evaluate(subject, "--json", *options, out=out)
    assert outcome.exit_code == 0, outcome.stderr
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def responses(out: Path, system: str, test: str = "math.sums") -> list[str]:
    """The responses of one system to one test set."""
    path = out / "records" / "scorecard" / f"{system}--{test}.jsonl.gz"
    return [row.response for row in read_samples(path).rows]


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how fast this machine is."""
    kept: dict[str, Any] = json.loads(json.dumps(result))
    for systems in kept["systems"].values():
        for one in systems.values():
            del one["seconds"], one["tokens_per_second"]
    return kept
