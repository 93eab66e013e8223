"""The README's table of errors along the output, from `docs/records/length-drift.json`."""

from __future__ import annotations

from pathlib import Path

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "length-drift.json"


def table() -> str:
    """Each decoder's divergence in the first and last quarter of the output."""
    result = read_record(RECORD, "length-drift").result
    lines = [
        "| decode module | KL, first quarter | KL, last quarter | growth |",
        "|---|---|---|---|",
    ]
    for label, curve in result["curves"].items():
        kl, quarter = curve["kl"], len(curve["kl"]) // 4
        first, last = sum(kl[:quarter]) / quarter, sum(kl[-quarter:]) / quarter
        lines.append(f"| {label} | {first:.3f} | {last:.3f} | {curve['growth']:.2f} |")
    lines.append(
        f"\nNats a token from the full-precision decoder, over {result['texts']} outputs of "
        f"{result['tokens']} tokens that it generated behind the {result['task']} module's cache; "
        "each decoder keeps its own cache of the output. By `tests/length_drift_curve.py`; "
        "[curves](docs/records/length-drift.svg)."
    )
    return "\n".join(lines) + "\n"
