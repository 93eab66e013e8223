"""The README's table of faults under load, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import read_record

RECORDS = Path(__file__).parent / "records"
WORDS = {
    "kill_decode": "`kill -9` of a decode worker",
    "kill_prefill": "`kill -9` of a prefill worker",
    "freeze_decode": "a decode worker frozen for longer than a cache is kept",
    "freeze_prefill": "a prefill worker frozen for longer than a cache is kept",
    "failed_transfers": "every fetch of a cache fails",
    "expired_leases": "every fetch of a cache is held up until its lease has ended",
    "another_prefill_without_guard": "another module at a prefill worker's address, no guard",
    "another_decode_without_guard": "another module at a decode worker's address, no guard",
    "another_bundles_prefill": "another bundle's prefill worker at a prefill worker's address",
}


def table() -> str:
    """What became of the requests of each phase, and the totals that must be zero."""
    record = read_record(RECORDS / "serving-chaos.json", "serving-chaos")
    real, fake = record.result["real_workers"], record.result["fake_workers"]
    lines = [
        "| while clients ask | requests | answered | told an error | answered wrongly |",
        "|---|---|---|---|---|",
    ]
    for phase, counts in real["phases"].items():
        total, answered, wrong = sum(counts.values()), _answered(counts), counts.get("WRONG", 0)
        told = total - answered - wrong
        lines.append(f"| {WORDS[phase]} | {total} | {answered} | {told} | {wrong} |")
    at_rest = max(real["kv_blocks_in_use_at_rest"].values())
    faults = sum(fake["faults"].values())
    lines.append(
        f"\nTwo prefill and two decode workers of vLLM, SmolLM2-135M-Instruct, two tasks, on "
        f"{record.hardware['cores']} cores: {real['requests']} requests, {real['wrong']} wrong, "
        f"{real['empty']} empty, {real['hung']} past the deadline, {at_rest:.0%} of KV blocks in "
        f"use at rest. The same kinds of fault over fake workers, {fake['requests']:,} requests "
        f"and {faults} faults: {fake['right']:,} right, {fake['wrong']} wrong, {fake['empty']} "
        f"empty, {fake['hung']} past the deadline, the rest told an error. By `python -m "
        "tests.chaos`."
    )
    return "\n".join(lines) + "\n"


def _answered(counts: dict[str, Any]) -> int:
    """Answers that are the task's own, in every bit or but for a tie."""
    return sum(number for outcome, number in counts.items() if outcome.startswith("answered"))
