"""Jobs that wait for one another, some at a time on each GPU, in a fixed order of preference."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN_LINES, SHOWN_CHARACTERS = 8, 300  # of a failed job's log, after progress bars
STOP_S = 60  # for a training to write its checkpoint
LOOK_S = 0.2


@dataclass(frozen=True)
class Job:
    """One command, run in `folder`; it is done once the file `done` is there.

    `command` is made when the job starts: it may need what earlier jobs found. Jobs of lesser
    `order` start first. `gib` is about what it takes of a GPU, and it does not start with less than
    `least_s` seconds left. The folder `unfinished` that an interrupted run leaves is kept where it
    holds `checkpoints` to go on from, and else removed. Room is kept for a `reserved` job while
    it waits for others.
    """

    name: str
    folder: Path
    command: Callable[[], list[str]]
    done: Path
    needs: tuple[str, ...] = ()
    order: int = 0
    gib: int = 0
    least_s: int = 0
    unfinished: Path | None = None
    checkpoints: str = "checkpoint-*"
    reserved: bool = False

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.folder / "logs" / f"{self.name.rpartition('/')[2]}.log"

    def prepare(self) -> None:
        """Remove what an interrupted run left and nothing goes on from."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        left = self.unfinished
        if left is not None and left.exists() and not list(left.glob(self.checkpoints)):
            shutil.rmtree(left)


@dataclass(frozen=True)
class Limits:
    """GPUs by number, jobs and GiB at a time on each, and when to stop (monotonic seconds)."""

    gpus: tuple[str, ...]
    jobs: int
    gib: int
    end: float


@dataclass(frozen=True)
class Running:
    """A job that has started."""

    job: Job
    process: subprocess.Popen[bytes]
    gpu: str
    started: float

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started


def ready(jobs: Sequence[Job], busy: set[str]) -> Iterator[Job]:
    """Jobs that nothing stands in the way of, the preferred ones first."""
    done = {job.name for job in jobs if job.done.exists()}
    for job in sorted(jobs, key=lambda one: one.order):
        if job.name not in done | busy and done.issuperset(job.needs):
            yield job


def place(job: Job, running: Sequence[Running], held: Sequence[Job], limits: Limits) -> str | None:
    """The emptiest GPU with room for the job; None where there is none, or no time.

    Reserved jobs that are yet to come, `held`, take room as if they were running.
    """
    if limits.end - time.monotonic() < job.least_s:
        return None
    loads = {gpu: [one.job.gib for one in running if one.gpu == gpu] for gpu in limits.gpus}
    for one in held if not job.reserved else ():
        loads[min(loads, key=lambda gpu: sum(loads[gpu]))].append(one.gib)
    fitting = [
        gpu
        for gpu, load in loads.items()
        if len(load) < limits.jobs and (not load or sum(load) + job.gib <= limits.gib)
    ]
    return min(fitting, key=lambda gpu: sum(loads[gpu]), default=None)


def run_jobs(jobs: Sequence[Job], limits: Limits) -> bool:
    """Run what can be run until all is done (True), or no time or no way is left (False)."""
    running: list[Running] = []
    failed: set[str] = set()
    while time.monotonic() < limits.end:
        for one in [one for one in running if one.process.poll() is not None]:
            running.remove(one)
            if not _ended_well(one):
                failed.add(one.job.name)
        busy = failed | {one.job.name for one in running}
        waiting = list(ready(jobs, busy))
        if not waiting and not running:
            break
        held = [job for job in jobs if job.reserved and _to_come(job, jobs, busy, failed)]
        chosen = ((job, place(job, running, held, limits)) for job in waiting)
        job, gpu = next(((job, gpu) for job, gpu in chosen if gpu is not None), (None, None))
        if job is not None and gpu is not None:
            running.append(_start(job, gpu))
        elif running:
            time.sleep(LOOK_S)
        else:
            break  # too little time is left for any
    _stop(running)
    return all(job.done.exists() for job in jobs)


def _to_come(job: Job, jobs: Sequence[Job], busy: set[str], failed: set[str]) -> bool:
    """Whether a job will be started once jobs that are now running have ended."""
    if job.name in busy or job.done.exists() or failed.intersection(job.needs):
        return False
    missing = {one.name for one in jobs if not one.done.exists()}.intersection(job.needs)
    return missing <= busy


def _start(job: Job, gpu: str) -> Running:
    job.prepare()
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            job.command(),
            cwd=job.folder,
            env=_environment(gpu),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(job, process, gpu, time.monotonic())


def _environment(gpu: str) -> Mapping[str, str]:
    """One GPU, and one core: there are many jobs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": gpu,
    }


def _ended_well(one: Running) -> bool:
    well = one.process.returncode == 0 and one.job.done.exists()
    print(f"{one.job.name}: {one.seconds:.0f} s, exit {one.process.returncode}", flush=True)
    if not well:
        lines = one.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line.rpartition("\r")[2][:SHOWN_CHARACTERS] for line in lines[-SHOWN_LINES:]]
        print("\n".join(f"  | {line}" for line in shown), flush=True)
    return well


def _stop(running: Sequence[Running]) -> None:
    """Each with all that it started: a script's quantization would go on without it."""
    for one in running:
        end_group(one.process, signal.SIGTERM)
    latest = time.monotonic() + STOP_S
    for one in running:
        try:
            one.process.wait(max(0.1, latest - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{one.job.name}: killed", flush=True)
        end_group(one.process, signal.SIGKILL)
        one.process.wait()
        print(f"{one.job.name}: stopped after {one.seconds:.0f} s", flush=True)


def end_group(process: subprocess.Popen[bytes], signal_number: signal.Signals) -> None:
    """Signal a process that leads a group of its own, and all of that group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)
