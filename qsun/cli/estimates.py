"""Estimates: what the dry runs of `qsun tune` and `qsun evaluate` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.cli.output import table
from qsun.files import GIB, size

if TYPE_CHECKING:
    from qsun.jobs.plan_evaluate import EvaluationPlan
    from qsun.jobs.plan_tune import TuningPlan


def tuning_plan_text(plan: TuningPlan) -> str:
    """What a tuning would do and need, with what was assumed."""
    tune, rows, found = plan.run.tune, plan.rows, plan.estimate
    beside = f", {found.step_flops / found.full_ft_step_flops:.2f} of full fine-tuning's"
    checkpointing = "on" if tune.gradient_checkpointing else "off"
    lines = [
        f"{plan.run.name}: {plan.task.name} as {plan.system}, {tune.module} module, boundary "
        f"{tune.boundary}, {plan.parameters / 1e9:.2f} billion parameters",
        f"rows: {rows.count:,} of about {rows.prompt_tokens:.0f} prompt and "
        f"{rows.response_tokens:.0f} response tokens, at most {rows.max_tokens:,}",
        f"({rows.told})",
        f"steps: {found.steps:,} of {tune.batch_size} rows, {tune.micro_batch_size} at once; "
        f"{found.step_flops / 1e15:.2f} PFLOP each{'' if plan.system == 'full-ft' else beside}",
        "",
        _memory(found.memory, found.memory_bytes),
        f"activations: {size(found.activations_with)} with gradient checkpointing, "
        f"{size(found.activations_without)} without; it is {checkpointing}",
        "",
        f"disk: {size(found.disk_bytes)}: three checkpoints of {size(found.checkpoint_bytes)} and "
        f"the module, {size(found.module_bytes)}",
        f"time: {_gpu_time(found.gpu_hours)} at {found.utilization:.0%} of an H200's bfloat16 "
        "FLOPs, measured at 135M:",
        "an assumption for any other size. Evaluations and tests come on top",
    ]
    return "\n".join([*lines, *_not_there(plan.missing)])


def evaluation_estimate_text(plan: EvaluationPlan, missing: Sequence[Path]) -> str:
    """What an evaluation would need, with what was assumed."""
    found = plan.estimate
    rows = [
        [
            name,
            f"{one.prompts:,}",
            f"{one.prompt_tokens:.0f}",
            f"{one.new_tokens:,}",
            f"{found.gpu_hours[name]:.2f}",
        ]
        for name, one in plan.asked.items()
    ]
    told = dict.fromkeys(one.told for one in plan.asked.values())
    notes = [
        f"{text}: {', '.join(name for name, one in plan.asked.items() if one.told == text)}"
        for text in told
    ]
    return "\n".join(
        [
            "",
            table(["test set", "prompts", "their tokens", "answer's at most", "GPU hours"], rows),
            *notes,
            "",
            _memory(found.memory, found.memory_bytes),
            "",
            f"disk: at most {size(found.samples_bytes)} of samples, before they are compressed",
            f"time: at least {_gpu_time(sum(found.gpu_hours.values()))}: weights read at 4.3 TB/s "
            "for each token of a batch's",
            "longest answer, prompts at 40 % of an H200's bfloat16 FLOPs: both are assumptions. "
            "Python between",
            "kernels, judging and TPOT come on top",
            *_not_there(missing),
        ]
    )


def _gpu_time(hours: float) -> str:
    return f"{hours:.1f} GPU hours" if hours >= 0.1 else f"{60 * hours:.1f} GPU minutes"


def _memory(parts: Mapping[str, int], total: int) -> str:
    rows = [[name, f"{count / GIB:.1f}"] for name, count in parts.items()]
    return table(["memory of one GPU", "GiB"], [*rows, ["in all", f"{total / GIB:.1f}"]])


def _not_there(folders: Sequence[Path]) -> list[str]:
    """Folders that are missing, as seen from where the command was given."""
    here = Path.cwd()
    return [
        f"not there yet: {one.relative_to(here) if one.is_relative_to(here) else one}"
        for one in folders
    ]
