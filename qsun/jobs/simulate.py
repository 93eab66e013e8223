"""The simulation job: measured curves and a question in, a record of the answer out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsun.errors import OutputError
from qsun.progress import announce, track
from qsun.records import Record, new_record, package_versions
from qsun.simulate.config import SimulateConfig, check
from qsun.simulate.curve_records import Curves, read_curves
from qsun.workload import Request

KIND = "simulation"
PACKAGES = ("numpy", "simpy")


@dataclass(frozen=True)
class Prepared:
    """Everything checked: curves, question, and requests where they do not wait for answers."""

    curves: Curves
    config: SimulateConfig
    requests: Sequence[Request]
    out: Path | None


def prepare_simulation(
    curves: Sequence[Path], config: SimulateConfig, out: Path | None = None
) -> Prepared:
    """Check everything that can be wrong before anything is simulated.

    Raises:
        QsunError: no latency records.
        DataError: curves or a trace that cannot be used; all problems are named.
        ConfigError: a question that cannot be answered; all reasons are named.
        OutputError: `out` exists.
    """
    from qsun.simulate.requests import requests_of

    if out is not None and (out.exists() or out.is_symlink()):
        raise OutputError(
            f"output {out} already exists.\nChoose another --out, or remove it yourself."
        )
    found = read_curves(curves)
    check(config, found)
    return Prepared(found, config, requests_of(config, config.seed), out)


def run_simulation(prepared: Prepared) -> Record:
    """Answer the question; the record is written last, where there is an `out`.

    Raises:
        OutputError: the record cannot be written.
    """
    answer = {"run": _run, "fleet": _fleet, "events": _events}[prepared.config.ask]
    curves = prepared.curves
    result = {
        "ask": prepared.config.ask,
        "curves": {"records": list(curves.origin), "notes": list(curves.notes)},
        **answer(prepared),
    }
    record = new_record(KIND, prepared.config, prepared.config.seed, result)
    record = replace(record, versions=record.versions | package_versions(PACKAGES))
    if prepared.out is not None:
        try:
            record.write(prepared.out)
        except OSError as error:
            raise OutputError(f"cannot write {prepared.out}: {error.strerror}") from error
    return record


def _run(prepared: Prepared) -> dict[str, Any]:
    from qsun.simulate.scenarios import plain_run

    config = prepared.config
    announce(f"{len(config.tasks)} tasks, {config.duration_s:g} s")
    return {"run": plain_run(config, prepared.curves, prepared.requests)}


def _fleet(prepared: Prepared) -> dict[str, Any]:
    from qsun.simulate.fleet import cases, size_fleet

    config = prepared.config
    asked = cases(config)
    found = [
        size_fleet(case, config, prepared.curves) for case in track(asked, "fleets", len(asked))
    ]
    return {"fleet": found}


def _events(prepared: Prepared) -> dict[str, Any]:
    from qsun.simulate.scenarios import episodes, play

    config = prepared.config
    asked = episodes(config)
    found = [play(one, config, prepared.curves) for one in track(asked, "episodes", len(asked))]
    return {"events": found}
