"""What a record keeps of each system's bench, and systems beside each other at the same skew."""

from __future__ import annotations

from typing import Any

from qsun.records import Record

PATHS = {
    "tokens_per_s": ("tokens_per_s",),
    "tokens_per_s_per_decode_worker": ("tokens_per_s_per_decode_worker",),
    "tokens_per_s_per_worker": ("tokens_per_s_per_worker",),
    "tpot_p50_s": ("tpot_s", "p50"),
    "tpot_p99_s": ("tpot_s", "p99"),
    "ttft_p50_s": ("ttft_s", "p50"),
    "ttft_p99_s": ("ttft_s", "p99"),
    "interactivity_p50_tokens_per_s": ("interactivity_tokens_per_s", "p50"),
    "goodput_per_s": ("goodput_per_s",),
    "fairness": ("fairness",),
}
COUNTS = ("sent", "answered", "failed", "failures", "steady", "window_s")
COMPARED = ("tokens_per_s", "interactivity_p50_tokens_per_s", "tpot_p50_s", "ttft_p50_s")


def figures_of(record: Record, system: str, alpha: float | None) -> dict[str, Any]:
    """One bench's figures; seconds, tokens, and what is per second."""
    result = record.result
    (run,) = result["points"][0]["runs"]
    return {
        "system": system,
        "alpha": alpha,
        "decode": result["decode"],
        "policy": result["policy"],
        "workers": result["workers"],
        **{name: _at(run, path) for name, path in PATHS.items()},
        "mean_batch": {name: one["mean_batch"] for name, one in run["by_worker"].items()},
        **{name: run[name] for name in COUNTS},
    }


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row over the isolated one of its alpha, and a qsun row over sun's with as many workers.

    A ratio is left out where either figure is missing or zero.
    """
    by_name = {(row["system"], row["alpha"]): row for row in rows}
    found = []
    for row in rows:
        kind, _, decode = row["system"].partition("-")
        others = [name for name, alpha in by_name if alpha == row["alpha"]]
        isolated = [name for name in others if name.startswith("isolated-")]
        against = isolated if kind != "isolated" else []
        against += [f"sun-{decode}"] if kind == "qsun" and f"sun-{decode}" in others else []
        for name in against:
            other = by_name[name, row["alpha"]]
            ratios = {key: row[key] / other[key] for key in COMPARED if row[key] and other[key]}
            found.append({"system": row["system"], "to": name, "alpha": row["alpha"], **ratios})
    return found


def _at(run: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = run
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)
