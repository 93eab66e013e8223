"""The scorecard: right answers with intervals, floors, and how systems differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsun.report.amounts import NOT_RECORDED, count, interval, percent
from qsun.report.blocks import Block, Heading, Notice, Section, Table, Text
from qsun.report.sources import Source, Sources

HELD, BROKEN = "yes", "NO"


def scorecard_section(sources: Sources) -> Section | None:
    """All scorecards that were given."""
    found = sources.of("scorecard")
    if not found:
        return None
    blocks = [block for source in found for block in _scorecard(source, sources, len(found) > 1)]
    summary = "; ".join(f"{_summary(source.result)}{sources.which(source)}" for source in found)
    return Section("Scorecard", summary, tuple(blocks), tuple(found))


def _summary(result: Mapping[str, Any]) -> str:
    systems = dict.fromkeys(name for test in result["systems"].values() for name in test)
    broken = sum(row[-1] == BROKEN for row in _floor_rows(result))
    said = f"{', '.join(systems)} on {len(result['systems'])} test sets"
    return f"{said}, {broken} BELOW THEIR FLOOR" if broken else said


def _scorecard(source: Source, sources: Sources, several: bool) -> Iterator[Block]:
    result = source.result
    if several:
        yield Heading(f"{source.name}{sources.which(source)}")
    limit = result.get("limit")
    each = "all samples" if limit is None else f"the first {count(limit)} samples"
    way = "a router" if result.get("served") else "both modules in one process"
    yield Text(f"Every system was asked the same: {each} of each test set, through {way}.")
    for warning in result.get("warnings") or []:
        yield Notice("Warning", warning)
    yield _scores(result)
    floors = _floor_rows(result)
    if floors:
        broken = [f"{row[0]}: {row[1]}" for row in floors if row[-1] == BROKEN]
        if broken:
            yield Notice("Below the floor", ", ".join(broken))
        header = ("test set", "system", "right, %", "floor, %", "floor is", "held")
        yield Table("Floors, compared unrounded", header, floors)
    else:
        yield Text("No floor is recorded with it.")
    pairs = result.get("pairs") or []
    if pairs:
        yield _pairs(pairs)


def _scores(result: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            test,
            system,
            percent(one["accuracy"]),
            interval(one["interval_95"], 100),
            count(one["total"]),
        )
        for test, systems in result["systems"].items()
        for system, one in systems.items()
    )
    header = ("test set", "system", "right, %", "95 % interval", "samples")
    return Table("Right answers", header, rows)


def _floor_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    return tuple(_floor_row(one, result["systems"]) for one in result.get("floors") or [])


def _floor_row(one: Mapping[str, Any], systems: Mapping[str, Any]) -> tuple[str, ...]:
    scores = {name: score["accuracy"] for name, score in systems.get(one["test"], {}).items()}
    found, least, what = scores.get(one["system"]), one.get("accuracy"), "an accuracy"
    if one.get("ratio") is not None:
        reference = scores.get(one.get("of"))
        least = None if reference is None else one["ratio"] * reference
        what = f"{percent(one['ratio'])} % of {one.get('of')}'s"
    held = NOT_RECORDED
    if found is not None and least is not None:
        held = HELD if found >= least else BROKEN
    return one["test"], one["system"], percent(found), percent(least), what, held


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            one["test"],
            f"{one['first']} minus {one['second']}",
            f"{100 * one['difference']:+.1f}",
            interval(one["interval_95"], 100),
            NOT_RECORDED if one.get("p") is None else f"{one['p']:.2g}",
        )
        for one in pairs
    )
    header = ("test set", "systems", "points", "95 % interval", "p")
    return Table("Differences, paired by sample", header, rows)
