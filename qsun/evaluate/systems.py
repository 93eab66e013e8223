"""Systems: what writes the prompt's cache and what decodes, by the seven names compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.errors import ConfigError, bullet_list, nearest


@dataclass(frozen=True)
class Modules:
    """One task's modules by what they were made as; None for those that there are not."""

    full_ft: Path | None = None
    awq_full_ft: Path | None = None
    sun: Path | None = None
    qsun: Path | None = None


@dataclass(frozen=True)
class System:
    """Who reads a task's prompts and who answers: folders of checkpoints, or of an adapter."""

    name: str
    prefill: Path
    decode: Path

    @property
    def one_model(self) -> bool:
        """Whether prefill and decode module are one by intent."""
        return self.prefill == self.decode


# By name: the prefill module and the decode module, as fields of `Modules` or of `Shared`.
SYSTEMS: Mapping[str, tuple[str, str]] = {
    "base": ("base", "base"),
    "full-ft": ("full_ft", "full_ft"),
    "awq-full-ft": ("awq_full_ft", "awq_full_ft"),
    "naive": ("full_ft", "base"),
    "sun": ("sun", "base"),
    "qsun-post": ("sun", "decode"),
    "qsun": ("qsun", "decode"),
}


@dataclass(frozen=True)
class Shared:
    """What all tasks share: the base model, and the decode module where it is another."""

    base: Path
    decode: Path | None


def systems_of(shared: Shared, modules: Modules) -> list[System]:
    """The systems that these modules make, in the order of `SYSTEMS`."""
    folders = vars(shared) | vars(modules)
    return [
        System(name, folders[prefill], folders[decode])
        for name, (prefill, decode) in SYSTEMS.items()
        if folders[prefill] is not None and folders[decode] is not None
    ]


def choose_systems(
    available: Mapping[str, Sequence[System]], wanted: Sequence[str]
) -> dict[str, list[System]]:
    """Each task's systems among those `wanted`; all where none is named.

    Raises:
        ConfigError: names every unknown system, with the nearest, and what a task lacks.
    """
    problems = [
        f"there is no system {name!r} ({nearest(name, SYSTEMS)})"
        for name in wanted
        if name not in SYSTEMS
    ]
    chosen = {}
    for task, systems in available.items():
        found = {one.name: one for one in systems}
        lacking = [name for name in wanted if name in SYSTEMS and name not in found]
        problems += [f"task {task}: {_needs(name)}" for name in lacking]
        chosen[task] = [one for one in systems if not wanted or one.name in wanted]
        if not found:
            problems.append(f"task {task}: no module makes a system")
    if problems:
        raise ConfigError(f"these systems cannot be evaluated:\n{bullet_list(problems)}")
    return chosen


def _needs(name: str) -> str:
    prefill, decode = SYSTEMS[name]
    needed = " and ".join(dict.fromkeys(one for one in (prefill, decode) if one != "base"))
    return f"{name} needs {needed}"
