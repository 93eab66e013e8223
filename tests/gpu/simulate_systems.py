"""Make `docs/records/gpu-simulation.json`: the systems of `serve_systems`, simulated.

    python -m tests.gpu.simulate_systems RECORD LOADS

LOADS has the records that `serve_systems` leaves. Systems of one decode worker are simulated by
their curves under the loads that they were measured under, and compared. Then every decode worker
has a GPU of its own, which the measured systems share: who is quicker by how much there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.jobs.simulate import prepare_simulation, run_simulation
from qsun.records import new_record, read_record
from qsun.simulate.config import LayoutConfig, SimulateConfig
from tests.simulator_check import compared, workload_of

CHECKED = ("sun-1", "qsun-1")
LAYOUTS = (("isolated", 4), ("sun", 4), ("sun", 2), ("qsun", 4), ("qsun", 2))


@dataclass(frozen=True)
class Window:
    """Seconds that are simulated, and how many of them are not counted."""

    duration_s: float = 60.0
    warm_up_s: float = 10.0


def main() -> None:
    """Compare, then plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("loads", type=Path)
    asked = parser.parse_args()
    benches = sorted(asked.loads.glob("isolated-*-alpha-*.json"))
    result = {
        "checked": list(checked(asked.loads)),
        "a_gpu_a_decode_worker": [row for one in benches for row in planned(one, asked.loads)],
    }
    new_record("gpu-simulation", Window(), 0, result).write(asked.record)


def checked(loads: Path) -> Iterator[dict[str, Any]]:
    """Measured and simulated, load by load."""
    for system in CHECKED:
        curves = loads / f"latency-{system.partition('-')[0]}.json"
        for path in sorted(loads.glob(f"{system}-alpha-*.json")):
            measured = read_record(path, "bench").result
            (point,) = measured["points"]
            alpha = point["load"]["alpha"]
            yield {"system": system, "alpha": alpha} | compared(point, measured, curves)


def planned(bench: Path, loads: Path) -> Iterator[dict[str, Any]]:
    """What each layout makes of the load that a bench put on."""
    measured = read_record(bench, "bench").result
    (point,) = measured["points"]
    curves = [loads / f"latency-{name}.json" for name in ("sun", "qsun")]
    isolated: dict[str, float] = {}
    for system, decode in LAYOUTS:
        layout = LayoutConfig(
            system, decode_workers=decode, prefill_workers=1, shared_prefill=("all",)
        )
        config = SimulateConfig(
            tasks=tuple(measured["tasks"]),
            workload=workload_of(point["load"]),
            layout=layout,
            **asdict(Window()),
        )
        run = run_simulation(prepare_simulation(curves, config)).result["run"]
        found = {
            "tokens_per_s": run["tokens_per_s"],
            "tokens_per_s_per_decode_worker": run["tokens_per_s"] / decode,
            "tpot_p50_s": run["tpot_s"]["p50"],
            "tpot_p99_s": run["tpot_s"]["p99"],
        }
        isolated = isolated or found
        yield {
            "system": f"{system}-{decode}",
            "alpha": point["load"]["alpha"],
            **found,
            "to_isolated": {name: value / isolated[name] for name, value in found.items()},
        }


if __name__ == "__main__":
    main()
