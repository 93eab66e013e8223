"""`qsun inspect PATH`: what a model or checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qsun.cli.output import inspection_text
from qsun.errors import ModelError, bullet_list


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint folder, a .gguf file or a config.json. Loads no weights.

    Exits with 4 when it is none of these, damaged, or no longer what its record says.
    """
    from qsun.inspection import inspect

    found = inspect(path)
    click.echo(json.dumps(found.summary(), indent=1) if as_json else inspection_text(found))
    if found.files_changed:
        raise ModelError(
            f"{path} is not what its record says; these files changed since:\n"
            f"{bullet_list(found.files_changed)}"
        )
