"""The README's table of what the router costs, from `docs/records/serving-overhead.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "serving-overhead.json"
QSUN, OTHER = "qsun", "vllm-router"


def table() -> str:
    """Time added to first bytes and processor time when paced; chunks a core when not; memory."""
    record = read_record(RECORD, "serving-overhead")
    result = record.result
    other = f"{OTHER} {result['versions'][OTHER]}"
    lines = [f"| router alone on one core | qsun | {other} |", "|---|---|---|"]
    for at in result["paced"]:
        load = at["load"]
        name = f"{streams(load)} at {load['chunks_per_s']:g} chunks/s each"
        lines.append(
            f"| {name}: added to the first byte, p50 / p99, ms "
            f"| {added(at, QSUN)} | {added(at, OTHER)} |"
        )
        lines.append(f"| processor time, of one core | {share(at, QSUN)} | {share(at, OTHER)} |")
    for at in result["unpaced"]:
        mine, others = (at["systems"][one]["chunks_per_core_s"] for one in (QSUN, OTHER))
        lines.append(
            f"| {streams(at['load'])} as fast as can be: chunks/s a core "
            f"| {mine:,.0f} ({at['of_vllm_router']:.2f} of the other) | {others:,.0f} |"
        )
    memory = result["memory"]
    begun = record.config["growth_from"] * record.config["growth"]["requests"]
    lines.append(
        f"| memory after {memory[QSUN]['requests']:,} requests, MiB (since the first {begun:,}) "
        f"| {held(memory[QSUN])} | {held(memory[OTHER])} |"
    )
    missed = [goal for goal in result["goals"] if not goal["met"]]
    met = len(result["goals"]) - len(missed)
    names = "; ".join(f"{goal['name']} {goal['found']:.2f}" for goal in missed)
    lines.append(
        f"\nOver fake workers, beside the same requests without a router, "
        f"{record.config['repeats']} repeats in turn in one run, {record.hardware['cores']} cores, "
        f"by `make overhead`. Goals met: {met} of {len(result['goals'])}"
        f"{f' (missed: {names})' if names else ''}."
    )
    return "\n".join(lines) + "\n"


def streams(load: dict[str, Any]) -> str:
    """How many at once."""
    return f"{load['streams']} stream{'s' if load['streams'] > 1 else ''}"


def added(at: dict[str, Any], system: str) -> str:
    """Milliseconds that a router adds."""
    one = at["systems"][system]
    return f"{one['added_p50_ms']:.2f} / {one['added_p99_ms']:.2f}"


def share(at: dict[str, Any], system: str) -> str:
    """Processor time, of one core's."""
    return f"{at['systems'][system]['cpu_share']:.1%}"


def held(memory: dict[str, Any]) -> str:
    """Memory at the end, and its growth since the first requests."""
    return f"{memory['resident_mib'][-1]:.0f} ({memory['growth'] - 1:+.1%})"
