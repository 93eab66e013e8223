"""TPOT by weight format and kernel, of decode modules with dummy weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsun.kernel_advice import FULL_PRECISION, kernel_advice, measured_format
from qsun.report.amounts import milliseconds, setting
from qsun.report.blocks import Block, Section, Table, Text
from qsun.report.charts import Line, Point, chart
from qsun.report.sources import Source, Sources

X, Y = "decode batch, streams at once", "TPOT, ms"
FLOOR = "floor"
Sweep = Mapping[str, Any]


def kernels_section(sources: Sources) -> Section | None:
    """All records of such times, and what is advised for the bundle."""
    found = sources.of("decode-tpot")
    if not found:
        return None
    own = None if sources.bundle is None else sources.bundle.manifest
    format_ = None if own is None else measured_format(own.decode_scheme)
    blocks: list[Block] = [
        Text(
            "TPOT does not depend on what weights say: these are dummies of the shapes of larger "
            f"models. The {FLOOR} is no measurement: no step can be quicker than the bytes that it "
            "must read, at the bandwidth of a plain read."
        )
    ]
    if own is not None:
        advice = kernel_advice(own.decode_scheme, own.kv_layout, own.decode_batch)
        if advice is not None:
            blocks.append(Text(f"For this bundle, {advice.text}."))
    for source in found:
        blocks += _of(source, format_)
    formats = dict.fromkeys(one["name"] for source in found for one in source.result["sweeps"])
    return Section("TPOT by format and kernel", ", ".join(formats), tuple(blocks), tuple(found))


def _of(source: Source, format_: str | None) -> Iterator[Block]:
    sweeps: list[Sweep] = source.result["sweeps"]
    for shape in dict.fromkeys(one["shape"] for one in sweeps):
        of_shape = [one for one in sweeps if one["shape"] == shape]
        for context in sorted({row["context_tokens"] for one in of_shape for row in one["tpot"]}):
            where = f"{shape}, contexts of {setting(context)} tokens"
            shown = [one for one in of_shape if one["name"] in (FULL_PRECISION, format_)]
            floor = FULL_PRECISION if format_ is None else format_
            lines = [line for one in shown or of_shape for line in _lines(one, context, floor)]
            yield chart(f"TPOT by decode batch: {where}", X, Y, lines, powers_of_two=True)
            yield _table(of_shape, context, where)


def _lines(sweep: Sweep, context: float, floor: str) -> Iterator[Line]:
    """A sweep's times, and the floor of one format."""
    rows = _rows(sweep, context)
    yield Line(sweep["label"], tuple(Point(row["batch"], 1000 * row["tpot_s"]) for row in rows))
    floors = [row for row in rows if row.get("floor_s")]
    if floors and sweep["name"] == floor and sweep["backend"] == "auto":
        points = tuple(Point(row["batch"], 1000 * row["floor_s"]) for row in floors)
        yield Line(f"{sweep['name']}, {FLOOR}", points, floor=True)


def _table(sweeps: Sequence[Sweep], context: float, where: str) -> Table:
    batches = sorted({row["batch"] for one in sweeps for row in _rows(one, context)})
    rows = []
    for one in sweeps:
        times = {row["batch"]: row["tpot_s"] for row in _rows(one, context)}
        kernels = ", ".join(name.removesuffix("LinearKernel") for name in one["kernels"])
        cells = (milliseconds(times.get(batch)) for batch in batches)
        rows.append((one["name"], kernels or "vLLM's choice", *cells))
    header = ("format", "kernel", *map(setting, batches))
    return Table(f"TPOT in ms by decode batch: {where}", header, tuple(rows))


def _rows(sweep: Sweep, context: float) -> list[Mapping[str, Any]]:
    return [row for row in sweep["tpot"] if row["context_tokens"] == context]
