"""The README's table of the seven systems at 4, 3 and 2 bits, from `docs/records/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from qsun.records import Record, read_record

RECORD = Path(__file__).parent / "records" / "bits-comparison.json"
# A column is one task's test sets, all samples alike.
COLUMNS = {"math": ("math.seen",), "tools": ("tools.simple", "tools.multiple")}
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
RESAMPLES = 10_000


@cache
def record() -> Record:
    """The comparison's record."""
    return read_record(RECORD, "bits-comparison")


@cache
def samples(task: str, system: str, bits: str, variant: str = "") -> tuple[np.ndarray, float]:
    """Right answers, float `[seeds, samples]`, and the mean number of tokens of an answer."""
    right, tokens = [], []
    for name, card in record().result["scorecards"].items():
        parts = name.split("-")
        found_bits = next((part for part in parts if part in ("w4", "w3", "w2")), "")
        found_variant = next((part for part in parts if part in VARIANTS), "")
        wanted = bits if system in LOW_BIT else ""
        if (parts[0], found_bits, found_variant) != (task, wanted, variant):
            continue
        result = card["result"]
        if system in result["systems"][COLUMNS[task][0]]:
            values = "".join(result["values"][test][system] for test in COLUMNS[task])
            right.append([float(value) for value in values])
            scored = [result["systems"][test][system] for test in COLUMNS[task]]
            tokens += [one["mean_tokens"] for one in scored for _ in range(one["total"])]
    return np.array(right), fmean(tokens)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over samples, each averaged over its seeds."""
    drawn = _drawn(values.shape[-1])
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


@cache
def _drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count), dtype=np.int32)


def cell(task: str, system: str, bits: str = "") -> list[str]:
    """Accuracy in %, with interval and answer length, and its share of SUN's with interval."""
    right, tokens = samples(task, system, bits)
    low, high = interval(right.mean(axis=0))
    shown = f"{100 * right.mean():.1f} ({100 * low:.1f} to {100 * high:.1f}), {tokens:.0f}"
    if system not in ("qsun", "qsun-post"):
        return [shown, ""]
    sun = samples(task, "sun", "")[0].mean(axis=0)
    ours, drawn = right.mean(axis=0), _drawn(len(sun))
    ratios = ours[drawn].mean(axis=1) / sun[drawn].mean(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return [shown, f"{100 * ours.mean() / sun.mean():.0f} % ({100 * low:.0f} to {100 * high:.0f})"]


def table() -> str:
    """Systems down, tasks across; then what was tried and on what it was run."""
    rows: list[Sequence[str]] = [
        [text, *(part for task in COLUMNS for part in cell(task, system))]
        for system, text in DENSE.items()
    ]
    for bits in ("w4", "w3", "w2"):
        rows += [
            [
                f"{bits[1]} bits: {text}",
                *(part for task in COLUMNS for part in cell(task, name, bits)),
            ]
            for name, text in LOW_BIT.items()
        ]
    head = ["SmolLM2-135M-Instruct", *(part for task in COLUMNS for part in (task, "of SUN's"))]
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_legend()}\n\n{_tried()}\n"


def _legend() -> str:
    found = record()
    seeds = len(found.result["seeds"])
    sizes = {task: samples(task, "sun", "")[0].shape[1] for task in COLUMNS}
    made = found.result["quantizations"]
    quantized = [made[bits]["perplexity"] for bits in ("w4", "w3", "w2")]
    held_out = [
        f"{text} {100 * fmean(_of(UNTIED, system)):.1f}"
        for system, text in (("full-ft", "full fine-tuning"), ("sun", "SUN"))
    ]
    return (
        f"Right answers in %, mean of {seeds} seeds, with the 95 % bootstrap interval over samples "
        f"({sizes['math']} of math, {sizes['tools']} of tools; the same for all systems), and the "
        "mean number of tokens of an answer; then the share of SUN's right answers, paired. Equal "
        "rows and steps for all: math 32,000 rows once, all weights of P; tools all rows 4 times, "
        "LoRA of rank 64, full fine-tuning all weights. Greedy, by `qsun evaluate`, on "
        f"{found.hardware['accelerator']}s, by `tests/gpu/compare_bits.py`. Perplexity of the "
        f"decoder by llm-compressor's AWQ: {_perplexities(quantized)}. Math templates that no row "
        f"used: {', '.join(held_out)}."
    )


def _perplexities(found: Sequence[Mapping[str, float]]) -> str:
    full = found[0]["full_precision"]
    texts = [f"{one['quantized']:,.1f}" for one in found]
    return f"{full:.1f} in full precision, {', '.join(texts)} at 4, 3 and 2 bits"


def _of(test: str, system: str) -> list[float]:
    cards: list[Any] = [card["result"] for card in record().result["scorecards"].values()]
    return [
        card["systems"][test][system]["accuracy"]
        for card in cards
        if system in card["systems"].get(test, {})
    ]


def _tried() -> str:
    texts = []
    for bits in ("w3", "w2"):
        first = 100 * samples("math", "qsun", bits)[0][0].mean()
        others = ", ".join(
            f"{text} {100 * samples('math', 'qsun', bits, name)[0].mean():.1f}"
            for name, text in VARIANTS.items()
        )
        texts.append(f"at {bits[1]} bits {first:.1f} as above, {others}")
    rates = record().result["chosen"]
    return (
        f"Tried with QSUN on math, one seed: {'; '.join(texts)}. Learning rates at 2 bits were "
        f"chosen between two, by validation loss: math {rates['math']['2']:g}, tools "
        f"{rates['tools']['2']:g}; else SUN's."
    )
