"""Figures: matplotlib without a display, and SVG that can be read on light and dark backgrounds."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

from qsun.files import write_atomically

GROUND, INK, FAINT = "#ffffff", "#24292f", "#d0d7de"
MAIN, OTHER = "#0550ae", "#bc4c00"
# What each colour becomes on a dark background, by a media query in the file itself.
DARK = {GROUND: "#0d1117", INK: "#e6edf3", FAINT: "#3d444d", MAIN: "#79c0ff", OTHER: "#ffa657"}
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay text, which can be searched and read out
    "svg.hashsalt": "qsun",  # the same picture is the same file
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), GROUND),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
}


def new_figure(width: float = 7, height: float = 4) -> Any:
    """An empty figure that knows no display; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_svg(figure: Any, path: Path, title: str, text: str) -> None:
    """Write a figure that was drawn in `STYLE`, with a title and a text in place of it."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_atomically(path, described(drawn.getvalue(), title, text).encode())


def described(svg: str, title: str, text: str) -> str:
    """An SVG with a title, a text in place of it, and dark colours for dark backgrounds."""
    start = svg.index("<svg")
    end = svg.index(">", start)
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    return "".join(
        [
            svg[:end],
            ' role="img" aria-labelledby="title description">\n',
            f' <title id="title">{escape(title)}</title>\n',
            f' <desc id="description">{escape(text)}</desc>\n',
            f" <style>@media (prefers-color-scheme: dark){{{rules}}}</style>",
            svg[end + 1 :],
        ]
    )
