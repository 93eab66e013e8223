"""Engines that load on a GPU together and are timed one after another.

Loading is a minute of compiling on cores, a timing half a minute of the GPU alone: nothing else may
load or run there meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.job_runner import ROOT, end_group

GPU_BYTES = 143_771 * 2**20  # an H200's
WORKING_BYTES = 6 * 2**30  # of an engine beside its weights and cache: embeddings, CUDA graphs
LOOK_S = 0.1
LEAST_S = 150.0  # for one group
SHOWN_LINES = 12


@dataclass(frozen=True)
class Engine:
    """A worker's command; it is done once `out` is there. It reads `weight_bytes` at least."""

    name: str
    command: list[str]
    out: Path
    log: Path
    weight_bytes: float

    def file(self, what: str) -> Path:
        """`OUT.ready`, which it writes once loaded, or `OUT.go`, which it waits for."""
        return self.out.with_suffix(f".{what}")


@dataclass(frozen=True)
class Turns:
    """GPUs by number, engines at once on each and their share of its memory, in all.

    `end` is when to stop, in monotonic seconds.
    """

    gpus: tuple[str, ...]
    together: int
    share: float
    end: float


def run_turns(engines: Sequence[Engine], turns: Turns) -> None:
    """Time all that are not done and for which there is time."""
    waiting = [one for one in engines if not one.out.exists()]
    size = turns.together
    groups = [waiting[first : first + size] for first in range(0, len(waiting), size)]

    def work(gpu: str) -> None:
        while groups and turns.end - time.monotonic() > LEAST_S:
            run_group(groups.pop(0), gpu, turns)

    with ThreadPoolExecutor(len(turns.gpus)) as pool:
        list(pool.map(work, turns.gpus))


def run_group(group: Sequence[Engine], gpu: str, turns: Turns) -> None:
    """Load these on a GPU, then time each."""
    begun, end = time.monotonic(), turns.end
    processes = {one.name: _start(one, gpu, cache_bytes(group, turns.share)) for one in group}
    try:
        for one in group:
            _wait(processes[one.name], one.file("ready").exists, end)
        print(f"{len(group)} engines: {time.monotonic() - begun:.0f} s to load", flush=True)
        for one in group:
            started = time.monotonic()
            one.file("go").touch()
            _wait(processes[one.name], lambda: False, end)
            print(f"{one.name}: {time.monotonic() - started:.0f} s", flush=True)
            if not one.out.exists():
                lines = one.log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(f"  | {line[:300]}" for line in lines[-SHOWN_LINES:]), flush=True)
    finally:
        # An engine is a process of its own, which would keep its memory without its parent.
        for process in processes.values():
            end_group(process, signal.SIGKILL)
            process.wait()


def cache_bytes(group: Sequence[Engine], share: float) -> int:
    """The size of each engine's KV cache, where all together take so much of the GPU's memory."""
    taken = sum(one.weight_bytes + WORKING_BYTES for one in group)
    return int((share * GPU_BYTES - taken) / len(group))


def _start(one: Engine, gpu: str, cache: int) -> subprocess.Popen[bytes]:
    one.log.parent.mkdir(parents=True, exist_ok=True)
    for what in ("ready", "go"):
        one.file(what).unlink(missing_ok=True)
    with one.log.open("wb") as log:
        return subprocess.Popen(
            [*one.command, "--turn", "--cache-bytes", str(cache)],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], reached: Callable[[], bool], end: float) -> None:
    """Until it ended or reached something, or no time is left."""
    while process.poll() is None and not reached() and time.monotonic() < end:
        time.sleep(LOOK_S)
