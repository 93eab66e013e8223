"""The table of TPOT by decode batch, from the record of `tests/gpu/decode_tpot.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "decode-tpot.json"


def table() -> str:
    """One table a shape and context; the quickest of each batch in bold."""
    record = read_record(RECORD, "decode-tpot")
    sweeps = record.result["sweeps"]
    parts = []
    for shape in dict.fromkeys(one["shape"] for one in sweeps):
        own = [one for one in sweeps if one["shape"] == shape]
        contexts = sorted({row["context_tokens"] for one in own for row in one["tpot"]})
        parts += [_table(shape, own, context) for context in contexts]
    return "\n".join([*parts, _legend(record.result, sweeps)])


def _table(shape: str, sweeps: list[dict[str, Any]], context: int) -> str:
    times = {
        sweep["label"]: {
            row["batch"]: row for row in sweep["tpot"] if row["context_tokens"] == context
        }
        for sweep in sweeps
    }
    batches = sorted({batch for rows in times.values() for batch in rows})
    best = {
        batch: min(rows[batch]["tpot_s"] for rows in times.values())
        for batch in batches
        if all(batch in rows for rows in times.values())
    }
    lines = [
        f"| {shape}, {context} tokens of context | {' | '.join(map(str, batches))} |",
        f"|---|{'---|' * len(batches)}",
    ]
    for sweep in sweeps:
        rows = times[sweep["label"]]
        cells = [_cell(rows.get(batch), best.get(batch)) for batch in batches]
        lines.append(f"| {_name(sweep)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _name(sweep: dict[str, Any]) -> str:
    """The format and the kernel that it ran on."""
    kernels = ", ".join(one.removesuffix("LinearKernel") for one in sweep["kernels"])
    return f"{sweep['name']}, {kernels}" if kernels else str(sweep["name"])


def _cell(row: dict[str, Any] | None, best: float | None) -> str:
    if row is None:
        return ""
    shown = f"{1000 * row['tpot_s']:.2f}"
    floor = f" ({row['tpot_s'] / row['floor_s']:.1f})" if row.get("floor_s") else ""
    return f"**{shown}**{floor}" if row["tpot_s"] == best else shown + floor


def _legend(result: dict[str, Any], sweeps: list[dict[str, Any]]) -> str:
    one = sweeps[0]
    spread = max(
        abs(first / second - 1)
        for sweep in sweeps
        for row in sweep["tpot"]
        for first, second in [row["rounds_s"]]
    )
    return (
        f"TPOT in ms by decode batch, and in brackets how many times the floor: the bytes that a "
        f"step must read, at the {one['bytes_per_s'] / 1e12:.1f} TB/s of a plain read. vLLM "
        f"{one['vllm']} on one {one['accelerator']}, {result['weights']} as weights, groups of "
        f"128, median of {one['rounds']} x {one['steps']} steps; two rounds differ by at most "
        f"{100 * spread:.0f} %. Bold: the quickest of a batch at which all were "
        "measured. By `tests/gpu/decode_tpot.py`.\n"
    )
