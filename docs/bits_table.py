"""The README's tables of the seven systems at 4, 3 and 2 bits, from `docs/records/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bits_samples import BITS, TESTS, Comparison, Estimate

from qsun.records import read_record

RECORDS = Path(__file__).parent / "records"
SMOLLM2 = Comparison(RECORDS / "bits-comparison.json")
QWEN3 = Comparison(RECORDS / "bits-comparison-qwen3.json")
# One of its trainings: of all, it alone says what the tests have in common with the rows.
QWEN3_TUNING = RECORDS / "tuning-qwen3-math-sun.json"
UNTIED = "math.held-out"
DENSE = {
    "base": "base model",
    "full-ft": "full fine-tuning, a decoder per task",
    "naive": "naive: its prefill, the base decoder",
    "sun": "**SUN**: tuned prefill, the base decoder",
}
LOW_BIT = {
    "awq-full-ft": "full fine-tuning, each decoder by AWQ",
    "qsun-post": "SUN's prefill on the quantized decoder",
    "qsun": "**QSUN**: prefill tuned on it",
}
VARIANTS = {
    "lora": "LoRA rank 64 instead of all weights",
    "kl": "KL from full-ft",
    "mix": "half KL",
}
# QSUN's right answers: of SUN's, and at 2 bits also over those of SUN's prefill there.
GOALS = {"w4": 0.99, "w3": 0.97, "w2": 0.90}
GOAL_LEAD = 0.10


def table() -> str:
    """Both models' tables, each with what is to be known of it."""
    parts = [
        _rows(SMOLLM2, "SmolLM2-135M-Instruct", ("math", "tools")),
        _legend(SMOLLM2),
        f"{_goals()} {_reached(SMOLLM2, ('math', 'tools'))}",
        _tried(SMOLLM2),
        _rows(QWEN3, "small Qwen3, from scratch", ("math",)),
        _known_already(QWEN3),
        _reached(QWEN3, ("math",)),
        _left_out(QWEN3),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(found: Comparison, model: str, tasks: Sequence[str]) -> str:
    """Systems down, tasks across."""
    rows = [[text, *_cells(found, tasks, system)] for system, text in DENSE.items()]
    for bits in BITS:
        rows += [
            [f"{bits[1]} bits: {text}", *_cells(found, tasks, system, bits)]
            for system, text in LOW_BIT.items()
        ]
    head = [model, *(part for task in tasks for part in (task, "of SUN's"))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _cells(found: Comparison, tasks: Sequence[str], system: str, bits: str = "") -> list[str]:
    """For each task, accuracy in % and answer length, and its share of SUN's."""
    cells = []
    for task in tasks:
        mean, tokens = found.mean(task, system, bits), found.answers(task, system, bits).mean_tokens
        cells.append(f"{_percent(mean)}, {tokens:.0f}")
        shared = system in ("qsun", "qsun-post")
        cells.append(_percent(found.share(task, system, bits), 0, " %") if shared else "")
    return cells


def _percent(found: Estimate, digits: int = 1, unit: str = "") -> str:
    value, low, high = (f"{100 * part:.{digits}f}" for part in (found.value, found.low, found.high))
    return f"{value}{unit} ({low} to {high})"


def _legend(found: Comparison) -> str:
    seeds = len(found.result["seeds"])
    sizes = {task: found.answers(task, "sun").right.shape[1] for task in TESTS}
    held_out = [
        f"{text} {100 * fmean(one['accuracy'] for one in found.scored(UNTIED, system)):.1f}"
        for system, text in (("full-ft", "full fine-tuning"), ("sun", "SUN"))
    ]
    return (
        f"Right answers in %, mean of {seeds} seeds, with the 95 % bootstrap interval over samples "
        f"({sizes['math']} of math, {sizes['tools']} of tools; the same for all systems), and the "
        "mean number of tokens of an answer; then the share of SUN's right answers, paired. Equal "
        "rows and steps for all: math 32,000 rows once, all weights of P; tools all rows 4 times, "
        "LoRA of rank 64, full fine-tuning all weights. Greedy, by `qsun evaluate`, on "
        f"{found.record.hardware['accelerator']}s, by `tests/gpu/compare_bits.py`. Perplexity of "
        f"the decoder by llm-compressor's AWQ: {_perplexities(found)}. Math templates that no row "
        f"used: {', '.join(held_out)}."
    )


def _perplexities(found: Comparison) -> str:
    made = [found.result["quantizations"][bits]["perplexity"] for bits in BITS]
    texts = [f"{one['quantized']:,.1f}" for one in made]
    full = made[0]["full_precision"]
    return f"{full:.1f} in full precision, {', '.join(texts)} at 4, 3 and 2 bits"


def _goals() -> str:
    """What was aimed at, and the words for how it was met."""
    wanted = ", ".join(f"{100 * goal:.0f} % at {bits[1]} bits" for bits, goal in GOALS.items())
    return (
        f"Goals for QSUN, of SUN's right answers: {wanted}, and there {100 * GOAL_LEAD:.0f} points "
        "more than SUN's prefill on the quantized decoder. *By the mean alone* says that the "
        "interval has the goal within."
    )


def _reached(found: Comparison, tasks: Sequence[str]) -> str:
    """How QSUN met the goals, task by task."""
    reached = []
    for task in tasks:
        shares = {bits: found.share(task, "qsun", bits) for bits in GOALS}
        lead = found.lead(task, "qsun", "qsun-post", "w2")
        texts = [
            f"at {bits[1]} bits {_percent(share, 1, ' %')} {_met(share, GOALS[bits])}"
            for bits, share in shares.items()
        ]
        texts.append(f"ahead by {_percent(lead)} points {_met(lead, GOAL_LEAD)}")
        reached.append(f"{task} {', '.join(texts)}")
    return f"Reached: {'; '.join(reached)}."


def _met(found: Estimate, goal: float) -> str:
    verdict = "met" if found.value >= goal else "**missed**"
    return verdict + (" by the mean alone" if found.low < goal <= found.high else "")


def _tried(found: Comparison) -> str:
    texts = []
    for bits in ("w3", "w2"):
        first = 100 * found.answers("math", "qsun", bits).right[0].mean()
        others = ", ".join(
            f"{text} {100 * found.answers('math', 'qsun', bits, name).right.mean():.1f}"
            for name, text in VARIANTS.items()
        )
        texts.append(f"at {bits[1]} bits {first:.1f} as above, {others}")
    rates = found.result["chosen"]
    return (
        f"Tried with QSUN on math, one seed: {'; '.join(texts)}. Learning rates at 2 bits were "
        f"chosen between two, by validation loss: math {rates['math']['2']:g}, tools "
        f"{rates['tools']['2']:g}; else SUN's."
    )


def _known_already(found: Comparison) -> str:
    """What a base model that was trained on the tasks' rows makes of the comparison."""
    base = found.result["trainings"]["base"]
    tuning = read_record(QWEN3_TUNING, "tuning").result
    return (
        f"The same, on a Qwen3 of 12 layers of 512 and {tuning['trained_weights'] / 1e6:.0f} "
        "million weights (`--architecture qwen3`), pretrained on these tasks' rows alone: "
        f"{base['epochs']} epochs, {base['training']['tokens'] / 1e6:.0f} million tokens. **This "
        "base model knows math's templates already**: it answers "
        f"{_percent(found.mean('math', 'base'))} %, SUN's tuning adds "
        f"{_percent(found.lead('math', 'sun', 'base'))} points and full fine-tuning "
        f"{_percent(found.lead('math', 'full-ft', 'base'))}, paired. So the table says what a "
        "decoder's bits cost and how much of that QSUN wins back, not what SUN is worth."
    )


def _left_out(found: Comparison) -> str:
    """Which of the tests tell no system from another, and why."""
    held_out = found.scored(UNTIED)
    right = [round(one["accuracy"] * one["total"]) for one in held_out]
    tools = [one for test in TESTS["tools"] for one in found.scored(test)]
    best = max(one["accuracy"] for one in tools)
    assert best == 0, "tools has right answers: give it a column"
    task = read_record(QWEN3_TUNING, "tuning").result["task"]
    overlap = task["overlap_with_training"]["seen"]
    return (
        "Only math tells systems apart: tools has no right answer from any system, templates that "
        f"no row used {min(right)} to {max(right)} of {held_out[0]['total']}, base model and all. "
        "Perplexity on other text says nothing of a model that knows two tasks, so none is given. "
        f"Math's tests are made from templates that were trained on: {overlap['shared']} of "
        f"{overlap['tests']} share {overlap['n']} words in a row with the rows that the modules "
        "were tuned on ([one training's record](docs/records/tuning-qwen3-math-sun.json))."
    )
