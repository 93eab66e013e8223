"""The verdict: whether the modules belong together, and every check that did not pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qsun.report.amounts import number
from qsun.report.blocks import Block, Heading, Notice, Section, Table, Text
from qsun.report.sources import Source, Sources
from qsun.verdict import Outcome

WORDS = {True: "COMPATIBLE", False: "INCOMPATIBLE", None: "NOT FULLY CHECKED"}
# Levels whose findings are numbers of their own; those of files are many, and told by their count.
SHOWN_LEVELS = ("numeric", "served")


def verdict_section(sources: Sources) -> Section | None:
    """All verdicts that were given."""
    found = sources.of("verdict")
    if not found:
        return None
    blocks = [block for source in found for block in _verdict(source, sources, len(found) > 1)]
    words = "; ".join(f"{_word(source)}{sources.which(source)}" for source in found)
    return Section("Verdict", words, tuple(blocks), tuple(found))


def _word(source: Source) -> str:
    checks = source.result["checks"]
    passed = sum(check["outcome"] == Outcome.PASSED.value for check in checks)
    return f"{WORDS[source.result['compatible']]}, {passed} of {len(checks)} checks passed"


def _verdict(source: Source, sources: Sources, several: bool) -> Iterator[Block]:
    result = source.result
    checks = result["checks"]
    if several:
        yield Heading(f"{source.name}{sources.which(source)}")
    yield Text(f"{_word(source)}.")
    yield _levels(checks, result.get("seconds") or {})
    bad = [check for check in checks if check["outcome"] != Outcome.PASSED.value]
    if bad:
        yield Notice("Not passed", ", ".join(check["name"] for check in bad))
        rows = tuple(
            (check["name"], check["outcome"], check["message"], check.get("remedy") or "")
            for check in bad
        )
        yield Table("Checks that did not pass", ("check", "outcome", "finding", "remedy"), rows)
    numbers = tuple(
        (check["name"], check["message"])
        for check in checks
        if _level(check) in SHOWN_LEVELS and check not in bad
    )
    if numbers:
        caption = "What the passed checks of numbers and service found"
        yield Table(caption, ("check", "finding"), numbers)


def _level(check: Mapping[str, Any]) -> str:
    return str(check["name"]).partition(".")[0]


def _levels(checks: list[Mapping[str, Any]], seconds: Mapping[str, float]) -> Table:
    outcomes = [outcome.value for outcome in Outcome]
    found = Counter((_level(check), check["outcome"]) for check in checks)
    rows = tuple(
        (
            level,
            *(str(found[level, outcome]) for outcome in outcomes),
            number(seconds.get(level)),
        )
        for level in dict.fromkeys(map(_level, checks))
    )
    return Table("Checks by level", ("level", *outcomes, "seconds"), rows)
