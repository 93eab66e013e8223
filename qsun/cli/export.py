"""`qsun export CONFIG|RUN...`: one decode module and every task's prefill module as a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qsun.cli.output import bundle_text


@click.command()
@click.argument(
    "sources", metavar="CONFIG|RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["compressed-tensors", "awq"]),
    help="The decode module's format [default: as it was quantized].",
)
@click.option("--push", metavar="ORG/NAME", help="Push it to the Hugging Face Hub as well.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    sources: tuple[Path, ...],
    out: Path,
    format_: str | None,
    push: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a bundle that vLLM can serve.

    Its modules are those that CONFIG names under `export`, or those of the RUN folders: one that
    `qsun quantize` wrote, and one that `qsun tune` wrote for each task. Then prove it:
    `qsun verify OUT`.
    """
    from qsun.cli.runs import runs_config
    from qsun.config import load_config
    from qsun.hub import check_token, push_folder
    from qsun.jobs.export import run_export
    from qsun.jobs.prepare_export import prepare_export

    if push is not None:
        check_token()
    if len(sources) > 1 or sources[0].is_dir():
        run, config = runs_config(sources, overrides)
    else:
        run, config = load_config(sources[0], overrides), sources[0]
    prepared = prepare_export(run, config, out, format_)
    manifest = run_export(prepared)
    click.echo(json.dumps(manifest, indent=1) if as_json else bundle_text(out, manifest))
    if push is not None:
        click.echo(f"pushed to {push_folder(out, push)}", err=True)
