"""`qsun simulate CURVES...`: a cluster larger than the machines at hand, by measured curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qsun.cli.simulations import simulation_text

# Where a flag's value belongs among the settings.
PLACES = {
    "ask": "ask",
    "tasks": "tasks",
    "seed": "seed",
    "trace": "trace",
    "system": "layout.system",
    "decode": "layout.decode_workers",
    "rate": "workload.rate_per_s",
    "users": "workload.concurrency",
    "alpha": "workload.alpha",
    "prompt": "workload.prompt_tokens",
    "output": "workload.output_tokens",
    "ttft_p99": "slo.ttft_p99_s",
    "tpot_p99": "slo.tpot_p99_s",
    "scenario": "events.scenarios",
}


def _names(text: str) -> list[str]:
    """Names between commas; a number stands for as many tasks."""
    if text.isdecimal():
        width = len(text)
        return [f"task-{number:0{width}d}" for number in range(1, int(text) + 1)]
    return [name.strip() for name in text.split(",") if name.strip()]


@click.command()
@click.argument("curves", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--ask", type=click.Choice(["run", "fleet", "events"]), help="[default: run]")
@click.option("--config", type=click.Path(path_type=Path), help="All settings in a YAML file.")
@click.option("--system", type=click.Choice(["isolated", "sun", "qsun"]), help="[default: qsun]")
@click.option("--tasks", metavar="N|A,B", help="How many tasks, or their names [default: 4].")
@click.option("--rate", type=float, help="Requests a second, of all tasks.")
@click.option("--users", type=int, help="A closed loop: so many users ask again once answered.")
@click.option("--alpha", type=float, help="Skew of the tasks' shares, Zipf's law [default: 0].")
@click.option("--trace", type=click.Path(path_type=Path), help="Recorded requests, JSONL.")
@click.option("--prompt", metavar="FORM", help="Prompt tokens [default: fixed:256].")
@click.option("--output", metavar="FORM", help="Output tokens [default: fixed:64].")
@click.option("--decode", type=int, help="Decode workers [default: 2].")
@click.option("--ttft-p99", type=float, help="The SLO's TTFT, seconds [default: 1].")
@click.option("--tpot-p99", type=float, help="The SLO's TPOT, seconds [default: 0.05].")
@click.option(
    "--scenario",
    multiple=True,
    type=click.Choice(["spike", "loss", "growth", "shrink"]),
    help="[default: all]",
)
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="Where the record goes.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print the record's result as JSON.")
def command(
    curves: tuple[Path, ...],
    config: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Simulate prefill and decode pools that take as long as CURVES say, latency records.

    --ask run: one workload on one layout. --ask fleet: the smallest decode pool that holds the SLO,
    for isolated tasks, SUN and QSUN. --ask events: a spike, a lost worker, a pool that grows or
    shrinks, under every policy and pool sizing. FORM: fixed:N, uniform:LEAST:MOST,
    lognormal:MEDIAN:SIGMA, geometric:MEAN.
    """
    from qsun.jobs.simulate import prepare_simulation, run_simulation
    from qsun.settings import load_settings, settings_from
    from qsun.simulate.config import SimulateConfig

    given = [*overrides, *_as_overrides(flags)]
    settings = (
        settings_from(SimulateConfig, {}, given)
        if config is None
        else load_settings(SimulateConfig, config, given)
    )
    record = run_simulation(prepare_simulation(curves, settings, out))
    click.echo(json.dumps(record.result, indent=1) if as_json else simulation_text(record.result))
    if out is not None and not as_json:
        click.echo(f"written to {out}")


def _as_overrides(flags: dict[str, Any]) -> list[str]:
    """The flags that were given, as settings; JSON is YAML."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    given |= {name: str(value) for name, value in given.items() if isinstance(value, Path)}
    if "tasks" in given:
        given["tasks"] = _names(given["tasks"])
    return [f"{PLACES[name]}={json.dumps(value)}" for name, value in given.items()]
