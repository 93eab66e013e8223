"""`qsun verify BUNDLE`: do these modules belong together?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from qsun.cli.output import verdict_text


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--prefill", type=click.Path(path_type=Path), help="In place of BUNDLE: a module.")
@click.option("--decode", type=click.Path(path_type=Path), help="The decode module beside it.")
@click.option("--base", type=click.Path(path_type=Path), help="The base model's folder.")
@click.option(
    "--references",
    type=click.Path(path_type=Path),
    help="Prompts and responses as tokens, for a pair: lines of {prompt, response}.",
)
@click.option("--static", "only_static", is_flag=True, help="Files only: no weights are loaded.")
@click.option("--served", is_flag=True, help="Also start vLLM and compare what it serves.")
@click.option("--skip", multiple=True, metavar="CHECK", help="Leave a check out, by its name.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the verdict goes.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a limit.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(
    bundle: Path | None,
    prefill: Path | None,
    decode: Path | None,
    base: Path | None,
    references: Path | None,
    only_static: bool,
    served: bool,
    skip: tuple[str, ...],
    out: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove that BUNDLE's modules belong together, or a --prefill and a --decode module.

    Exits with 0 when they do, 11 when they do not, 12 when it could not be checked to the end.
    The verdict is written into the bundle, or to --out.
    """
    pair = prefill is not None and decode is not None
    if pair == (bundle is not None) or (prefill is None) != (decode is None):
        raise click.UsageError("give a BUNDLE, or --prefill together with --decode")
    from qsun.config import VerifyConfig
    from qsun.jobs.verify import Request, bundle_request, run_verify, write_verdict
    from qsun.settings import settings_from
    from qsun.verdict import require
    from qsun.verify.subject import Subject

    settings = settings_from(VerifyConfig, {}, overrides)
    levels: tuple[str, ...] = ("static",) if only_static else ("static", "numeric")
    levels += ("served",) if served else ()
    if bundle is not None:
        request = bundle_request(bundle, levels, skip, base)
    else:
        assert prefill is not None
        assert decode is not None
        subject = Subject.from_pair(prefill, decode, base)
        request = Request(subject, None, levels, skip, base, references)
    verdict = run_verify(request, settings)
    folder = out or bundle
    path = None if folder is None else write_verdict(verdict, settings, folder)
    shown = json.dumps(verdict.summary(), indent=1) if as_json else verdict_text(verdict, path)
    click.echo(shown)
    require(verdict, str(bundle or f"{prefill} and {decode}"))
