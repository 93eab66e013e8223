"""The tables of `docs/evaluation.md`: what the big configs would take, as their dry runs say.

    python docs/estimates_table.py

Nothing is measured: shapes, settings and the assumptions that qsun/tune/estimate.py,
qsun/evaluate/estimate.py and qsun/quantize/estimate.py state.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from qsun.config import RunConfig, load_config
from qsun.files import GIB
from qsun.jobs.evaluation_request import request_of
from qsun.jobs.plan_evaluate import plan_evaluation
from qsun.jobs.plan_tune import TuningPlan, plan_tuning
from qsun.jobs.prepare import prepare
from qsun.jobs.prepare_evaluate import prepare_evaluation
from qsun.quantize.estimate import BlockTimes

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("qwen3-1.7b-base", "llama-3.1-8b", "qwen3-8b-base", "qwen3-14b-base")
ROWS = {"paper-math": 40_000, "paper-code": 80_000, "paper-tools": 60_000}  # the paper's
SYSTEMS = ("full-ft", "sun", "qsun")
OUT = Path("exports/none")


def tuning_table() -> str:
    """GPU hours of all three tasks, and one GPU's memory, by system; LoRA beside it."""
    lines = [
        "| config | full-ft: hours, GiB | SUN: hours, GiB | QSUN: hours, GiB "
        "| SUN LoRA: hours, GiB | disk of a run, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        cells = [_tuning(name, system) for system in SYSTEMS]
        cells.append(_tuning(name, "sun", "tune.module=lora"))
        disk = _plan(name, "paper-math", "sun").estimate.disk_bytes / GIB
        lines.append(f"| `{name}` | {' | '.join(cells)} | {disk:.0f} |")
    return "\n".join(lines) + "\n"


def _tuning(name: str, system: str, *overrides: str) -> str:
    plans = [_plan(name, task, system, *overrides) for task in ROWS]
    hours = sum(one.estimate.gpu_hours for one in plans)
    return f"{hours:.1f}, {max(one.estimate.memory_bytes for one in plans) / GIB:.0f}"


def _plan(name: str, task: str, system: str, *overrides: str) -> TuningPlan:
    path = CONFIGS / f"{name}.yaml"
    run = load_config(path, [f"tune.samples={ROWS[task]}", *overrides])
    return plan_tuning(run, path, task, system, OUT)


def other_table() -> str:
    """What quantizing and evaluating would take."""
    lines = [
        "| config | quantize: least memory, checkpoint, GiB "
        "| evaluate, 7 systems on 7 test sets: hours at least, GiB | samples, MiB |",
        "|---|---|---|---|",
    ]
    for name in NAMES:
        path = CONFIGS / f"{name}.yaml"
        memory, checkpoint = _quantize(load_config(path), path)
        found = plan_evaluation(prepare_evaluation(_request(path))).estimate
        hours = sum(found.gpu_hours.values())
        lines.append(
            f"| `{name}` | {memory / GIB:.1f}, {checkpoint / GIB:.1f} "
            f"| {hours:.1f}, {found.memory_bytes / GIB:.0f} | {found.samples_bytes / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _request(path: Path):  # noqa: ANN202  the job's own
    return request_of(
        path,
        (),
        out=None,
        dry_run=True,
        **{"systems": (), "tests": (), "limit": None, "floors": None, "compare": None},
    )


def _quantize(run: RunConfig, path: Path) -> tuple[int, int]:
    """The least memory, and the checkpoint; the search, timed on whatever asks, is left out."""
    blocks = "qsun.quantize.estimate_blocks"
    with (
        patch(f"{blocks}.time_one_block", return_value=BlockTimes(0, 0, 0)),
        patch(f"{blocks}._search_one_block", return_value=0.0),
    ):
        found = prepare(run, path, OUT, dry_run=True).estimate
    return found.needed_bytes, found.checkpoint_bytes


if __name__ == "__main__":
    print(tuning_table())
    print(other_table())
