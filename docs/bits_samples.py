"""A `bits-comparison` record, sample by sample, and intervals of what is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from qsun.records import Record, read_record

# A task's test sets, all samples alike.
TESTS = {"math": ("math.seen",), "tools": ("tools.simple", "tools.multiple")}
BITS = ("w4", "w3", "w2")
LOW_BIT = ("awq-full-ft", "qsun-post", "qsun")
VARIANTS = ("lora", "kl", "mix")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number, with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """One system's answers to a task's tests: right or not, float `[seeds, samples]`."""

    right: np.ndarray
    mean_tokens: float

    @property
    def of_samples(self) -> np.ndarray:
        """The share of seeds that were right, per sample."""
        return np.asarray(self.right.mean(axis=0))


class Comparison:
    """One record, read when it is first asked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def record(self) -> Record:
        """The record."""
        return read_record(self.path, "bits-comparison")

    @property
    def result(self) -> dict[str, Any]:
        """Its result."""
        return self.record.result

    @cache  # noqa: B019  (one object a record, as long as the script)
    def answers(self, task: str, system: str, bits: str = "", variant: str = "") -> Answers:
        """A system's answers; `bits` and `variant` are those of systems of few bits."""
        right, tokens = [], []
        for name, card in self._cards():
            parts = name.split("-")
            found = next((part for part in parts if part in BITS), "")
            varied = next((part for part in parts if part in VARIANTS), "")
            wanted = bits if system in LOW_BIT else ""
            if (parts[0], found, varied) != (task, wanted, variant):
                continue
            if system in card["systems"][TESTS[task][0]]:
                values = "".join(card["values"][test][system] for test in TESTS[task])
                right.append([float(value) for value in values])
                scored = [card["systems"][test][system] for test in TESTS[task]]
                tokens += [one["mean_tokens"] for one in scored for _ in range(one["total"])]
        return Answers(np.array(right), fmean(tokens))

    def scored(self, test: str, system: str | None = None) -> list[dict[str, Any]]:
        """What every scorecard says of a test set, of one system or of all."""
        found = [card["systems"].get(test, {}) for _, card in self._cards()]
        return [
            value for systems in found for name, value in systems.items() if system in (None, name)
        ]

    def mean(self, task: str, system: str, bits: str = "") -> Estimate:
        """Accuracy, 0 to 1."""
        return _estimate(lambda ours: ours, self.answers(task, system, bits))

    def share(self, task: str, system: str, bits: str) -> Estimate:
        """Right answers over SUN's, paired by sample."""
        both = self.answers(task, system, bits), self.answers(task, "sun")
        return _estimate(lambda ours, sun: ours / sun, *both)

    def lead(self, task: str, system: str, other: str, bits: str = "") -> Estimate:
        """Accuracy minus another system's, paired by sample."""
        both = self.answers(task, system, bits), self.answers(task, other, bits)
        return _estimate(lambda ours, theirs: ours - theirs, *both)

    def _cards(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, card in self.result["scorecards"].items():
            yield name, card["result"]


def _estimate(statistic: Callable[..., Any], *answers: Answers) -> Estimate:
    """`statistic` of the systems' accuracies, the same samples drawn for all of them."""
    found = [one.of_samples for one in answers]
    drawn = _drawn(found[0].size)
    values = statistic(*(right[drawn].mean(axis=1) for right in found))
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(float(statistic(*(right.mean() for right in found))), float(low), float(high))


@cache
def _drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count), dtype=np.int32)
