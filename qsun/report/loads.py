"""Loads: what systems were asked under, and which of them may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.report.amounts import setting
from qsun.report.sources import Source, Sources, hardware_key

SYSTEMS = ("isolated", "sun", "qsun")
SYSTEM = ("bundle", "decode", "policy", "workers", "tasks", "slo")
AXES = {"rate_per_s": "requests/s", "concurrency": "requests at once", "alpha": "Zipf alpha"}


@dataclass(frozen=True)
class Measured:
    """One load of one system: what was asked, what came of it, and the record that says so."""

    label: str
    source: Source
    load: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Mapping[str, Any]]

    @property
    def key(self) -> str:
        """What loads are compared by: all that is recorded of them."""
        return _text(self.load)

    def rest(self, axis: str) -> str:
        """The load without what an axis varies."""
        return _text({key: value for key, value in self.load.items() if key != axis})


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def measured(found: Sequence[Source], sources: Sources) -> list[Measured]:
    """Every load of some bench records; systems in one order, named apart.

    Several records of one system, each with loads of its own, are read as one.
    """
    labels = {id(source): _label(source, sources) for source in found}
    for label in set(labels.values()):
        same = [source for source in found if labels[id(source)] == label]
        if not _one_system(same):
            labels |= {id(source): f"{label}, {source.name}" for source in same}
    ordered = sorted(found, key=lambda source: _place(source.result["system"]))
    return [
        Measured(labels[id(source)], source, point["load"], point["runs"], point["summary"])
        for source in ordered
        for point in source.result["points"]
    ]


def _one_system(found: Sequence[Source]) -> bool:
    """Whether records are of one system on one machine, and no load is in two of them."""
    systems = {
        _text([hardware_key(one), *(one.result.get(name) for name in SYSTEM)]) for one in found
    }
    loads = [_text(point["load"]) for one in found for point in one.result["points"]]
    return len(systems) == 1 and len(set(loads)) == len(loads)


def rank(system: str | None) -> int | None:
    """A system's place among those that are compared."""
    return SYSTEMS.index(system) if system in SYSTEMS else None


def _place(system: str | None) -> int:
    found = rank(system)
    return len(SYSTEMS) if found is None else found


def _label(source: Source, sources: Sources) -> str:
    result = source.result
    system = result["system"] or "system not named"
    interrupted = "" if result["complete"] else " (interrupted)"
    return f"{system}{sources.which(source)}{interrupted}"


def comparable(found: Sequence[Measured]) -> list[list[Measured]]:
    """Those of equal hardware and equal tasks together."""
    groups: dict[str, list[Measured]] = {}
    for one in found:
        key = _text([hardware_key(one.source), one.source.result["tasks"]])
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def mismatches(groups: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """Why some systems are not compared, in words."""
    first = groups[0][0].source
    for group in groups[1:]:
        other = group[0].source
        for what, ours, theirs in (
            ("hardware", first.hardware, other.hardware),
            ("tasks", ", ".join(first.result["tasks"]), ", ".join(other.result["tasks"])),
        ):
            if ours != theirs:
                yield f"{first.name} and {other.name}: {what} {ours} against {theirs}"


def unpaired(group: Sequence[Measured]) -> list[tuple[str, list[str]]]:
    """The loads that not all of a group's systems ran, with those that did."""
    labels = list(dict.fromkeys(one.label for one in group))
    by_load: dict[str, list[Measured]] = {}
    for one in group:
        by_load.setdefault(one.key, []).append(one)
    return [
        (in_words(same[0].load), [one.label for one in same])
        for same in by_load.values()
        if {one.label for one in same} != set(labels)
    ]


def shared(group: Sequence[Measured]) -> dict[str, Any]:
    """What all loads of a group have in common."""
    first = group[0].load
    return {
        key: value
        for key, value in first.items()
        if all(_text(one.load.get(key)) == _text(value) for one in group)
    }


def varying(load: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What is a load's own."""
    return {key: value for key, value in load.items() if key not in common}


def in_words(load: Mapping[str, Any]) -> str:
    """A load, or a part of one."""
    words = []
    for key, value in load.items():
        if value is None or (key == "arrivals" and load.get("concurrency")):
            continue
        if key in AXES:
            said = (
                f"{AXES[key]} {setting(value)}"
                if key == "alpha"
                else f"{setting(value)} {AXES[key]}"
            )
            words.append(said)
        elif key == "trace":
            words.append(f"trace {value}")
        elif key == "arrivals":
            words.append(f"{value} arrivals")
        else:
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)


def order(one: Measured) -> tuple[float, ...]:
    """Loads in the order of their axes."""
    return tuple(float(one.load.get(axis) or 0) for axis in AXES)
