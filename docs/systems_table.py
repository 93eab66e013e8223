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
SHORT = {"full-ft": "full fine-tuning", "sun": "SUN", "sun-lora": "SUN LoRA"}
GROUP_SYSTEM = {"full-ft": "full-ft", "sun": "sun", "sun-lora": "sun"}
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
    return _accuracy(_finals(record, task, group), system, test)


def _accuracy(trainings: Iterable[dict[str, Any]], system: str, test: str) -> str:
    """The mean over seeds with the least and the best, or one seed's with Wilson's interval."""
    found = [
        Accuracy(scored["correct"], scored["total"])
        for training in trainings
        if (scored := training["tests"].get(system, {}).get(test)) is not None
    ]
    if not found:
        return "not yet"
    shares = [100 * one.share for one in found]
    if len(found) > 1:
        mean = sum(shares) / len(shares)
        return f"{mean:.1f} ({min(shares):.1f} to {max(shares):.1f}, {len(found)} seeds)"
    low, high = found[0].interval
    return f"{shares[0]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _finals(record: Record, task: str, group: str) -> list[dict[str, Any]]:
    """A group's trainings with the whole budget."""
    return _trained(record, task, group, *record.result["budgets"][task]["final"])


def _trained(
    record: Record, task: str, group: str, samples: int | None, epochs: int
) -> list[dict[str, Any]]:
    """A group's tested trainings of one budget: those of the seeds above 0."""
    trainings: dict[str, dict[str, Any]] = record.result["trainings"]
    start = f"{task}-{group}-"
    return [
        training
        for name, training in trainings.items()
        if training["seed"]
        and name.startswith(start)
        and name[len(start)].isdigit()
        and (training["samples"], training["epochs"]) == (samples, epochs)
    ]


def _notes(record: Record) -> Iterable[str]:
    budgets = record.result["budgets"]
    final = _finals(record, "math", "sun")[0]
    yield (
        "Right answers in %: the mean of the seeds with the least and the best, or one seed's with "
        f"Wilson's 95 % interval. Equal budgets: math {budgets['math']['final'][0]} rows once, "
        f"tools all rows {budgets['tools']['final'][1]} times; learning rates chosen among three "
        "by validation loss, with another seed. On one "
        f"{final['hardware']['accelerator']} each, by `tests/gpu/compare_systems.py`."
    )
    tried = [
        f"{name} {_cell(record, 'math', group, 'sun', 'seen')}" for name, group in TRIED.items()
    ]
    tried += [
        f"{SHORT[group]} with {samples} rows, {epochs} epoch(s): "
        f"{_accuracy(trained, GROUP_SYSTEM[group], 'seen')}"
        for group, (samples, epochs) in budgets["math"]["tried"]
        if group in SHORT and (trained := _trained(record, "math", group, samples, epochs))
    ]
    yield f"\nTried on math, seen templates: {'; '.join(tried)}. {_code_losses(record)}"


def _code_losses(record: Record) -> str:
    """The least validation loss of each system on code, for each number of epochs."""
    losses: dict[tuple[int, str], float] = {}
    for name, training in record.result["trainings"].items():
        if name.startswith("code-") and "-lora" not in name:
            for system, loss in training["validation_loss"].items():
                key = training["epochs"], system
                losses[key] = min(loss, losses.get(key, loss))
    shown = "; ".join(
        f"{epochs} epoch(s) "
        + ", ".join(
            f"{system} {loss:.3f}"
            for (of, system), loss in sorted(losses.items(), key=lambda item: item[1])
            if of == epochs
        )
        for epochs in sorted({epochs for epochs, _ in losses})
    )
    return f"Code, loss of a held-out token (nats): {shown}."
