"""`qsun report BUNDLE|RECORD ...`: all that is recorded, as one page."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument(
    "sources",
    metavar="BUNDLE|RECORD...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@click.option("--out", type=click.Path(path_type=Path), help="The page: FILE.html or FILE.md.")
@click.option("--markdown", type=click.Path(path_type=Path), help="The same as Markdown: FILE.md.")
@click.option("--note", default="", help="What readers have to know, said above everything else.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    sources: tuple[Path, ...], out: Path | None, markdown: Path | None, note: str, as_json: bool
) -> None:
    """Show a BUNDLE with its records, RECORD files, or both, on one page.

    Records of several systems are compared where their loads and hardware are equal. The page needs
    no other file; what no record says is listed at its end.
    """
    outs = [path for path in (out, markdown) if path is not None]
    if not outs:
        raise click.UsageError("say where the page goes: --out report.html, or --markdown FILE.md")
    if markdown is not None and markdown.suffix != ".md":
        raise click.UsageError(f"--markdown {markdown}: its name ends with .md")
    if len(set(outs)) < len(outs):
        raise click.UsageError(f"--out and --markdown are the same file, {out}")
    from qsun.report.run import write_report

    page = write_report(sources, outs, note)
    sections = {section.title: section.summary for section in page.sections}
    if as_json:
        written = {"written": list(map(str, outs)), "sections": sections}
        absent = {one.what: one.command for one in page.absent}
        click.echo(json.dumps({**written, "not_recorded": absent}, indent=1))
        return
    for title, summary in sections.items():
        click.echo(f"{title}: {summary}")
    for one in page.absent:
        click.echo(f"not recorded: {one.what} ({one.command})")
    click.echo(f"written to {', '.join(map(str, outs))}")
