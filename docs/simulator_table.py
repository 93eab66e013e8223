"""The README's table of how near the simulator comes, from `docs/records/simulator-check.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "simulator-check.json"
MILLI = 1000.0


def table() -> str:
    """Measured and simulated TPOT, throughput and TTFT of every load."""
    record = read_record(RECORD, "simulator-check")
    machine = record.hardware
    lines = [
        "| load | TPOT, ms: measured, simulated | tokens/s: measured, simulated "
        "| TTFT, ms: measured, simulated |",
        "|---|---|---|---|",
    ]
    for one in record.result["loads"]:
        cells = [
            _pair(one, "tpot_s", MILLI),
            _pair(one, "tokens_per_s", 1.0),
            _pair(one, "ttft_s", MILLI),
        ]
        lines.append(f"| {_load(one['load'])} | {' | '.join(cells)} |")
    lines.append(
        f"\nMeans; one prefill and one decode worker of vLLM, SmolLM2-135M-Instruct, "
        f"{machine['cores']} cores ({machine['processor']}), by `tests/simulator_check.py`. The "
        "simulator knows the curves alone: here both workers compute on the same cores, and a "
        "prompt that is read while others are answered takes longer than one that is read alone."
    )
    return "\n".join(lines) + "\n"


def _pair(one: dict[str, Any], name: str, scale: float) -> str:
    measured, simulated = scale * one["measured"][name], scale * one["simulated"][name]
    ratio = one["simulated_of_measured"][name]
    return f"{measured:.3g}, {simulated:.3g} ({100 * (ratio - 1):+.0f} %)"


def _load(load: dict[str, Any]) -> str:
    if load["concurrency"] is not None:
        return f"{load['concurrency']} user(s), closed loop"
    return f"{load['rate_per_s']:g} requests/s"
