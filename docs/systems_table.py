"""The README's table of systems, from `docs/records/sun-comparison.json`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qsun.records import Record, read_record
from qsun.tasks.accuracy import Accuracy

RECORD = Path(__file__).parent / "records" / "sun-comparison.json"
# Column: its head, the task, which of the task's budgets, and the test set.
COLUMNS = {
    "math, 32,000 rows": ("math", 0, "seen"),
    "math, all rows twice": ("math", 1, "seen"),
    "tools, simple": ("tools", 0, "simple"),
    "tools, multiple": ("tools", 0, "multiple"),
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
TESTED = {"full-ft": "full-ft", "sun": "sun", "sun-lora": "sun"}
TRIED = {"boundary n": "sun-boundary-n", "half KL from full-ft": "sun-mix"}
Trainings = list[dict[str, Any]]


def table() -> str:
    """Accuracy per system and test, over all seeds that were trained."""
    record = read_record(RECORD, "comparison")
    lines = [
        f"| SmolLM2-135M-Instruct | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, (group, system) in ROWS.items():
        cells = " | ".join(
            _accuracy(_finals(record, task, group, number), system, test)
            for task, number, test in COLUMNS.values()
        )
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, "", *_notes(record)]) + "\n"


def _finals(record: Record, task: str, group: str, number: int) -> Trainings:
    """A group's trainings with one of the task's budgets, at the rate that was chosen."""
    return _trained(record, task, group, *record.result["budgets"][task]["finals"][number])


def _trained(
    record: Record,
    task: str,
    group: str,
    samples: int | None,
    epochs: int,
    rate: float | None = None,
) -> Trainings:
    """A group's tested trainings of one budget and rate: those of the seeds above 0."""
    rate = record.result["chosen"][task][group] if rate is None else rate
    return [
        training
        for name, training in record.result["trainings"].items()
        if training["seed"]
        and name.startswith(f"{task}-{group}-{rate:g}-")
        and (training["samples"], training["epochs"]) == (samples, epochs)
    ]


def _accuracy(trainings: Trainings, system: str, test: str) -> str:
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


def _notes(record: Record) -> Iterable[str]:
    accelerator = _finals(record, "math", "sun", 0)[0]["hardware"]["accelerator"]
    yield (
        "Right answers in %: the mean of the seeds with the least and the best, or one seed's with "
        "Wilson's 95 % interval. Systems of a column have equal budgets, tools all rows "
        f"{record.result['budgets']['tools']['finals'][0][1]} times. Learning rates were chosen "
        "with another seed on validation rows: math by loss, tools by right answers. Math is "
        "tested on templates that were trained on, with other names and numbers. On one "
        f"{accelerator} each, by `tests/gpu/compare_systems.py`."
    )
    yield f"\nTried on math: {'; '.join(_tried_on_math(record))}."
    yield f"\nTried on tools (simple, multiple): {_least_loss_on_tools(record)}."
    yield f"\n{_validation_on_tools(record)} {_held_out(record)} {_code_losses(record)}"


def _tried_on_math(record: Record) -> Iterable[str]:
    budgets = record.result["budgets"]["math"]
    for name, group in TRIED.items():
        yield f"{name} {_accuracy(_finals(record, 'math', group, 0), 'sun', 'seen')}"
    for group, (samples, epochs) in budgets["tried"]:
        trained = _trained(record, "math", group, samples, epochs)
        if group in SHORT and trained:
            accuracy = _accuracy(trained, TESTED[group], "seen")
            yield f"{SHORT[group]} with {samples:,} rows {accuracy}"


def _least_loss_on_tools(record: Record) -> str:
    """SUN at the rate that validation loss would have chosen."""
    samples, epochs = record.result["budgets"]["tools"]["finals"][0]
    choosing = _choosing_on_tools(record, "sun")
    best = min(choosing, key=lambda one: one["validation_loss"]["sun"])
    rate = best["learning_rate"]
    trained = _trained(record, "tools", "sun", samples, epochs, rate)
    cells = ", ".join(_accuracy(trained, "sun", test) for test in ("simple", "multiple"))
    return f"SUN's full module at the learning rate of the least validation loss, {rate:g}, {cells}"


def _validation_on_tools(record: Record) -> str:
    """Right answers on tools' validation rows, which are of the categories trained on."""
    shares = ", ".join(
        f"{SHORT[group]} {100 * max(map(_validated, _choosing_on_tools(record, group))):.1f}"
        for group in SHORT
    )
    return f"Right answers on tools' validation rows, whose categories were trained on: {shares}."


def _choosing_on_tools(record: Record, group: str) -> Trainings:
    return [
        training
        for name, training in record.result["trainings"].items()
        if name.startswith(f"tools-{group}-{training['learning_rate']:g}-")
        and not training["seed"]
        and _validated(training)
    ]


def _validated(training: dict[str, Any]) -> float:
    evaluations = training.get("evaluations") or [{}]
    return float(evaluations[-1].get("eval_accuracy", 0.0))


def _held_out(record: Record) -> str:
    """How far any system got on templates that no training row used."""
    shares = [
        100 * scored["held-out"]["correct"] / scored["held-out"]["total"]
        for name, training in record.result["trainings"].items()
        if name.startswith("math-")
        for scored in training["tests"].values()
    ]
    return f"Math templates that no row used: no system and seed above {max(shares):.1f}."


def _code_losses(record: Record) -> str:
    """The least validation loss of each system on code, for each number of epochs."""
    losses: dict[tuple[int, str], float] = {}
    for name, training in record.result["trainings"].items():
        if name.startswith("code-"):
            lora = " LoRA" if "-lora" in name else ""
            for system, loss in training["validation_loss"].items():
                key = training["epochs"], system if system == "base" else system + lora
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
    return f"Code, loss of a held-out token (nats): {shown}. {_human_eval(record)}"


def _human_eval(record: Record) -> str:
    """The least and the best share of HumanEval that any system solved."""
    solved = [
        100 * scored["humaneval"]["accuracy"]
        for name, training in record.result["trainings"].items()
        if name.startswith("code-")
        for scored in training["tests"].values()
    ]
    return (
        f"HumanEval: {min(solved):.1f} to {max(solved):.1f} % of its 164 problems solved, base "
        "model and all, too few to tell systems apart."
    )
