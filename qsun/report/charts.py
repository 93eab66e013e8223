"""Charts: lines over an axis, told apart by dash and marker as well as by colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsun.figures import INK, MAIN, OTHER, STYLE, THIRD, inline_svg, new_figure
from qsun.report.amounts import number, setting
from qsun.report.blocks import Picture

# Inches: drawn at about the width of a phone, so that its letters can be read there.
SIZE = 4.8, 3.4
MOST_TICKS = 7
STYLES = ((MAIN, "-", "o"), (OTHER, "--", "s"), (THIRD, "-.", "^"), (INK, (0, (4, 1)), "D"))
FLOOR_STYLE = (INK, ":", "")


@dataclass(frozen=True)
class Point:
    """One measurement, with its interval where there is one."""

    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A system's or a format's points; `floor` says that they are no measurement but a bound.

    `rank` is a system's among those that are compared, so that it looks the same in every chart.
    """

    label: str
    points: tuple[Point, ...]
    floor: bool = False
    rank: int | None = None


def chart(
    title: str, x: str, y: str, lines: Sequence[Line], powers_of_two: bool = False
) -> Picture:
    """A picture of some lines, with words in its place."""
    text = f"{y} against {x}. " + " ".join(_in_words(line) for line in lines)
    return Picture(
        title,
        text,
        lambda prefix: inline_svg(_figure(title, x, y, lines, powers_of_two), title, text, prefix),
    )


def _in_words(line: Line) -> str:
    points = (f"{number(point.y)} at {setting(point.x)}" for point in line.points)
    return f"{line.label}: {', '.join(points)}."


def _figure(title: str, x: str, y: str, lines: Sequence[Line], powers_of_two: bool) -> Any:
    import matplotlib

    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = new_figure(*SIZE)
        axes = figure.add_subplot()
        for line, style in zip(lines, _styles(lines), strict=True):
            _draw(axes, line, style)
        axes.set_title(title, fontsize="medium", wrap=True)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if powers_of_two:
            axes.set_xscale("log", base=2)
        _set_ticks(axes, sorted({point.x for line in lines for point in line.points}))
        axes.set_ylim(0, 1.08 * _highest(lines) or 1)
        axes.grid(visible=True, linewidth=0.5)
        columns = 2 if len(lines) > 2 and max(len(line.label) for line in lines) < 24 else 1
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _styles(lines: Sequence[Line]) -> list[tuple[Any, Any, str]]:
    """A style for each line: its system's own, or one after another where two have the same."""
    ranks = [line.rank for line in lines if not line.floor]
    if None in ranks or len(set(ranks)) < len(ranks):
        ranks = list(range(len(ranks)))
    left = iter(ranks)
    return [
        FLOOR_STYLE if line.floor else STYLES[(next(left) or 0) % len(STYLES)] for line in lines
    ]


def _highest(lines: Sequence[Line]) -> float:
    points = [point for line in lines for point in line.points]
    return max(point.interval[1] if point.interval else point.y for point in points)


def _draw(axes: Any, line: Line, style: tuple[Any, Any, str]) -> None:
    colour, dashes, marker = style
    values = [point.y for point in line.points]
    ends = [point.interval or (point.y, point.y) for point in line.points]
    below = [max(0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(
        [point.x for point in line.points],
        values,
        yerr=[below, above] if any(point.interval for point in line.points) else None,
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=4,
        capsize=3,
        elinewidth=1,
        label=line.label,
    )


def _set_ticks(axes: Any, values: Sequence[float]) -> None:
    """Ticks where something was measured; of many, every second, third, ..."""
    step = -(-len(values) // MOST_TICKS)
    shown = values[::step]
    axes.set_xticks(shown, [setting(value) for value in shown])
    axes.set_xticks([], minor=True)
