"""What a bench has found, as text a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.cli.output import table

MILLI = 1000.0
LATE_S = 0.05  # requests of an open loop that are sent later make another load


def bench_text(result: dict[str, Any], path: Path) -> str:
    """A row for every load, and what there is to say of the runs."""
    rows = [_row(point) for point in result["points"]]
    header = [
        "load",
        "tokens/s",
        "a decode worker",
        "good/s",
        "TTFT p50 p99",
        "TPOT p50 p99",
        "fair",
    ]
    workers = ", ".join(f"{count} {role}" for role, count in result["workers"].items())
    lines = [
        f"{result['system']}: {result['decode']}, policy {result['policy']}, workers: {workers}",
        table(header, rows),
        "times in ms",
    ]
    for point in result["points"]:
        lines += [f"{_label(point['load'])}: {one}" for one in _remarks(point["runs"])]
    if result["missing"]:
        lines.append(f"NOT FINISHED, missing: {', '.join(result['missing'])}")
    return "\n".join([*lines, f"record: {path}"])


def curves_text(result: dict[str, Any], path: Path) -> str:
    """TPOT by batch and context, prefill by prompt."""
    tpot = [
        [str(one["batch"]), str(one["context_tokens"]), f"{MILLI * one['tpot_s']:.2f}"]
        for one in result["tpot"]
    ]
    prefill = [
        [str(one["prompt_tokens"]), f"{MILLI * one['seconds']:.1f}"] for one in result["prefill"]
    ]
    return "\n".join(
        [
            f"decode module: {result['decode']}",
            table(["batch", "context", "TPOT, ms"], tpot),
            table(["prompt", "prefill, ms"], prefill),
            f"hand-off: {MILLI * result['hand_off_s']:.1f} ms",
            f"record: {path}",
        ]
    )


def _row(point: dict[str, Any]) -> list[str]:
    found = point["summary"]

    def cell(name: str, scale: float = 1.0) -> str:
        return _short(scale * found[name]["mean"]) if name in found else "-"

    return [
        _label(point["load"]),
        cell("tokens_per_s"),
        cell("tokens_per_s_per_decode_worker"),
        cell("goodput_per_s"),
        f"{cell('ttft_p50_s', MILLI)} {cell('ttft_p99_s', MILLI)}",
        f"{cell('tpot_p50_s', MILLI)} {cell('tpot_p99_s', MILLI)}",
        cell("fairness"),
    ]


def _short(value: float) -> str:
    """Three digits, more before the point where there are."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _label(load: dict[str, Any]) -> str:
    if load["trace"] is not None:
        return f"trace, {load['trace']}"
    users = load["concurrency"]
    what = f"{load['rate_per_s']:g}/s" if users is None else f"{users} users"
    return f"{what}, alpha {load['alpha']:g}"


def _remarks(runs: list[dict[str, Any]]) -> list[str]:
    """What keeps the figures from saying what they seem to say."""
    found = []
    unsteady = sum(not run["steady"] for run in runs)
    if unsteady:
        found.append(f"{unsteady} of {len(runs)} runs never became steady: too much load, or short")
    failures: dict[str, int] = {}
    for run in runs:
        for reason, number in run["failures"].items():
            failures[reason] = failures.get(reason, 0) + number
    found += [f"{number} requests failed: {reason}" for reason, number in failures.items()]
    late = [run["late_s"]["p99"] for run in runs if run["late_s"]]
    if late and max(late) > LATE_S:
        found.append(f"sent up to {MILLI * max(late):.0f} ms late (p99): this machine is too busy")
    return found
