"""A bundle served for the while of a bench: `qsun serve` in a process of its own."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qsun.errors import ServingEnvironmentError
from qsun.ports import free_ports

PROGRAM = "import sys; sys.argv[0] = 'qsun'; from qsun.cli.main import main; main()"
STOP_S = 90.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def served(bundle: Path, options: Sequence[str]) -> Iterator[str]:
    """Serve a bundle until the block ends; the router's address, once every task is served.

    What it says goes to stderr. It ends with this process, however that ends.

    Raises:
        ServingEnvironmentError: it ended before it was ready; it has said why.
    """
    (port,) = free_ports(1)
    command = ["serve", str(bundle), "--port", str(port), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_end_with_parent,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            code = process.wait()
            raise ServingEnvironmentError(f"qsun serve {bundle} ended with code {code}: see above")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
