"""Measure a served bundle, simulate it by its own curves, and compare.

    python -m tests.simulator_check RECORD BUNDLE [--rates 1,2] [--users 1,4] [--seconds 60]

One prefill and one decode worker of real vLLM; on processors they share the cores, which the
simulator does not know. SmolLM2's bundle has both tasks on one prefill worker. `qsun bench`
measures the curves and then the loads; `qsun simulate` gets the curves, and the same requests.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from qsun.bench.curves import CurveConfig
from qsun.bench.serving import served
from qsun.bench.settings import BenchConfig
from qsun.jobs.bench import Request, run_bench, run_curves
from qsun.jobs.simulate import prepare_simulation, run_simulation
from qsun.progress import announce
from qsun.records import new_record
from qsun.settings import settings_from
from qsun.simulate.config import LayoutConfig, SimulateConfig
from qsun.workload import Workload

PROMPT, OUTPUT = "uniform:16:96", "uniform:16:64"
CURVES = CurveConfig(batches=(1, 2, 3, 4), contexts=(96,), prompts=(16, 56, 96), steps=24, rounds=5)
COMPARED = {"tokens_per_s": None, "tpot_s": "mean", "ttft_s": "mean", "request_s": "mean"}


def main() -> None:
    """Serve, measure, simulate, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rates", default="0.5,1")
    parser.add_argument("--users", default="1,4")
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    settings = BenchConfig(
        rates=tuple(map(float, filter(None, asked.rates.split(",")))),
        concurrency=tuple(map(int, filter(None, asked.users.split(",")))),
        prompt_tokens=PROMPT,
        output_tokens=OUTPUT,
        seconds=asked.seconds,
        repeats=1,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with served(asked.bundle.absolute(), ["--decode", "1"]) as url:
            request = Request(url)
            curves = run_curves(request, CURVES, folder / "latency.json", 0).result
            measured = run_bench(request, settings, folder / "bench", False).result
        found = [compared(point, measured, folder / "latency.json") for point in measured["points"]]
    result = {"curves": curves, "workers": measured["workers"], "loads": found}
    new_record("simulator-check", settings, settings.seed, result).write(asked.record)
    for one in found:
        announce(f"{one['load']}: {one['simulated_of_measured']}")


def compared(point: dict[str, Any], measured: dict[str, Any], curves: Path) -> dict[str, Any]:
    """One load, as measured, as simulated by a latency record, and the one's share of the other."""
    load = {key: point["load"][key] for key in ("rate_per_s", "concurrency")}
    (run,) = point["runs"]
    config = SimulateConfig(
        tasks=tuple(measured["tasks"]),
        workload=workload_of(point["load"]),
        layout=LayoutConfig(
            system=measured["system"],
            decode_workers=measured["workers"]["decode"],
            prefill_workers=measured["workers"]["prefill"],
            shared_prefill=("all",),
        ),
        duration_s=run["window_s"][1],
        warm_up_s=run["window_s"][0],
        seed=point["load"]["seed"],
    )
    simulated = run_simulation(prepare_simulation([curves], config)).result["run"]
    pairs = {name: [value(run, name), value(simulated, name)] for name in COMPARED}
    return {
        "load": load,
        "measured": {name: pair[0] for name, pair in pairs.items()},
        "simulated": {name: pair[1] for name, pair in pairs.items()},
        "simulated_of_measured": {name: pair[1] / pair[0] for name, pair in pairs.items()},
        "steady": run["steady"],
        "failed": run["failed"],
    }


def workload_of(load: dict[str, Any]) -> Workload:
    """The same requests as a bench's load."""
    return settings_from(Workload, {name: load[name] for name in load if name in vars(Workload())})


def value(figures: dict[str, Any], name: str) -> float:
    """A figure, or its mean."""
    part = COMPARED[name]
    return float(figures[name] if part is None else figures[name][part])


if __name__ == "__main__":
    main()
