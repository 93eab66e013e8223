"""Decode workers that each system needs, from simulations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsun.report.amounts import count, milliseconds, setting
from qsun.report.blocks import Block, Heading, Section, Table, Text
from qsun.report.charts import Line, Point, chart
from qsun.report.loads import rank
from qsun.report.sources import Source, Sources

NEVER = "more than were tried"
# What may vary over a picture's axis, in the order in which a picture is looked for.
AXES = {"tasks": "tasks", "rate_per_s": "requests/s", "alpha": "Zipf alpha"}
Need = Mapping[str, Any]


def fleet_section(sources: Sources) -> Section | None:
    """All simulations that sized a pool."""
    found = [source for source in sources.of("simulation") if source.result.get("fleet")]
    if not found:
        return None
    blocks: list[Block] = [
        Text(
            "The smallest pool of decode workers that keeps the goals, of a simulated cluster: "
            "computed from measured curves, not measured itself. A worker is one vLLM server, on "
            "one GPU unless it is split over several."
        )
    ]
    blocks += [block for source in found for block in _fleet(source, len(found) > 1)]
    names = dict.fromkeys(one["system"] for source in found for one in source.result["fleet"])
    summary = f"{', '.join(names)}, simulated"
    return Section("Decode workers (GPUs) needed", summary, tuple(blocks), tuple(found))


def _fleet(source: Source, several: bool) -> Iterator[Block]:
    needs: list[Need] = source.result["fleet"]
    if several:
        yield Heading(source.name)
    for axis, name in AXES.items():
        for same in _alike(needs, axis):
            where = ", ".join(
                f"{AXES[key]} {setting(same[0][key])}"
                for key in AXES
                if key != axis and same[0][key] is not None
            )
            title = f"Decode workers by {name}; {where}"
            yield chart(title, name, "decode workers", _lines(same, axis))
    yield _table(needs)


def _alike(needs: Sequence[Need], axis: str) -> list[list[Need]]:
    """Those that differ in an axis alone, where there is more than one value; the first set."""
    groups: dict[tuple[Any, ...], list[Need]] = {}
    for one in needs:
        if one[axis] is not None and one["decode_workers"] is not None:
            rest = tuple(one[key] for key in AXES if key != axis)
            groups.setdefault(rest, []).append(one)
    return [same for same in groups.values() if len({one[axis] for one in same}) > 1][:1]


def _lines(same: Sequence[Need], axis: str) -> list[Line]:
    return [
        Line(
            system,
            tuple(
                Point(one[axis], one["decode_workers"])
                for one in sorted(same, key=lambda one: float(one[axis]))
                if one["system"] == system
            ),
            rank=rank(system),
        )
        for system in dict.fromkeys(one["system"] for one in same)
    ]


def _table(needs: Sequence[Need]) -> Table:
    rows = tuple(
        (
            one["system"],
            count(one["tasks"]),
            setting(one["rate_per_s"]),
            setting(one["alpha"]),
            NEVER if one["decode_workers"] is None else count(one["decode_workers"]),
            count(one.get("prefill_workers")),
            milliseconds(one.get("tpot_p50_s")),
            milliseconds(one.get("tpot_p99_s")),
            milliseconds(one.get("ttft_p99_s")),
        )
        for one in needs
    )
    header = ("system", "tasks", "requests/s", "Zipf alpha", "decode workers", "prefill workers")
    latencies = ("TPOT p50, ms", "TPOT p99, ms", "TTFT p99, ms")
    return Table("Workers needed, and the latencies with them", (*header, *latencies), rows)
