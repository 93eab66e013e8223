"""The scorecard: every system's accuracy with intervals, and paired differences between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from qsun.errors import DataError, bullet_list
from qsun.evaluate.samples import Samples
from qsun.evaluate.statistics import compare
from qsun.evaluate.systems import SYSTEMS


@dataclass(frozen=True)
class Scorecard:
    """All samples of an evaluation."""

    samples: tuple[Samples, ...]
    seed: int = 0

    def by_test(self) -> dict[str, dict[str, Samples]]:
        """Samples by test set and system, both in a fixed order."""
        order = [*SYSTEMS]
        found: dict[str, dict[str, Samples]] = {}
        for one in sorted(self.samples, key=lambda one: order.index(one.system)):
            found.setdefault(one.test, {})[one.system] = one
        return dict(sorted(found.items()))

    def pairs(self) -> list[dict[str, Any]]:
        """Every two systems on the same test set, the later one minus the earlier.

        Raises:
            DataError: two systems were not asked the same.
        """
        found = []
        for test, systems in self.by_test().items():
            for earlier, later in combinations(systems.values(), 2):
                _same_questions(test, {earlier.system: earlier, later.system: later})
                values = later.values, earlier.values
                found.append(
                    compare(later.system, earlier.system, test, values, self.seed).summary()
                )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain values, for a record; `values` is one digit a sample, for later comparisons."""
        tests = self.by_test()
        return {
            "tests": {
                test: {"sha256": next(iter(systems.values())).digest}
                for test, systems in tests.items()
            },
            "systems": {
                test: {name: one.summary() for name, one in systems.items()}
                for test, systems in tests.items()
            },
            "pairs": self.pairs(),
            "values": {
                test: {name: _compact(one.values) for name, one in systems.items()}
                for test, systems in tests.items()
            },
        }


def _same_questions(test: str, systems: Mapping[str, Samples]) -> None:
    digests = {name: one.digest for name, one in systems.items()}
    if len(set(digests.values())) > 1:
        lines = [f"{name}: {digest[:12]}..." for name, digest in digests.items()]
        raise DataError(
            f"{test}: these systems were not asked the same prompts:\n{bullet_list(lines)}"
        )


def _compact(values: Sequence[float]) -> str | list[float]:
    if all(value in (0.0, 1.0) for value in values):
        return "".join(str(int(value)) for value in values)
    return list(values)


def _expanded(values: str | Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def compare_records(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each system and test set that two scorecards share: now minus before, paired by sample.

    Raises:
        DataError: they share none, or a shared test set has other samples; names all.
    """
    found, problems = [], []
    for test, systems in now["values"].items():
        theirs = before["values"].get(test, {})
        shared = [name for name in systems if name in theirs]
        if shared and now["tests"][test] != before["tests"][test]:
            problems.append(f"{test}: other samples (another limit, data or prompt)")
            continue
        for name in shared:
            values = _expanded(systems[name]), _expanded(theirs[name])
            found.append(compare(f"{name} now", f"{name} before", test, values).summary())
    if problems or not found:
        problems = problems or ["they have no system and test set in common"]
        raise DataError(f"the scorecards cannot be compared:\n{bullet_list(problems)}")
    return found
