"""The README's table of what to calibrate on, from `docs/records/ablation-smollm2.json`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "ablation-smollm2.json"
KINDS = {
    "whole texts": "whole texts, read by the decoder alone (the control)",
    "responses, base model's cache": "response positions, cache of the base model",
    "responses, P's cache": "response positions, caches of the prefill modules",
    "responses, P's cache, some whole": "**the same, and some whole texts (the default)**",
}


def table() -> str:
    """Loss above full precision by what 3-bit codes were calibrated on, and by how much of it."""
    record = read_record(RECORD, "ablation")
    result, machine = record.result, record.hardware
    plain = [one for one in result["variants"].values() if not one["variant"]["settings"]]
    sizes = sorted({one["variant"]["samples"] for one in plain})
    columns = [f"math, {size} samples" for size in sizes] + ["tools", "code (unseen)", "perplexity"]
    lines = [
        f"| 3 bits, calibrated on | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind, label in KINDS.items():
        by_size = {size: _found(plain, kind, size) for size in sizes}
        cells = [_above(by_size[size], "math", result) for size in sizes]
        cells += [_above(by_size[sizes[-1]], task, result) for task in ("tools", "code")]
        cells.append(f"{fmean(one['perplexity'] for one in by_size[sizes[-1]]):.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines.append(
        f"\nNats a response token above full precision (math {_full(result, 'math')}, tools "
        f"{_full(result, 'tools')}, code {_full(result, 'code')}; perplexity "
        f"{result['full_precision']['perplexity']:.1f}), behind each task's prefill module, with "
        f"the least and the most of three draws of the samples; tools, code and perplexity with "
        f"{sizes[-1]}. Calibrated on math and tools alone. By `tests/ablation.py` on one "
        f"{machine['accelerator']}, which has 4 and 2 bits, single tasks and settings too."
    )
    return "\n".join(lines) + "\n"


def _found(variants: list[dict[str, Any]], kind: str, samples: int) -> list[dict[str, Any]]:
    wanted = {"bits": 3, "samples": samples, "kind": kind, "task": None}
    return [one for one in variants if wanted.items() <= one["variant"].items()]


def _above(found: list[dict[str, Any]], task: str, result: dict[str, Any]) -> str:
    full = result["full_precision"]["loss"][task]
    values = [one["loss"][task] - full for one in found]
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _full(result: dict[str, Any], task: str) -> str:
    return f"{result['full_precision']['loss'][task]:.3f}"
