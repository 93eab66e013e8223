"""The bench job: a router, here for the while or elsewhere; loads on it; a record, last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.bench.curves import CurveConfig, measure_curves
from qsun.bench.serving import served
from qsun.bench.settings import BenchConfig
from qsun.bench.state import BenchState
from qsun.bench.sweep import Point, points_of, result_of, sweep
from qsun.bench.target import NotReady, Target, find_target
from qsun.bundle import read_bundle
from qsun.errors import ConfigError, Interrupted, OutputError, bullet_list, nearest
from qsun.files import sha256_file
from qsun.jobs.api_key import read_api_key
from qsun.records import Record, new_record
from qsun.workload import read_trace

BENCH = "bench.json"
READY_S, LOOK_S = 900.0, 0.5


@dataclass(frozen=True)
class Request:
    """What is benched: a router's address, or a bundle, served for the while.

    `layout` are options of `qsun serve`, for a bundle. Without `tasks`, all that are served.
    """

    subject: str
    tasks: tuple[str, ...] = ()
    api_key: Path | None = None
    trace: Path | None = None
    layout: tuple[str, ...] = ()

    @property
    def bundle(self) -> Path | None:
        """The bundle's folder; none where the subject is an address."""
        return None if "://" in self.subject else Path(self.subject).absolute()


def run_bench(request: Request, settings: BenchConfig, out: Path, resume: bool) -> Record:
    """Put every load on the subject and record it in `out`.

    Raises:
        ConfigError: loads that cannot be made, or tasks that are not served.
        DataError: a wrong trace.
        ServingEnvironmentError: no router there, or workers that do not start.
        Interrupted: by the user; what is finished is recorded, and said to be unfinished.
    """
    _check_early(request, settings)
    with _target(request) as target:
        points = _points(request, settings, target.tasks, target.max_tokens)
        state = BenchState(out, _identity(request, settings, target), resume)
        try:
            sweep(target, points, settings, state)
        except KeyboardInterrupt as error:
            record = _record(target, points, settings, state, out)
            left = len(record.result["missing"])
            raise Interrupted(
                f"interrupted; {out / BENCH} says that {left} runs are missing: the same command "
                "with --resume makes them."
            ) from error
        return _record(target, points, settings, state, out)


def run_curves(request: Request, settings: CurveConfig, out: Path, seed: int) -> Record:
    """Measure the subject's latency curves and write them to the file `out`.

    Raises:
        ConfigError: not one decode worker, or lengths that are not served.
        ServingEnvironmentError: no router there, or requests that fail.
        OutputError: `out` exists, or its folder does not.
    """
    if out.exists() or not out.parent.is_dir():
        what = "exists already: qsun never overwrites" if out.exists() else "lies in no folder"
        raise OutputError(f"output {out} {what}. Choose another --out")
    with _target(request) as target:
        longest = max(*settings.prompts, *settings.contexts) + settings.steps
        if longest > target.max_tokens:
            raise ConfigError(f"{longest} tokens are asked for, {target.max_tokens} are served")
        result = asyncio.run(measure_curves(target, settings, seed))
    record = new_record("latency", settings, seed, result)
    record.write(out)
    return record


def _check_early(request: Request, settings: BenchConfig) -> None:
    """What a bundle's own files tell, before its workers are started."""
    if request.bundle is None:
        return
    bundle = read_bundle(request.bundle)
    known = sorted(bundle.prefill)
    missing = [task for task in request.tasks if task not in known]
    if missing:
        listed = bullet_list(f"{task} ({nearest(task, known)})" for task in missing)
        raise ConfigError(f"{request.subject} has no such tasks:\n{listed}")
    _points(request, settings, request.tasks or known, bundle.manifest.max_tokens)


def _points(
    request: Request, settings: BenchConfig, tasks: Sequence[str], max_tokens: int
) -> list[Point]:
    trace = None
    if request.trace is not None:
        if settings.rates or settings.concurrency:
            raise ConfigError("a trace is a load of its own: no --rate or --concurrency beside it")
        trace = read_trace(request.trace, tasks, max_tokens)
    return points_of(settings, max_tokens, trace)


@contextmanager
def _target(request: Request) -> Iterator[Target]:
    key = read_api_key(request.api_key)
    if request.bundle is None:
        if request.layout:
            raise ConfigError(f"{request.subject} is served already: no options of a layout")
        yield find_target(request.subject, key, request.tasks)
        return
    with served(request.bundle, request.layout) as url:
        yield _when_ready(url, key, request.tasks)


def _when_ready(url: str, key: str | None, tasks: Sequence[str]) -> Target:
    """The target once all its workers may be asked: `qsun serve` answers from the first one on."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return find_target(url, key, tasks)
        except NotReady:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _identity(request: Request, settings: BenchConfig, target: Target) -> dict[str, Any]:
    """All that a run depends on."""
    trace = None if request.trace is None else sha256_file(request.trace)
    return {
        **asdict(settings),
        "trace": trace,
        "tasks": target.tasks,
        "bundle": target.bundle,
        "policy": target.policy,
        "workers": {role: target.count(role) for role in ("prefill", "decode")},
    }


def _record(
    target: Target, points: Sequence[Point], settings: BenchConfig, state: BenchState, out: Path
) -> Record:
    record = new_record(
        "bench", settings, settings.seed, result_of(target, points, settings, state)
    )
    record.write(out / BENCH)
    return record
