"""`qsun tune CONFIG --task T`: a task's prefill module, trained through the frozen decoder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from qsun.cli.estimates import tuning_plan_text
from qsun.cli.output import tuning_text
from qsun.config import load_config


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="Which of the config's tasks.")
@click.option(
    "--system",
    type=click.Choice(["sun", "qsun", "full-ft"]),
    default="sun",
    show_default=True,
    help="Tune through the full-precision decoder, through tune.decode, or the whole model.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to publish; must not exist yet.  [default: exports/NAME-TASK-SYSTEM]",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, bit for bit.")
@click.option("--dry-run", is_flag=True, help="Print what it would take, and stop.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    config: Path,
    task: str,
    system: str,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tune TASK's prefill module and measure it; the decode module stays as it is.

    Exit codes: 0 done, 3 config, 4 model, 6 task data, 7 output or disk, 10 out of memory, 130
    interrupted (go on with --resume).
    """
    run = load_config(config, overrides)

    from qsun.jobs.plan_tune import plan_tuning
    from qsun.jobs.tune import prepare_tuning, run_tuning
    from qsun.processes import rank

    folder = out or Path("exports") / f"{run.name}-{task}-{system}"
    if dry_run:
        plan = plan_tuning(run, config, task, system, folder)
        for warning in plan.warnings:
            click.echo(f"qsun: note: {warning}", err=True)
        found = {"rows": asdict(plan.rows), "estimate": asdict(plan.estimate)}
        click.echo(json.dumps(found, indent=1) if as_json else tuning_plan_text(plan))
        return
    prepared = prepare_tuning(run, config, task, system, folder, resume)
    result = run_tuning(prepared)
    if rank() == 0:
        click.echo(json.dumps(result, indent=1) if as_json else tuning_text(folder, result))
