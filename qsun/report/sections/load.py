"""Under load: throughput, TPOT and fairness of each system, against request rate and alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsun.report.amounts import count, milliseconds, with_interval
from qsun.report.blocks import Block, Heading, Notice, Picture, Section, Table, Text
from qsun.report.charts import Line, Point, chart
from qsun.report.loads import (
    AXES,
    Measured,
    comparable,
    in_words,
    measured,
    mismatches,
    order,
    rank,
    shared,
    unpaired,
    varying,
)
from qsun.report.sources import Source, Sources

MOST_PICTURES = 3  # of one axis; the table has every load
# What is drawn: a summary's key, its axis and what its unit is multiplied by.
DRAWN = (("tokens_per_s", "tokens/s", 1.0), ("tpot_p50_s", "TPOT p50, ms", 1000.0))
Columns = tuple[tuple[str, str, float], ...]
THROUGHPUT: Columns = (
    ("tokens/s", "tokens_per_s", 1.0),
    ("tokens/s a decode worker", "tokens_per_s_per_decode_worker", 1.0),
    ("goodput, requests/s", "goodput_per_s", 1.0),
    ("fairness", "fairness", 1.0),
)
LATENCY: Columns = (
    ("TTFT p50, ms", "ttft_p50_s", 1000.0),
    ("TTFT p99, ms", "ttft_p99_s", 1000.0),
    ("TPOT p50, ms", "tpot_p50_s", 1000.0),
    ("TPOT p99, ms", "tpot_p99_s", 1000.0),
)


def load_section(sources: Sources) -> Section | None:
    """All bench records, compared where hardware and tasks are equal, load by load."""
    found = sources.of("bench")
    if not found:
        return None
    groups = comparable(measured(found, sources))
    blocks = [*_interrupted(found), _systems(found, sources)]
    if len(groups) > 1:
        blocks += [Notice("Not compared", text) for text in mismatches(groups)]
    for group in groups:
        if len(groups) > 1:
            names = dict.fromkeys(one.label for one in group)
            blocks.append(Heading(f"{', '.join(names)} on {group[0].source.hardware}"))
        blocks += _group(group)
    names = dict.fromkeys(source.result["system"] or "system not named" for source in found)
    summary = f"{', '.join(names)}, {sum(len(one.result['points']) for one in found)} loads"
    if not all(source.result["complete"] for source in found):
        summary += ", INTERRUPTED"
    return Section("Under load", summary, tuple(blocks), tuple(found))


def _interrupted(found: Sequence[Source]) -> list[Block]:
    return [
        Notice(
            "Interrupted",
            f"{source.name} is not complete. Not run: "
            + (", ".join(source.result.get("missing") or []) or "not recorded"),
        )
        for source in found
        if not source.result["complete"]
    ]


def _systems(found: Sequence[Source], sources: Sources) -> Table:
    records: dict[tuple[str, ...], list[str]] = {}
    for source in found:
        result = source.result
        told = (
            f"{result['system'] or 'system not named'}{sources.which(source)}",
            result["decode"] or "not recorded",
            result.get("policy") or "not recorded",
            count(result["workers"]["prefill"]),
            count(result["workers"]["decode"]),
            ", ".join(result["tasks"]),
            _goals(result.get("slo") or {}),
        )
        records.setdefault(told, []).append(source.name)
    rows = tuple((told[0], ", ".join(names), *told[1:]) for told, names in records.items())
    header = ("system", "record", "decode module", "policy", "prefill workers", "decode workers")
    return Table("Systems", (*header, "tasks", "goals"), rows)


def _goals(slo: Mapping[str, Any]) -> str:
    said = [
        f"{name} {milliseconds(slo[key])} ms"
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
        if slo.get(key) is not None
    ]
    return ", ".join(said) or "none"


def _group(group: Sequence[Measured]) -> Iterator[Block]:
    several = len({one.label for one in group}) > 1
    for axis in ("rate_per_s", "concurrency", "alpha"):
        yield from _against(group, axis)
    yield from _tables(group)
    alone = [f"{load}: {', '.join(who)} alone" for load, who in unpaired(group)]
    if several and alone:
        yield Notice("Not compared", "; ".join(alone))
    yield from _failures(group)


def _against(group: Sequence[Measured], axis: str) -> Iterator[Block]:
    """Pictures over an axis, of the loads that are equal otherwise and differ in it."""
    alike: dict[str, list[Measured]] = {}
    for one in group:
        if one.load.get(axis) is not None:
            alike.setdefault(one.rest(axis), []).append(one)
    found = [same for same in alike.values() if len({one.load[axis] for one in same}) > 1]
    common = shared(group)
    for same in found[:MOST_PICTURES]:
        rest = {key: value for key, value in varying(same[0].load, common).items() if key != axis}
        where = f", {in_words(rest)}" if in_words(rest) else ""
        for metric, y, scale in DRAWN:
            name = f"{y.partition(',')[0]} by {AXES[axis]}{where}"
            picture = _picture(same, axis, metric, (name, y), scale)
            if picture is not None:
                yield picture
    if len(found) > MOST_PICTURES:
        yield Text(
            f"By {AXES[axis]}, {len(found) - MOST_PICTURES} more sets of loads are in the table "
            "alone."
        )


def _picture(
    same: Sequence[Measured], axis: str, metric: str, names: tuple[str, str], scale: float
) -> Picture | None:
    points: dict[str, list[Point]] = {}
    for one in sorted(same, key=lambda one: one.load[axis]):
        value = one.summary.get(metric) or {"mean": None}
        if value["mean"] is not None:
            ends = value.get("interval")
            between = None if ends is None else (scale * ends[0], scale * ends[1])
            point = Point(one.load[axis], scale * value["mean"], between)
            points.setdefault(one.label, []).append(point)
    systems = {one.label: one.source.result["system"] for one in same}
    lines = [
        Line(label, tuple(points[label]), rank=rank(system))
        for label, system in systems.items()
        if label in points
    ]
    return chart(names[0], AXES[axis], names[1], lines) if lines else None


def _tables(group: Sequence[Measured]) -> Iterator[Table]:
    common = shared(group)
    alike = in_words(common)
    every = f" All loads: {alike}." if alike else ""
    ordered = sorted(group, key=order)
    heads = [(in_words(varying(one.load, common)) or "this load", one.label) for one in ordered]
    counts = [
        tuple(count(sum(run[key] for run in one.runs)) for key in ("answered", "failed"))
        for one in ordered
    ]
    for title, columns in (("Throughput", THROUGHPUT), ("Latency", LATENCY)):
        rows = tuple(
            (
                *head,
                count(len(one.runs)),
                *(with_interval(one.summary.get(key), scale) for _, key, scale in columns),
                *(asked if columns is THROUGHPUT else ()),
            )
            for head, one, asked in zip(heads, ordered, counts, strict=True)
        )
        header = ("load", "system", "runs", *(name for name, _, _ in columns))
        more = ("answered", "failed") if columns is THROUGHPUT else ()
        caption = f"{title}, means over runs with 95 % intervals.{every}"
        yield Table(caption, (*header, *more), rows)


def _failures(group: Sequence[Measured]) -> Iterator[Block]:
    """Requests that failed, and runs whose load never became steady."""
    rows, unsteady = [], []
    common = shared(group)
    for one in sorted(group, key=order):
        load = in_words(varying(one.load, common)) or "this load"
        reasons = Counter[str]()
        for run in one.runs:
            reasons.update(run.get("failures") or {})
        rows += [(load, one.label, reason, count(times)) for reason, times in reasons.items()]
        times = sum(run.get("steady") is False for run in one.runs)
        unsteady += [f"{one.label}, {load}: {times} of {len(one.runs)} runs"] if times else []
    if unsteady:
        yield Notice("Not steady", "; ".join(unsteady))
    if rows:
        yield Table("Requests that failed", ("load", "system", "reason", "requests"), tuple(rows))
