"""The GPU's kernels by Triton's interpreter: the codes of the plain loops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRITON = ROOT / ".venv-triton"  # apart: packages that find Triton take a GPU for granted


def test_kernels_take_the_same_turns_as_the_loops() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(TRITON))),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-m", "tests.gpu.check_turns"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines() == [
        f"{bits} bits: 0.00000 of the codes differ" for bits in (2, 3, 4)
    ]
