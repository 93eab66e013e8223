"""Sources: the records that a page is made from, all checked before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.bundle import MANIFEST, Bundle, read_bundle
from qsun.errors import IncompatibleError, QsunError, bullet_list
from qsun.files import sha256_file
from qsun.records import SCHEMA, Record, open_record
from qsun.report.needs import NEEDS, problems_of

RECORDS = "records"
# Of these a page about a bundle takes its own alone; the others may be there to compare.
OF_ONE_BUNDLE = ("verdict", "scorecard")


@dataclass(frozen=True)
class Source:
    """A record, the name that the page gives its file, and the file's SHA-256."""

    name: str
    sha256: str
    record: Record

    @property
    def result(self) -> dict[str, Any]:
        """What was measured."""
        return self.record.result

    @property
    def bundle(self) -> str | None:
        """The digest of the bundle that it is of, where it names one."""
        found = self.record.result.get("bundle")
        return found if isinstance(found, str) else None

    @property
    def hardware(self) -> str:
        """What it was measured on, in words."""
        known = dict(self.record.hardware)
        said = [str(known.pop(key)) for key in ("accelerator", "processor") if known.get(key)]
        for key, unit in (("cores", "cores"), ("memory_gib", "GiB of memory")):
            if key in known:
                said.append(f"{known.pop(key)} {unit}")
        return ", ".join([*said, *(f"{key} {value}" for key, value in known.items())])


@dataclass(frozen=True)
class Sources:
    """Everything a page is made from. `left_out` names records of kinds that no page shows."""

    bundle: Bundle | None
    records: tuple[Source, ...]
    left_out: tuple[str, ...] = ()

    def of(self, kind: str) -> list[Source]:
        """The records of one kind, in the order that they were given in."""
        return [source for source in self.records if source.record.kind == kind]

    @property
    def bundles(self) -> list[str]:
        """The digests of all bundles that the page is about, its own first."""
        own = [] if self.bundle is None else [self.bundle.digest]
        named = [source.bundle for source in self.records if source.bundle is not None]
        return list(dict.fromkeys([*own, *named]))

    def name_of(self, digest: str) -> str:
        """A word for one of several bundles."""
        return f"bundle {self.bundles.index(digest) + 1}"

    def which(self, source: Source) -> str:
        """Which bundle a record is of, in brackets; nothing where the page knows no more than one.

        A record that names no bundle is said to, beside others that do.
        """
        if len(self.bundles) < 2:
            return ""
        return (
            " (no bundle named)" if source.bundle is None else f" ({self.name_of(source.bundle)})"
        )


@dataclass
class _Found:
    """What was read so far, and what is wrong."""

    bundle: Bundle | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    incompatible: list[str] = field(default_factory=list)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read a bundle's folder, records' files, or both; a file that is named twice counts once.

    Raises:
        IncompatibleError: no bundle, several, one that was changed, or another one's verdict or
            scorecard; with everything else that is wrong.
        QsunError: no record, or one of another schema, of an unknown kind or without what its kind
            needs; all are named.
    """
    found = _Found()
    names = _shown_names([path for path in paths if not path.is_dir()])
    for path in paths:
        if path.is_dir():
            _add_bundle(found, path)
        else:
            _add_record(found, path, names[path])
    found.incompatible += _of_other_bundles(found)
    problems = [*found.incompatible, *found.problems]
    if problems:
        kind = IncompatibleError if found.incompatible else QsunError
        raise kind(f"no report was written:\n{bullet_list(problems, at_most=40)}")
    return Sources(found.bundle, tuple(found.sources.values()), tuple(found.left_out))


def _shown_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Files' names as given; of paths through this machine as much as tells them apart."""
    names = {path: path.as_posix() for path in paths}
    ours = {path for path in paths if path.is_absolute() or ".." in path.parts}
    for length in range(1, max((len(path.parts) for path in ours), default=0) + 1):
        names |= {path: "/".join(path.parts[-length:]) for path in ours}
        if len(set(names.values())) == len(names):
            break
    return names


def _add_bundle(found: _Found, folder: Path) -> None:
    try:
        bundle = read_bundle(folder)
    except IncompatibleError as error:
        found.incompatible.append(f"{error}: give a bundle's folder, or files of records")
        return
    if found.bundle is not None:
        found.incompatible.append(
            f"{folder} is a second bundle beside {found.bundle.folder}: give one, and of the other "
            "the records to compare"
        )
        return
    found.bundle = bundle
    for path in sorted((folder / RECORDS).glob("*.json")):
        name = f"{RECORDS}/{path.name}"
        recorded = bundle.manifest.files.get(name)
        if recorded is not None and recorded != sha256_file(path):
            found.incompatible.append(
                f"{path} was changed after {MANIFEST} was written: fetch or export it again"
            )
        else:
            _add_record(found, path, name, others_left_out=True)


def _add_record(found: _Found, path: Path, name: str, others_left_out: bool = False) -> None:
    try:
        record = open_record(path)
    except QsunError as error:
        found.problems.append(f"{error}: give a bundle's folder, or files of records")
        return
    if others_left_out and str(record.kind) not in NEEDS and record.schema == SCHEMA:
        found.left_out.append(f"{name} ({record.kind})")
        return
    wrong = list(_wrong(record))
    found.problems += [f"{path}: {line}" for line in wrong]
    if not wrong:
        digest = sha256_file(path)
        found.sources.setdefault(digest, Source(name, digest, record))


def _wrong(record: Record) -> Iterator[str]:
    if record.schema != SCHEMA:
        yield (
            f"has schema {record.schema}, this qsun reads schema {SCHEMA}: make it again by "
            f"`{record.command or 'its command'}`, or use the qsun that wrote it"
        )
    elif str(record.kind) not in NEEDS:
        yield f"is of the kind {record.kind}, which no report shows: {', '.join(NEEDS)}"
    else:
        missing = problems_of(record)
        remedy = "" if not missing else f"{missing[-1]}: make the record again"
        yield from [*missing[:-1], remedy] if remedy else []


def _of_other_bundles(found: _Found) -> Iterator[str]:
    if found.bundle is None:
        return
    for source in found.sources.values():
        other = source.bundle
        if source.record.kind in OF_ONE_BUNDLE and other not in (None, found.bundle.digest):
            yield (
                f"{source.name} is the {source.record.kind} of another bundle ({other}), not of "
                f"{found.bundle.folder} ({found.bundle.digest}): leave it out, or make its own"
            )


def hardware_key(source: Source) -> str:
    """What two sources' hardware is compared by."""
    return json.dumps(source.record.hardware, sort_keys=True, default=str)
