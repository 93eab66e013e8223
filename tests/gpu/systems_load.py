"""What every system is asked, and the `qsun bench` that asks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qsun.bench.serving import PROGRAM
from tests.gpu.job_runner import ROOT
from tests.gpu.systems_bundles import TASKS
from tests.gpu.systems_routers import System

BENCH_S, CURVES_S = 15, 45  # about what a bench takes beyond its load, and what curves take


@dataclass(frozen=True)
class Load:
    """What every system is asked: so many users in a closed loop, tokens of prompt and answer."""

    alphas: tuple[float, ...]
    users: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """One `qsun bench` of a system: its load at `alpha`, or curves where there is none.

    `out` is the record that it leaves, `needs_s` about what it takes.
    """

    system: System
    alpha: float | None
    out: Path
    options: tuple[str, ...]
    needs_s: float

    @property
    def done(self) -> bool:
        """Whether its record is there."""
        return self.out.exists()

    @property
    def kept_as(self) -> str:
        """What its record is called among the committed ones."""
        if self.alpha is None:
            return f"latency-{self.system.bundle}.json"
        return f"{self.system.name}-alpha-{self.alpha:g}.json"

    def run(self, url: str, end: float) -> None:
        """Make it, anew if an earlier call was interrupted; what it says goes to stderr."""
        target = self.out
        if self.alpha is not None:
            target = self.out.parent
            shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-c", PROGRAM, "bench", url, *self.options, "--out", str(target)]
        begun = time.monotonic()
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=end - begun, stdout=2).returncode
        except subprocess.TimeoutExpired:
            code = -1
        seconds = time.monotonic() - begun
        what = "curves" if self.alpha is None else f"alpha {self.alpha:g}"
        print(f"{self.system.name}, {what}: {seconds:.0f} s, exit {code}", flush=True)


def measurements(load: Load, systems: list[System], state: Path) -> list[Measurement]:
    """Of one bundle's systems: every alpha of all before the next, then curves of one decoder."""
    common = ["--concurrency", str(load.users), "--tasks", ",".join(TASKS)]
    for setting in (
        *(f"seconds={load.seconds:g}", "repeats=1", "warmup=1", "ttft_s=1", "tpot_s=0.05"),
        *(f"prompt_tokens=fixed:{load.prompt_tokens}", f"output_tokens=fixed:{load.output_tokens}"),
    ):
        common += ["--set", setting]
    found = [
        Measurement(
            system,
            alpha,
            state / "benches" / f"{system.name}-{load.users}-users-alpha-{alpha:g}" / "bench.json",
            (*common, "--alpha", f"{alpha:g}"),
            load.seconds + BENCH_S,
        )
        for alpha in load.alphas
        for system in systems
    ]
    curves = ["--curves", "--set", "rounds=2"]
    for name in ("batches", "contexts", "prompts"):
        curves += ["--set", f"{name}={list(getattr(load, name))}"]
    found += [
        Measurement(
            one, None, state / "curves" / f"latency-{one.bundle}.json", tuple(curves), CURVES_S
        )
        for one in systems
        if one.decode == 1
    ]
    return found
