"""Figures: matplotlib without a display, and SVG that can be read on light and dark backgrounds."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

from qsun.files import write_atomically

GROUND, INK, FAINT = "#ffffff", "#24292f", "#d0d7de"
MAIN, OTHER, THIRD = "#0550ae", "#bc4c00", "#6639ba"
# What each colour becomes on a dark screen, by a media query in the file itself; paper is light.
DARK = {
    **{GROUND: "#0d1117", INK: "#e6edf3", FAINT: "#3d444d"},
    **{MAIN: "#79c0ff", OTHER: "#ffa657", THIRD: "#d2a8ff"},
}
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay text, which can be searched and read out
    "svg.hashsalt": "qsun",  # the same picture is the same file
    "text.parse_math": False,  # a dollar sign in a name is one
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
    write_atomically(path, described(_drawn(figure), title, text).encode())


def inline_svg(figure: Any, title: str, text: str, prefix: str) -> str:
    """The same as an element of a page, where `prefix` keeps its ids apart from other pictures'."""
    svg = described(_drawn(figure), title, text)
    for left_out in (r"<!--.*?-->", r"<metadata>.*?</metadata>"):
        svg = re.sub(left_out, "", svg, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", lambda tag: _with_prefix(tag[0], prefix), svg[svg.index("<svg") :])


def _drawn(figure: Any) -> str:
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _with_prefix(tag: str, prefix: str) -> str:
    """A tag whose ids, and references to ids, begin with `prefix`."""
    tag = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", tag)
    named = f'aria-labelledby="{prefix}title {prefix}description"'
    return tag.replace('aria-labelledby="title description"', named)


def described(svg: str, title: str, text: str) -> str:
    """An SVG with a title, a text in place of it, and dark colours for dark screens."""
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
            f" <style>@media screen and (prefers-color-scheme: dark){{{rules}}}</style>",
            svg[end + 1 :],
        ]
    )
