"""A tiny task and the run that tunes it, on disk as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.builders import problems, write_config, write_jsonl
from tests.command import Outcome, run_qsun

COLUMNS = {"prompt": "prompt", "response": "response"}
# 48 rows, 8 of them for validation: 5 steps an epoch.
TUNE = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 3e-3,
    "epochs": 3,
    "evaluations": 2,
    "checkpoints": 3,
}


def source(name: str, **changes: Any) -> dict[str, Any]:
    """The rows of `NAME.jsonl`."""
    return {"name": name, "kind": "jsonl", "path": f"{name}.jsonl", **COLUMNS, **changes}


def write_task(folder: Path, **changes: Any) -> Path:
    """Write `task.yaml`, sums to work out in words, with its rows; returns its path."""
    write_jsonl(folder / "train.jsonl", [*problems(48, seed=1)])
    write_jsonl(folder / "tests.jsonl", [*problems(4, seed=2)])
    task = {
        "name": "task",
        "description": "tiny",
        "train": [source("train", answer="response")],
        "tests": [source("tests", answer="response")],
        "checker": "exact-match",
        "validation_samples": 8,
        "max_tokens": 128,
        "max_new_tokens": 6,
        **changes,
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def write_run(folder: Path, model: Path, **changes: Any) -> Path:
    """Write `run.yaml` and the task it tunes; `changes` are those of `write_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "task.yaml").exists():
        write_task(folder)
    quick = {f"tune__{name}": value for name, value in TUNE.items()}
    return write_config(folder, model, **({"tasks": ["task.yaml"]} | quick | changes))


def tune(config: Path, system: str = "sun", *options: str) -> Outcome:
    """Run `qsun tune` on the config's task, into `out/module` beside the config."""
    out = config.parent / "out" / "module"
    out.parent.mkdir(exist_ok=True)
    return run_qsun("tune", config, "--task", "task", "--system", system, "--out", out, *options)


def tuned(config: Path, system: str = "sun", *options: str) -> dict[str, Any]:
    """The result of a `qsun tune` that must end well."""
    outcome = tune(config, system, "--json", *options)
    assert outcome.exit_code == 0, outcome.stderr
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
