"""`qsun quantize CONFIG`: from a base model to a checked decode module."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from qsun.cli.output import plan_text, quantization_text
from qsun.config import load_config


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to publish; must not exist yet.  [default: exports/NAME]",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what it would cost, and stop.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["compressed-tensors", "awq"]),
    help="Layout on disk; the same as --set quantize.format=...",
)
@click.option(
    "--engine",
    type=click.Choice(["qsun", "llmcompressor"]),
    help="What searches for codes; the same as --set quantize.engine=...",
)
@click.option(
    "--target-bits",
    type=float,
    help="Mean bits of a weight, each layer getting its own; engine qsun only.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted search of engine qsun.")
@click.option(
    "--memory",
    help="What engine qsun may hold, as 8GiB; the same as --set quantize.search.memory=...",
)
@click.option("--tensor-parallel", type=int, help="GPUs that one decode worker will span.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    config: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    layout: str | None,
    engine: str | None,
    target_bits: float | None,
    resume: bool,
    memory: str | None,
    tensor_parallel: int | None,
    as_json: bool,
) -> None:
    """Quantize the base model of CONFIG into a low-bit decode module, and prove vLLM loads it.

    Exit codes: 0 done, 3 config, 4 model, 5 plan, 6 calibration text, 7 output or disk, 8 no
    serving environment, 9 load check failed, 10 memory, 130 interrupted.
    """
    flags = [f"quantize.format={layout}"] if layout else []
    flags += [f"quantize.engine={engine}"] if engine else []
    flags += [f"quantize.search.memory={memory}"] if memory else []
    flags += [f"quantize.tensor_parallel={tensor_parallel}"] if tensor_parallel is not None else []
    flags += [f"quantize.target_bits={target_bits}"] if target_bits is not None else []
    run = load_config(config, [*overrides, *flags])

    from qsun.jobs.prepare import prepare, warnings_of
    from qsun.jobs.quantize import run_quantize

    prepared = prepare(run, config, out or Path("exports") / run.name, dry_run)
    for warning in warnings_of(prepared):
        click.echo(f"qsun: note: {warning}", err=True)
    if dry_run:
        plan = {"plan": asdict(prepared.plan), "estimate": asdict(prepared.estimate)}
        click.echo(json.dumps(plan, indent=1) if as_json else plan_text(prepared))
        return
    click.echo(plan_text(prepared), err=True)
    result = run_quantize(prepared, resume)
    text = quantization_text(prepared.out, run.load_check.question, result)
    click.echo(json.dumps(result, indent=1) if as_json else text)
