"""`qsun evaluate BUNDLE|CONFIG`: how good are these modules, beside what they replace?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from qsun.cli.estimates import evaluation_estimate_text
from qsun.cli.scores import plan_of_evaluation, scorecard_text


@click.command()
@click.argument("subject", metavar="BUNDLE|CONFIG", type=click.Path(path_type=Path, exists=True))
@click.option("--systems", default="", metavar="A,B", help="Some systems alone, by name.")
@click.option("--tasks", default="", metavar="A,B", help="TASK, TASK.TEST, or TASK:LM_EVAL_TASK.")
@click.option("--limit", type=int, help="At most so many samples of each test set.")
@click.option("--floor", type=click.Path(path_type=Path), help="Accuracies not to fall below.")
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier scorecard.")
@click.option("--base", type=click.Path(path_type=Path), help="The base model's folder.")
@click.option("--allow", multiple=True, metavar="CHECK", help="A failed check to pass over.")
@click.option("--served", metavar="URL", help="Answer through this router, BUNDLE's own.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The router's key.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the scorecard goes.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted evaluation.")
@click.option("--dry-run", is_flag=True, help="Say what would be evaluated, and what it takes.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON.")
def command(
    subject: Path,
    systems: str,
    tasks: str,
    limit: int | None,
    floor: Path | None,
    compare: Path | None,
    base: Path | None,
    allow: tuple[str, ...],
    served: str | None,
    api_key_file: Path | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Evaluate a verified BUNDLE, or the modules that a CONFIG names, system by system.

    Every system gets the same prompts. The scorecard is written into the bundle, or to --out.
    Exits with 13 where an accuracy is below its floor.
    """
    from qsun.jobs.evaluate import SCORECARD, run_evaluation
    from qsun.jobs.evaluation_request import request_of
    from qsun.jobs.plan_evaluate import plan_evaluation
    from qsun.jobs.prepare_evaluate import prepare_evaluation

    request = request_of(
        subject,
        overrides,
        systems=_names(systems),
        tests=_names(tasks),
        limit=limit,
        floors=floor,
        compare=compare,
        base=base,
        allowed=allow,
        served=served,
        api_key=api_key_file,
        out=out,
        resume=resume,
        dry_run=dry_run,
    )
    prepared = prepare_evaluation(request)
    if dry_run:
        click.echo(plan_of_evaluation(prepared))
        if served is None:  # else the router's workers do the work
            plan = plan_evaluation(prepared)
            click.echo(evaluation_estimate_text(plan, prepared.subject.missing))
        return
    record = run_evaluation(prepared)
    click.echo(
        json.dumps(record.result, indent=1)
        if as_json
        else scorecard_text(record.result, request.out / SCORECARD)
    )
    from qsun.evaluate.floors import require_floors

    require_floors(prepared.floors, record.result["systems"])


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))
