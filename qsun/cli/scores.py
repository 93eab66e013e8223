"""Scores: what `qsun evaluate` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.cli.output import table

if TYPE_CHECKING:
    from qsun.jobs.prepare_evaluate import PreparedEvaluation

# Which differences a person asks for first; a record has every pair.
SHOWN_PAIRS = {
    ("qsun", "sun"),
    ("qsun", "qsun-post"),
    ("qsun-post", "sun"),
    ("sun", "full-ft"),
    ("awq-full-ft", "full-ft"),
    ("naive", "full-ft"),
    ("qsun", "awq-full-ft"),
    ("sun", "base"),
    ("qsun-post", "base"),
    ("qsun", "base"),
}


def plan_of_evaluation(prepared: PreparedEvaluation) -> str:
    """What would be evaluated: each test set's systems."""
    limit = prepared.request.limit
    rows = [[test, ", ".join(systems)] for test, systems in prepared.planned.items()]
    each = "all samples" if limit is None else f"at most {limit} samples"
    return "\n".join([table(["test set", "systems"], rows), f"{each} of each test set"])


def scorecard_text(result: Mapping[str, Any], path: Path) -> str:
    """Every system's accuracy and lengths, what differs for sure, and what to be warned of."""
    rows = [
        [
            f"{test} {name}",
            _accuracy(one),
            str(one["total"]),
            _number(one["mean_tokens"], "{:.0f}"),
            _number(one["invalid"], "{:.1%}"),
            _number(one["unfinished"], "{:.1%}"),
            _number(one["tokens_per_second"], "{:.0f}"),
        ]
        for test, systems in result["systems"].items()
        for name, one in systems.items()
    ]
    header = ["", "accuracy (95 %)", "samples", "tokens", "invalid", "cut off", "tokens/s"]
    lines = [table(header, rows)]
    shown = [one for one in result["pairs"] if (one["first"], one["second"]) in SHOWN_PAIRS]
    if shown:
        lines += ["", table(["difference", "points (95 %)", "p"], [_pair(one) for one in shown])]
    if result.get("compared"):
        rows = [_pair(one) for one in result["compared"]]
        lines += ["", table(["against the earlier scorecard", "points (95 %)", "p"], rows)]
    lines += ["", *_tpot(result["tpot"])]
    lines += [f"WARNING: {one}" for one in result["warnings"]]
    return "\n".join([*lines, f"written to {path}"])


def _accuracy(one: Mapping[str, Any]) -> str:
    if one["interval_95"] is None:
        return f"{one['accuracy']:.4f}"
    low, high = one["interval_95"]
    return f"{one['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _pair(one: Mapping[str, Any]) -> list[str]:
    low, high = one["interval_95"]
    points = f"{100 * one['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [f"{one['test']}: {one['first']} - {one['second']}", points, _number(one["p"], "{:.2g}")]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _tpot(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["TPOT: not measured"]
    if not found["measured"]:
        return [f"TPOT: not measured: {found['reason']}"]
    return [
        f"TPOT, {one['streams']} streams: {one['ratio']:.2f} of the full-precision base model's"
        for one in found["by_streams"]
    ]
