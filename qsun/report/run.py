"""The report, from paths to files: everything is read and checked before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qsun.errors import OutputError
from qsun.files import refuse_used_files, write_atomically
from qsun.report.blocks import Page
from qsun.report.contents import contents_of
from qsun.report.html import html_page
from qsun.report.markdown import markdown_page
from qsun.report.sources import read_sources

WRITERS: dict[str, Callable[[Page], str]] = {
    ".html": html_page,
    ".htm": html_page,
    ".md": markdown_page,
}


def write_report(paths: Sequence[Path], outs: Sequence[Path], note: str = "") -> Page:
    """Write a page about a bundle or records into each of `outs`, in the format of its suffix.

    `note` is said above everything else.

    Raises:
        OutputError: a file that exists, a folder that does not, or an unknown suffix.
        QsunError: sources that cannot be shown; all are named.
    """
    unknown = [str(out) for out in outs if out.suffix.lower() not in WRITERS]
    if unknown:
        raise OutputError(f"{', '.join(unknown)}: a report is written as {', '.join(WRITERS)}")
    refuse_used_files(outs)
    page = contents_of(read_sources(paths), note)
    texts = [(out, WRITERS[out.suffix.lower()](page)) for out in outs]
    for out, text in texts:
        write_atomically(out, text.encode())
    return page
