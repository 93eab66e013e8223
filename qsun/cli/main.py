"""The `qsun` command: a table of commands, imported when called; errors become exit codes."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from types import FrameType

import click

from qsun import __version__
from qsun.errors import QsunError
from qsun.quiet import quiet_libraries

COMMANDS = {
    "tune": (
        "qsun.cli.tune",
        "Tune a task's prefill module through the frozen decode module.",
    ),
    "quantize": (
        "qsun.cli.quantize",
        "Quantize a base model into a decode module that vLLM loads.",
    ),
    "export": (
        "qsun.cli.export",
        "Make a bundle of a decode module and every task's prefill module.",
    ),
    "verify": (
        "qsun.cli.verify",
        "Prove that a bundle's modules belong together.",
    ),
    "evaluate": (
        "qsun.cli.evaluate",
        "Score a bundle's systems on their tasks, paired, with floors.",
    ),
    "serve": (
        "qsun.cli.serve",
        "Serve a bundle: every task, one shared pool of decode workers.",
    ),
    "bench": (
        "qsun.cli.bench",
        "Put load on a served bundle: throughput, latency, fairness.",
    ),
    "simulate": (
        "qsun.cli.simulate",
        "Plan pools larger than those at hand, by measured latency curves.",
    ),
    "report": (
        "qsun.cli.report",
        "Show all that is recorded of a bundle as one page.",
    ),
    "doctor": ("qsun.cli.doctor", "Say what is missing on this machine, and what mends it."),
    "inspect": ("qsun.cli.inspect", "Say what a model or checkpoint is."),
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose help text needs no command's module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table's own short texts."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qsun")
def cli() -> None:
    """One low-bit decoder that serves many fine-tuned LLMs."""


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line. A user's mistake ends as its message, a bug with its traceback."""
    quiet_libraries()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _terminated)
    try:
        sys.exit(cli.main(standalone_mode=False))
    except QsunError as error:
        click.echo(f"qsun: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nqsun: interrupted; nothing was published", err=True)
        sys.exit(INTERRUPTED)
