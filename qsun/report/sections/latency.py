"""TPOT against decode batch: each format, beside bfloat16 and the bandwidth floor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.report.amounts import NOT_RECORDED, milliseconds, number, setting
from qsun.report.blocks import Block, Heading, Notice, Section, Table, Text
from qsun.report.charts import Line, Point, chart
from qsun.report.sources import Source, Sources, hardware_key

FULL_PRECISION = "bfloat16"
FLOOR = "bandwidth floor"
X, Y = "decode batch, streams at once", "TPOT, ms"


@dataclass(frozen=True)
class Curve:
    """A format's TPOT in seconds by decode batch, at one length of context."""

    label: str
    context_tokens: float | None
    seconds: Mapping[float, float]
    floor: bool = False


def latency_section(sources: Sources) -> Section | None:
    """All latency records, those of one hardware together, and what scorecards have measured."""
    found = sources.of("latency")
    scored = [source for source in sources.of("scorecard") if _streams(source)]
    if not found and not scored:
        return None
    groups: dict[str, list[Source]] = {}
    for source in found:
        groups.setdefault(hardware_key(source), []).append(source)
    blocks = [
        block
        for group in groups.values()
        for block in _on_one_hardware(group, sources, len(groups) > 1)
    ]
    if len(groups) > 1:
        names = " | ".join(", ".join(one.name for one in group) for group in groups.values())
        blocks.insert(0, Notice("Not compared", f"these were measured on other hardware: {names}"))
    blocks += [block for source in scored for block in _of_scorecard(source, sources)]
    formats = dict.fromkeys(one["format"] for source in found for one in source.result["tpot"])
    summary = ", ".join(formats) or "in vLLM, beside the base model, from the scorecard"
    return Section("TPOT by decode batch", summary, tuple(blocks), (*found, *scored))


def _streams(source: Source) -> list[Mapping[str, Any]]:
    tpot = source.result.get("tpot") or {}
    return list(tpot.get("by_streams") or [])


def _on_one_hardware(group: Sequence[Source], sources: Sources, several: bool) -> Iterator[Block]:
    if several:
        yield Heading(f"On {group[0].hardware}")
    yield Text(
        "TPOT is the time per output token of one stream while so many are answered at once. A "
        f"{FLOOR} is no measurement: no decode step can be quicker than its bytes are read."
    )
    curves = [curve for source in group for curve in _curves(source, group, sources)]
    for context in sorted({curve.context_tokens or 0 for curve in curves}):
        here = [curve for curve in curves if (curve.context_tokens or 0) == context]
        where = f", contexts of {setting(context)} tokens" if context else ""
        yield chart(f"TPOT by decode batch{where}", X, Y, [_line(one) for one in here], True)
        yield _table(here, where)
    for source in group:
        yield from _prefill(source, sources)


def _curves(source: Source, group: Sequence[Source], sources: Sources) -> Iterator[Curve]:
    formats = [one["format"] for other in group for one in _once(other)]
    for key, floor in (("tpot", False), ("floor", True)):
        points: dict[tuple[str, float | None], dict[float, float]] = {}
        for one in source.result.get(key) or []:
            where = one["format"], one.get("context_tokens")
            points.setdefault(where, {})[one["batch"]] = one["tpot_s"]
        for (name, context), seconds in points.items():
            whose = f", {source.name}" if formats.count(name) > 1 else ""
            label = f"{name}{sources.which(source)}{whose}"
            yield Curve(f"{label}, {FLOOR}" if floor else label, context, seconds, floor)


def _once(source: Source) -> list[Mapping[str, Any]]:
    """One entry for each format of a record."""
    return list({one["format"]: one for one in source.result["tpot"]}.values())


def _line(curve: Curve) -> Line:
    points = tuple(Point(batch, 1000 * curve.seconds[batch]) for batch in sorted(curve.seconds))
    return Line(curve.label, points, curve.floor)


def _table(curves: Sequence[Curve], where: str) -> Table:
    batches = sorted({batch for curve in curves for batch in curve.seconds})
    full = [curve for curve in curves if curve.label.startswith(FULL_PRECISION) and not curve.floor]
    others = [curve for curve in curves if curve not in full and not curve.floor]
    ratios = [(one, full[0]) for one in others] if len(full) == 1 else []
    header = (
        "decode batch",
        *(f"{curve.label}, ms" for curve in curves),
        *(f"{one.label}, of {FULL_PRECISION}'s" for one, _ in ratios),
    )
    rows = tuple(
        (
            setting(batch),
            *(milliseconds(curve.seconds.get(batch)) for curve in curves),
            *(_ratio(one.seconds.get(batch), base.seconds.get(batch)) for one, base in ratios),
        )
        for batch in batches
    )
    return Table(f"TPOT by decode batch{where}", header, rows)


def _ratio(one: float | None, other: float | None) -> str:
    return number(one / other) if one is not None and other else NOT_RECORDED


def _prefill(source: Source, sources: Sources) -> Iterator[Block]:
    times = source.result.get("prefill") or []
    hand_off = source.result.get("hand_off_s")
    which = f"{source.name}{sources.which(source)}"
    if times:
        rows = tuple((setting(one["prompt_tokens"]), milliseconds(one["seconds"])) for one in times)
        yield Table(f"Prefill by length of the prompt, {which}", ("prompt, tokens", "ms"), rows)
    if hand_off is not None:
        yield Text(f"The hand-off of a cache takes {milliseconds(hand_off)} ms ({which}).")


def _of_scorecard(source: Source, sources: Sources) -> Iterator[Block]:
    rows = tuple(
        (
            setting(one["streams"]),
            milliseconds(one["decode_s"]),
            milliseconds(one["base_s"]),
            _ratio(one["decode_s"], one["base_s"]),
        )
        for one in _streams(source)
    )
    header = ("streams at once", "decode module, ms", "base model, ms", "of the base model's")
    caption = f"TPOT in vLLM, measured with the scorecard, {source.name}{sources.which(source)}"
    yield Table(caption, header, rows)
