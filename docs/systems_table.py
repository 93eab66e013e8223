"""The README's table of systems, from `docs/records/sun-comparison.json`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qsun.records import Record, read_record
from qsun.tasks.accuracy import Accuracy

RECORD = Path(__file__).parent / "records" / "sun-comparison.json"
TESTS = {
    "math": ("seen", "held-out"),
    "tools": ("simple", "multiple"),
}
# Row: the group of trainings it is taken from, and the system that was tested in them.
ROWS = {
    "base model": ("full-ft", "base"),
    "full fine-tuning, a decoder per task": ("full-ft", "full-ft"),
    "naive: its prefill, the base decoder": ("full-ft", "naive"),
    "**SUN**, full prefill module": ("sun", "sun"),
    "**SUN**, LoRA prefill module, rank 64": ("sun-lora", "sun"),
    "**SUN**, LoRA prefill module, rank 8": ("sun-lora-r8", "sun"),
}
TRIED = {"boundary n": "sun-boundary-n", "half KL from full-ft": "sun-mix"}


def table() -> str:
    """Accuracy per system and test, over all seeds that were trained."""
    record = read_record(RECORD, "comparison")
    columns = [(task, test) for task, tests in TESTS.items() for test in tests]
    header = " | ".join(f"{task}, {test}" for task, test in columns)
    lines = [f"| SmolLM2-135M-Instruct | {header} |", "|---" * (len(columns) + 1) + "|"]
    for name, (group, system) in ROWS.items():
        cells = " | ".join(_cell(record, task, group, system, test) for task, test in columns)
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, "", *_notes(record)]) + "\n"


def _cell(record: Record, task: str, group: str, system: str, test: str) -> str:
    found = [
        Accuracy(scored["correct"], scored["total"])
        for scored in (
            training["tests"].get(system, {}).get(test) for training in _finals(record, task, group)
        )
        if scored is not None
    ]
    if not found:
        return "not yet"
    pooled = Accuracy(sum(one.correct for one in found), sum(one.total for one in found))
    low, high = pooled.interval
    seeds = f", {len(found)} seeds" if len(found) > 1 else ""
    return f"{100 * pooled.share:.1f} ({100 * low:.1f} to {100 * high:.1f}{seeds})"


def _finals(record: Record, task: str, group: str) -> list[dict[str, Any]]:
    """A group's trainings with the whole budget: those of the seeds above 0."""
    trainings: dict[str, dict[str, Any]] = record.result["trainings"]
    start = f"{task}-{group}-"
    return [
        training
        for name, training in trainings.items()
        if training["seed"] and name.startswith(start) and name[len(start)].isdigit()
    ]


def _notes(record: Record) -> Iterable[str]:
    final = _finals(record, "math", "sun")[0]
    yield (
        f"Right answers in %, with Wilson's 95 % interval over all tests of all seeds. Equal "
        f"budgets: math {final['samples']} rows once, tools all rows "
        f"{_epochs(record, 'tools')} times; learning rates chosen among three by validation loss. "
        f"On one {final['hardware']['accelerator']} each, by `tests/gpu/compare_systems.py`."
    )
    tried = "; ".join(
        f"{name} {_cell(record, 'math', group, 'sun', 'seen')}" for name, group in TRIED.items()
    )
    losses = _code_losses(record)
    yield f"\nTried on math, seen templates: {tried}. {losses}"


def _epochs(record: Record, task: str) -> int:
    return int(_finals(record, task, "full-ft")[0]["epochs"])


def _code_losses(record: Record) -> str:
    """The least validation loss of each system on code."""
    losses: dict[str, float] = {}
    for name, training in record.result["trainings"].items():
        if name.startswith("code-") and not name.startswith("code-sun-lora"):
            for system, loss in training["validation_loss"].items():
                losses[system] = min(loss, losses.get(system, loss))
    shown = ", ".join(
        f"{system} {losses[system]:.3f}" for system in sorted(losses, key=losses.__getitem__)
    )
    return f"Code, loss of a held-out token (nats) after one epoch: {shown}."
