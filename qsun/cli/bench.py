"""`qsun bench URL|BUNDLE`: how much comes out of it, how fast, and for whom?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def _numbers(kind: type) -> Any:
    def parsed(_: click.Context, __: click.Parameter, text: str | None) -> list[Any] | None:
        if text is None:
            return None
        try:
            return [kind(one) for one in text.split(",")]
        except ValueError as error:
            raise click.BadParameter(f"{text}: numbers, with commas between them") from error

    return parsed


@click.command()
@click.argument("subject", metavar="URL|BUNDLE")
@click.option(
    "--rate", callback=_numbers(float), metavar="N,N", help="Open loop: requests a second."
)
@click.option("--concurrency", callback=_numbers(int), metavar="N,N", help="Closed loop: users.")
@click.option("--alpha", callback=_numbers(float), metavar="A,A", help="Zipf skew over the tasks.")
@click.option("--trace", type=click.Path(path_type=Path), help="Recorded requests, JSON lines.")
@click.option("--curves", is_flag=True, help="Measure latency curves for `qsun simulate` instead.")
@click.option("--tasks", default="", metavar="A,B", help="Some tasks, the commonest first.")
@click.option("--decode", type=int, metavar="N", help="BUNDLE: decode workers.")
@click.option("--prefill", multiple=True, metavar="TASK=N", help="BUNDLE: prefill workers.")
@click.option("--policy", help="BUNDLE: shared, isolated, round-robin or power-of-two.")
@click.option("--allow", multiple=True, metavar="CHECK", help="BUNDLE: pass over a failed check.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The router's key.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A folder; --curves: a file."
)
@click.option("--resume", is_flag=True, help="Make what an interrupted bench lacks.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    subject: str,
    rate: list[float] | None,
    concurrency: list[int] | None,
    alpha: list[float] | None,
    trace: Path | None,
    curves: bool,
    tasks: str,
    decode: int | None,
    prefill: tuple[str, ...],
    policy: str | None,
    allow: tuple[str, ...],
    api_key_file: Path | None,
    out: Path,
    resume: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Put load on the router at URL, or on BUNDLE, served for the while.

    Every pair of a load and an alpha is run several times, each with another seed. OUT/bench.json
    is the record; OUT/requests has every request's times.
    """
    from qsun.bench.curves import CurveConfig
    from qsun.bench.settings import BenchConfig
    from qsun.cli.loads import bench_text, curves_text
    from qsun.jobs.bench import BENCH, Request, run_bench, run_curves
    from qsun.settings import settings_from

    layout = [
        *(("--decode", str(decode)) if decode is not None else ()),
        *(word for one in prefill for word in ("--prefill", one)),
        *(("--set", f"policy={policy}") if policy else ()),
        *(word for one in allow for word in ("--allow", one)),
    ]
    request = Request(
        subject,
        tuple(filter(None, (one.strip() for one in tasks.split(",")))),
        api_key_file,
        trace,
        tuple(layout),
    )
    if curves:
        if rate or concurrency or alpha or trace or resume:
            raise click.UsageError("--curves makes its own load")
        record = run_curves(request, settings_from(CurveConfig, {}, overrides), out, 0)
        text = curves_text(record.result, out)
    else:
        given = {"rates": rate, "concurrency": concurrency, "alphas": alpha}
        mapping = {name: value for name, value in given.items() if value is not None}
        settings = settings_from(BenchConfig, mapping, overrides)
        record = run_bench(request, settings, out, resume)
        text = bench_text(record.result, out / BENCH)
    click.echo(json.dumps(record.result, indent=1) if as_json else text)
