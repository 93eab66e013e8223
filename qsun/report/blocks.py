"""What a page is made of, whatever it is written in: sections of texts, tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qsun.report.amounts import NOT_RECORDED
from qsun.report.sources import Source

# A number, with whatever follows it, or none.
NUMERIC = re.compile(rf"[+-]?\d[\d,.]*( .*)?|{NOT_RECORDED}|")


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Text:
    """A paragraph; plain text, whatever stands in it."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be overlooked; `word` says what it is."""

    word: str
    text: str
    kind: str = "notice"


@dataclass(frozen=True)
class Table:
    """A table; a row's first cell is its header."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: str = "table"

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold nothing but numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return tuple(
            at > 0 and all(NUMERIC.fullmatch(cell) for cell in column)
            for at, column in enumerate(columns)
        )


@dataclass(frozen=True)
class Picture:
    """A picture of what tables say too: `draw` makes an SVG whose ids begin with what it is given.

    `text` stands in its place; `wide` is one of many panels, which a small screen scrolls.
    """

    title: str
    text: str
    draw: Callable[[str], str]
    wide: bool = False
    kind: str = "picture"


Block = Heading | Text | Notice | Table | Picture


@dataclass(frozen=True)
class Section:
    """A section, what it comes to in a line, and the records that all its numbers are from."""

    title: str
    summary: str
    blocks: tuple[Block, ...]
    sources: tuple[Source, ...] = ()

    @property
    def anchor(self) -> str:
        """Its name in a page's links."""
        return "-".join(re.findall(r"\w+", self.title.lower()))


@dataclass(frozen=True)
class Absent:
    """Something that no record says, and the command that would record it."""

    what: str
    command: str


@dataclass(frozen=True)
class Page:
    """All that is written: `absent` has no section, `left_out` are records that none shows.

    `note` is what who made the page says of it.
    """

    title: str
    sections: tuple[Section, ...]
    absent: tuple[Absent, ...]
    left_out: tuple[str, ...]
    version: str
    note: str = ""
