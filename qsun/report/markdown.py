"""The page as Markdown: the same tables and texts, its pictures' words in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from qsun.report.blocks import Block, Heading, Notice, Page, Picture, Section, Table, Text
from qsun.report.provenance import provenance


def markdown_page(page: Page) -> str:
    """The whole file."""
    parts = [f"# {plain(page.title)}", *filter(None, [plain(page.note)]), _contents(page)]
    for section in page.sections:
        parts += _section(section)
    if page.absent:
        rows = tuple((one.what, one.command) for one in page.absent)
        parts += ["## Not recorded", _table(("what", "would be recorded by"), rows)]
    if page.left_out:
        parts.append(f"Not shown: {plain(', '.join(page.left_out))}.")
    parts.append(f"Made by qsun {plain(page.version)} from the records named above.")
    return "\n\n".join(parts) + "\n"


def _contents(page: Page) -> str:
    return "\n".join(
        f"- [{plain(section.title)}](#{section.anchor}): {plain(section.summary)}"
        for section in page.sections
    )


def _section(section: Section) -> Iterator[str]:
    yield f"## {plain(section.title)}"
    for block in section.blocks:
        yield from _block(block)
    for source in section.sources:
        yield f"Provenance of {plain(source.name)}:"
        yield _table(("", "value"), provenance(source))


def _block(block: Block) -> Iterator[str]:
    match block:
        case Heading(text=text):
            yield f"### {plain(text)}"
        case Text(text=text):
            yield plain(text)
        case Notice(word=word, text=text):
            yield f"**{plain(word)}:** {plain(text)}"
        case Table(caption=caption, header=header, rows=rows):
            yield f"**{plain(caption)}**"
            yield _table(header, rows)
        case Picture():
            pass  # the tables have its numbers


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(plain, cells))} |" for cells in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", escape(line, quote=False))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)
