"""Floors: what an accuracy may not fall below, as data; compared unrounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.errors import ConfigError, FloorError, bullet_list, nearest
from qsun.evaluate.systems import SYSTEMS
from qsun.settings import load_settings


@dataclass(frozen=True)
class Floor:
    """A system's least accuracy on a test set, 0 to 1; or the least share of `of`'s accuracy."""

    system: str
    test: str
    accuracy: float | None = field(default=None, metadata={"minimum": 0.0, "maximum": 1.0})
    of: str | None = None
    ratio: float | None = field(default=None, metadata={"minimum": 0.0})


@dataclass(frozen=True)
class Floors:
    """A file of floors."""

    floors: tuple[Floor, ...]


def load_floors(path: Path) -> tuple[Floor, ...]:
    """Read floors from a YAML file.

    Raises:
        ConfigError: every mistake, each named.
    """
    found = load_settings(Floors, path).floors
    problems = [] if found else ["floors: there is none"]
    for number, one in enumerate(found):
        where = f"floors[{number}]"
        for name in filter(None, (one.system, one.of)):
            if name not in SYSTEMS:
                problems.append(f"{where}: there is no system {name!r} ({nearest(name, SYSTEMS)})")
        if (one.accuracy is None) == (one.ratio is None) or (one.of is None) != (one.ratio is None):
            problems.append(f"{where}: give either accuracy, or of and ratio")
    if problems:
        raise ConfigError(f"{path} has {len(problems)} mistake(s):\n{bullet_list(problems)}")
    return found


def require_measured(floors: tuple[Floor, ...], planned: Mapping[str, list[str]]) -> None:
    """Refuse floors of what will not be measured; `planned` gives each test set's systems.

    Raises:
        ConfigError: names them all.
    """
    problems = [
        f"{one.test}: {name} is not evaluated ({', '.join(planned) or 'no test set'})"
        for one in floors
        for name in filter(None, (one.system, one.of))
        if name not in planned.get(one.test, [])
    ]
    if problems:
        raise ConfigError(f"these floors would never be looked at:\n{bullet_list(problems)}")


def require_floors(floors: tuple[Floor, ...], systems: Mapping[str, Any]) -> None:
    """Compare a scorecard's `systems` with its floors.

    Raises:
        FloorError: names every accuracy that fell below, and its floor.
    """
    problems = []
    for one in floors:
        found = systems[one.test][one.system]["accuracy"]
        least = one.accuracy
        what = ""
        if one.of is not None and one.ratio is not None:
            reference = systems[one.test][one.of]["accuracy"]
            least, what = one.ratio * reference, f" ({one.ratio} of {one.of}'s {reference})"
        if least is not None and found < least:
            problems.append(f"{one.test}: {one.system} {found} is below {least}{what}")
    if problems:
        raise FloorError(f"accuracy fell below its floor:\n{bullet_list(problems, at_most=40)}")
