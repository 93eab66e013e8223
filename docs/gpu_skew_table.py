"""Three systems on one GPU at every skew, from `docs/records/gpu-serving-systems.json`."""

from __future__ import annotations

from pathlib import Path

from gpu_systems_table import both_percentiles, name_of

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "gpu-serving-systems.json"


def table() -> str:
    """One row a system and skew."""
    rows = read_record(RECORD, "serving-systems").result["rows"]
    lines = [
        "| alpha | system | tokens/s | a decode worker | a worker | TPOT p50 / p99, ms "
        "| interactivity p50, tokens/s | TTFT p50 / p99, ms | mean batches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: one["alpha"]):
        batches = ", ".join(f"{one:.0f}" for one in row["mean_batch"].values())
        lines.append(
            f"| {row['alpha']:g} | {name_of(row['system'])} | {row['tokens_per_s']:,.0f} "
            f"| {row['tokens_per_s_per_decode_worker']:,.0f} "
            f"| {row['tokens_per_s_per_worker']:,.0f} "
            f"| {both_percentiles(row, 'tpot')} | {row['interactivity_p50_tokens_per_s']:.0f} "
            f"| {both_percentiles(row, 'ttft')} | {batches} |"
        )
    return "\n".join(lines) + "\n"
