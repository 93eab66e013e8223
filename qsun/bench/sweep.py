"""A sweep: every load, several times, one after another; what is finished stays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qsun.bench.drive import drive
from qsun.bench.measures import measures_of, summary_of
from qsun.bench.settings import BenchConfig, name_of
from qsun.bench.state import BenchState
from qsun.bench.target import Target
from qsun.kv_layout import DTYPE_BYTES
from qsun.progress import announce
from qsun.workload import Request, Workload

TRACE = "trace"


@dataclass(frozen=True)
class Point:
    """One load: drawn, or the requests of a trace."""

    name: str
    load: Workload | Sequence[Request]
    seconds: float


def points_of(
    settings: BenchConfig, max_tokens: int, trace: Sequence[Request] | None
) -> list[Point]:
    """All loads of a bench; a trace is one, as long as it is.

    Raises:
        ConfigError: loads that cannot be drawn.
    """
    if trace is not None:
        return [Point(TRACE, trace, trace[-1].at_s + 1e-3)]
    return [Point(name_of(one), one, settings.seconds) for one in settings.workloads(max_tokens)]


def sweep(
    target: Target, points: Sequence[Point], settings: BenchConfig, state: BenchState
) -> None:
    """Make every run that is not made yet.

    Raises:
        KeyboardInterrupt: from the user; what is finished is in `state`.
    """
    for point, repeat, name in _runs(points, settings):
        if state.finished(name) is not None:
            continue
        announce(f"{name}: {point.seconds:g} s")
        seed = settings.seed + repeat
        run = asyncio.run(drive(target, point.load, point.seconds, seed, settings.warmup))
        state.keep(name, run.answers, measures_of(run, target, settings))


def result_of(
    target: Target, points: Sequence[Point], settings: BenchConfig, state: BenchState
) -> dict[str, Any]:
    """All that is finished as a record's result, and the names of what is missing."""
    runs: dict[str, list[dict[str, Any]]] = {point.name: [] for point in points}
    missing = []
    for point, _, name in _runs(points, settings):
        found = state.finished(name)
        if found is None:
            missing.append(name)
        else:
            runs[point.name].append(found)
    return {
        "bundle": target.bundle,
        "system": system_of(target),
        "policy": target.policy,
        "decode": target.decode,
        "workers": {role: target.count(role) for role in ("prefill", "decode")},
        "tasks": list(target.tasks),
        "slo": {"ttft_s": settings.ttft_s, "tpot_s": settings.tpot_s},
        "complete": not missing,
        "missing": missing,
        "points": [
            {
                "load": load_of(point, settings),
                "runs": runs[point.name],
                "summary": summary_of(runs[point.name]),
            }
            for point in points
            if runs[point.name]
        ],
    }


def load_of(point: Point, settings: BenchConfig) -> dict[str, Any]:
    """What a record says of a load."""
    if isinstance(point.load, Workload):
        return asdict(point.load) | {"trace": None, "seed": settings.seed}
    return {
        "rate_per_s": len(point.load) / point.seconds,
        "concurrency": None,
        "arrivals": TRACE,
        "alpha": None,
        "trace": f"{len(point.load)} requests of {point.seconds:.0f} s",
        "seed": settings.seed,
    }


def system_of(target: Target) -> str:
    """Which of the systems that are compared this is: by its policy, and what decodes."""
    if target.policy == "isolated":
        return "isolated"
    return "sun" if target.decode in DTYPE_BYTES else "qsun"


def _runs(points: Sequence[Point], settings: BenchConfig) -> Iterator[tuple[Point, int, str]]:
    """Every run's point, number and name; all points once, then all of them again."""
    for repeat in range(settings.repeats):
        for point in points:
            yield point, repeat, f"{point.name}-{repeat}"
