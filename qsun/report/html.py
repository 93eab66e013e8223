"""The page as one HTML file that needs nothing but itself."""

from __future__ import annotations

from importlib.resources import files
from itertools import count
from typing import Any

from qsun.report.blocks import Page, Picture
from qsun.report.provenance import provenance

TEMPLATE, STYLES = "page.html.j2", "page.css"


def html_page(page: Page) -> str:
    """The whole file. All text is escaped; pictures are drawn here, ids apart from each other."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    numbers = count(1)

    def drawn(picture: Picture) -> Any:
        return Markup(picture.draw(f"picture{next(numbers)}-"))  # its texts are escaped in it

    folder = files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(folder.joinpath(TEMPLATE).read_text(encoding="utf-8"))
    styles = Markup(folder.joinpath(STYLES).read_text(encoding="utf-8"))
    return template.render(page=page, drawn=drawn, provenance=provenance, styles=styles) + "\n"
