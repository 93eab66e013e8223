"""Compare seven systems at 4, 3 and 2 bits, on SmolLM2-135M and on a small Qwen3.

    python -m tests.gpu.compare_bits STATE [--architecture smollm2,qwen3] [--minutes 9]
        [--gpus 0,1] [--jobs 6] [--gib 128] [--copy-to FOLDER] [--no-evaluate] [--only NAMES]
        [--dry-run]

The systems: base, full-ft, full-ft quantized by AWQ, naive, sun, qsun-post (sun's modules on the
quantized decode module) and qsun (modules tuned through it); two tasks, three seeds. A call runs
the jobs of `bits_plan.py` as soon as what they need is there and can be made again: what is done
stays done, interrupted trainings go on from their checkpoint; `--minutes 0` only sums up.
STATE/bits-comparison.json is the record; another architecture than the first keeps a folder of its
own in STATE, with a record of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from qsun.config import load_config
from qsun.jobs.evaluate import SAMPLES, SCORECARD
from qsun.records import new_record, read_record
from tests.gpu.bits_plan import Plan
from tests.gpu.bits_study import STUDIES
from tests.gpu.job_runner import ROOT, Job, Limits, run_jobs

FIRST = "smollm2"  # its folder is STATE itself
RECORD = "bits-comparison.json"
SHIPPED = ("smollm2-135m-w4.yaml", "smollm2-135m-sun.yaml")


def start(state: Path, architecture: str, evaluate: bool) -> Plan:
    """The plan, its folder holding the shipped configs and calibration texts."""
    folder = state if architecture == FIRST else state / architecture
    for name in SHIPPED:
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "configs" / name, folder / "configs" / name)
    for name in ("calib", *(f"exports/reference/{task}" for task in ("math", "tools"))):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    plan = Plan(STUDIES[architecture], folder, evaluate)
    plan.write_configs()
    return plan


def chosen(jobs: list[Job], names: str | None) -> list[Job]:
    """The jobs of these short names, with all that they need; every job without names."""
    if names is None:
        return jobs
    by_name = {job.name: job for job in jobs}
    wanted = [job for job in jobs if job.name.rpartition("/")[2] in names.split(",")]
    found: dict[str, Job] = {}
    while wanted:
        job = wanted.pop()
        found[job.name] = job
        wanted += [by_name[need] for need in job.needs if need not in found]
    return list(found.values())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed jobs left beside their outputs; finished outputs have plain names."""
    for parent in ("", "runs", "decode", "scores"):
        for path in (folder / parent).glob(".*.*-*"):
            if path.is_dir():
                shutil.rmtree(path)


def show(jobs: list[Job]) -> None:
    """Print every job, its needs and its command."""
    for job in sorted(jobs, key=lambda one: one.order):
        state = "done" if job.done.exists() else f"after {', '.join(job.needs) or 'nothing'}"
        command = shlex.join(word for word in job.command()[1:] if "sys.argv" not in word)
        print(f"{job.order:3d} {job.name} ({state}, {job.gib} GiB)\n      {command}")


def trained(plan: Plan) -> dict[str, Any]:
    """Each training's outcome, in short."""
    found: dict[str, Any] = {}
    for short in plan.tunings():
        path = plan.folder / "runs" / short / "records" / "tuning.json"
        if short == "base":
            path = plan.folder / "base" / "records" / "tuning.json"
        if path.exists():
            record = read_record(path, "tuning")
            tune = record.config["tune"]
            shown = ("module", "loss", "learning_rate", "samples", "epochs", "batch_size")
            kept = ("system", "decode_digest", "training", "validation_loss")
            found[short] = {
                "seed": record.seed,
                **{key: tune[key] for key in shown},
                **{key: record.result[key] for key in kept},
                "command": record.command,
                "created": record.created,
            }
    return found


def quantized(plan: Plan) -> dict[str, Any]:
    """Each quantization's outcome, in short."""
    found: dict[str, Any] = {}
    for path in sorted(plan.folder.glob("*/*/records/quantization.json")):
        record = read_record(path, "quantization")
        outcome = record.result["quantization"]
        found[path.parents[1].name] = {
            "perplexity": outcome["perplexity"],
            "size_ratio": outcome["size_ratio"],
            "bits": record.result["plan"]["bits"],
            "group_size": record.result["plan"]["group_size"],
            "wall_s": record.result["cost"]["wall_s"],
            "command": record.command,
            "created": record.created,
        }
    return found


def scored(plan: Plan) -> dict[str, Any]:
    """Every scorecard's result."""
    found: dict[str, Any] = {}
    for folder in sorted((plan.folder / "scores").glob("*/")):
        if not (folder / SCORECARD).exists():
            continue  # unfinished
        record = read_record(folder / SCORECARD, "scorecard")
        found[folder.name] = {
            "seed": record.config["seed"],
            "result": record.result,
            "command": record.command,
            "created": record.created,
        }
    return found


def sum_up(plan: Plan, jobs: list[Job]) -> Path:
    """Write the record of a study; returns its path."""
    run = load_config(plan.folder / "configs" / "run.yaml")
    study = plan.study
    result = {
        "finished": all(job.done.exists() for job in jobs),
        "missing": [job.name for job in jobs if not job.done.exists()],
        "architecture": study.name,
        "bits": list(study.bits),
        "seeds": list(study.seeds),
        "budgets": {task: vars(budget) for task, budget in study.budgets.items()},
        "chosen": {
            task: {str(bits): plan.rate(task, bits) for bits in study.bits}
            for task in study.budgets
        },
        "decode_modules": sorted(path.name for path in (plan.folder / "decode").glob("w*")),
        "trainings": trained(plan),
        "quantizations": quantized(plan),
        "scorecards": scored(plan),
    }
    path = plan.folder / RECORD
    new_record("bits-comparison", run, run.seed, result).write(path)
    return path


def copy_results(plan: Plan, target: Path) -> None:
    """Copy the record, its parts, the samples and the logs."""
    folder = plan.folder
    found = [folder / RECORD, *folder.glob("logs/*.log"), *folder.glob(f"scores/*/{SCORECARD}")]
    found += folder.glob(f"scores/*/{SAMPLES}/*.jsonl.gz")
    for kind in ("tuning", "quantization"):
        found += folder.glob(f"*/*/records/{kind}.json")
    for path in found:
        copy = target / plan.study.name / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def main() -> None:
    """Work through the plans for a while."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("--architecture", default=FIRST, help=f"of {', '.join(STUDIES)}; commas")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--gpus", default="0", help="numbers, with commas")
    parser.add_argument("--jobs", type=int, default=6, help="jobs at a time on each GPU")
    parser.add_argument("--gib", type=int, default=128, help="memory to plan with on each GPU")
    parser.add_argument("--copy-to", type=Path, help="a folder for records, samples and logs")
    parser.add_argument("--no-evaluate", action="store_true", help="leave scores out")
    parser.add_argument("--only", help="jobs by their short names, commas; with what they need")
    parser.add_argument("--dry-run", action="store_true", help="print every job and its command")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    state = asked.state.resolve()
    names = asked.architecture.split(",")
    plans = [start(state, name, not asked.no_evaluate) for name in names]
    by_plan = [(plan, chosen(plan.jobs(), asked.only)) for plan in plans]
    jobs = [job for _, found in by_plan for job in found]
    if asked.dry_run:
        show(jobs)
        return
    for plan in plans:
        remove_leftovers(plan.folder)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(state / "inductor"))
    run_jobs(jobs, Limits(tuple(asked.gpus.split(",")), asked.jobs, asked.gib, end))
    for plan, found in by_plan:
        path = sum_up(plan, found)
        if asked.copy_to is not None:
            copy_results(plan, asked.copy_to)
        done = sum(job.done.exists() for job in found)
        print(
            json.dumps({"record": path.name, "of": plan.study.name, "done": f"{done}/{len(found)}"})
        )


if __name__ == "__main__":
    main()
