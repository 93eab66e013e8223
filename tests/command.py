"""The `qsun` command, called in this process: torch is imported once for all tests."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from qsun.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What one call of `qsun` did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """What `qsun: ...` said in the end, progress and plan left out."""
        _, found, message = f"\n{self.stderr}".rpartition("\nqsun: ")
        return message if found else ""


def run_qsun(*arguments: str | Path) -> Outcome:
    """Run `qsun` with these arguments; an exception that would show a traceback is raised."""
    stdout, stderr = io.StringIO(), io.StringIO()
    typed, on_terminate = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["/usr/bin/qsun", *map(str, arguments)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as exit_:
        return Outcome(int(exit_.code or 0), stdout.getvalue(), stderr.getvalue())
    finally:
        sys.argv = typed
        signal.signal(signal.SIGTERM, on_terminate)
    raise AssertionError("main() returned instead of exiting")


def refused(config: Path, exit_code: int, *options: str) -> str:
    """Run `qsun quantize`, which must end with `exit_code` and leave nothing; gives its message."""
    out = config.parent / "out" / "module"
    out.parent.mkdir()
    outcome = run_qsun("quantize", config, "--out", out, *options)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert outcome.stdout == ""
    assert list(out.parent.iterdir()) == []
    return outcome.message
