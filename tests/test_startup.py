"""`qsun --help` is quick because it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsun.cli.main import COMMANDS

HEAVY = {
    *("torch", "transformers", "vllm", "llmcompressor", "datasets", "lm_eval", "pydantic"),
    *("compressed_tensors", "simpy"),
}
LIMIT_S = 0.3


def test_help_is_quick() -> None:
    command = [str(Path(sys.executable).with_name("qsun")), "--help"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        answer = subprocess.run(command, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert answer.returncode == 0, answer.stderr
        assert all(name in answer.stdout for name in COMMANDS)
    assert min(times) < LIMIT_S


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["bench", "--help"],
        ["simulate", "--help"],
        ["report", "--help"],
        ["inspect", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from qsun.cli.main import main\n"
        f"sys.argv = ['qsun', *{arguments!r}]\n"
        "try: main()\n"
        "finally: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "Usage: qsun" in answer.stdout
    assert "click" in answer.stderr.split()
    assert HEAVY & set(answer.stderr.split()) == set()
