"""The contents of a page: its sections in order, and what no record says."""

from __future__ import annotations

from collections.abc import Callable

from qsun import __version__
from qsun.report.blocks import Absent, Page, Section
from qsun.report.sections.bundle import bundle_section
from qsun.report.sections.fleet import fleet_section
from qsun.report.sections.kernels import kernels_section
from qsun.report.sections.latency import latency_section
from qsun.report.sections.load import load_section
from qsun.report.sections.quantization import quantization_section
from qsun.report.sections.scorecard import scorecard_section
from qsun.report.sections.verdict import verdict_section
from qsun.report.sources import Sources

# Sections in their order, each with what it says and the command that would record it, if any.
SECTIONS: tuple[tuple[Callable[[Sources], Section | None], Absent | None], ...] = (
    (bundle_section, Absent("what the bundle is", "qsun export CONFIG --out BUNDLE")),
    (verdict_section, Absent("the verdict", "qsun verify BUNDLE --served")),
    (scorecard_section, Absent("the scorecard", "qsun evaluate BUNDLE --floor FLOORS")),
    (quantization_section, Absent("errors and bits by layer", "qsun quantize CONFIG")),
    (latency_section, Absent("TPOT by decode batch", "qsun bench BUNDLE --curves --out FILE")),
    (kernels_section, None),
    (
        load_section,
        Absent(
            "throughput and TPOT under load",
            "qsun bench BUNDLE --rate 1,2,4 --alpha 0,1,2 --out FOLDER",
        ),
    ),
    (
        fleet_section,
        Absent("decode workers needed", "qsun simulate CURVES --ask fleet --rate 20 --out FILE"),
    ),
)


def contents_of(sources: Sources, note: str = "") -> Page:
    """The page that some records make, with a note above all of it."""
    made = [(build(sources), absent) for build, absent in SECTIONS]
    sections = tuple(section for section, _ in made if section is not None)
    bundle = sources.bundle
    subject = f"{len(sources.records)} records" if bundle is None else bundle.manifest.name
    shown = {source.sha256 for section in sections for source in section.sources}
    left_out = [
        f"{source.name} ({source.record.kind})"
        for source in sources.records
        if source.sha256 not in shown
    ]
    return Page(
        title=f"Report of {subject}",
        sections=sections,
        absent=tuple(absent for section, absent in made if section is None and absent is not None),
        left_out=(*sources.left_out, *left_out),
        version=__version__,
        note=note,
    )
