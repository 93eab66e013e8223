"""`qsun doctor`: what is missing on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from qsun.cli.output import findings_text
from qsun.errors import ServingEnvironmentError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Look at both environments and the machine; exits with 8 when something is missing."""
    from qsun.doctor import examine

    findings = examine()
    text = json.dumps([asdict(f) for f in findings], indent=1)
    click.echo(text if as_json else findings_text(findings))
    problems = sum(finding.level == "problem" for finding in findings)
    if problems:
        raise ServingEnvironmentError(f"{problems} problem(s) found; see the remedies above")
