"""Provenance: where a section's numbers are from, the same words in every format."""

from __future__ import annotations

from qsun.report.sources import Source


def provenance(source: Source) -> tuple[tuple[str, str], ...]:
    """What made a record, as names and values."""
    record = source.record
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return (
        ("record", source.name),
        ("SHA-256", source.sha256),
        ("command", record.command or "not recorded"),
        ("seed", str(record.seed)),
        ("made", record.created or "not recorded"),
        ("hardware", source.hardware or "not recorded"),
        ("versions", versions or "not recorded"),
    )
