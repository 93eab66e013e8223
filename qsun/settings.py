"""Settings: a YAML mapping becomes a frozen dataclass, or one list of everything wrong with it.

Defaults live in the dataclasses alone. A field's metadata may give `choices`, `minimum` and
`maximum`. Precedence: command line flag, then --set, then the file, then the default.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from qsun.errors import ConfigError, bullet_list

Settings = TypeVar("Settings")


def load_settings(cls: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file into `cls`, with `key.path=value` overrides applied first.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; all are named.
    """
    return settings_from(cls, _read_yaml(path), overrides, str(path))


def settings_from(
    cls: type[Settings],
    mapping: dict[str, Any],
    overrides: Sequence[str] = (),
    what: str = "the command line",
) -> Settings:
    """A mapping as `cls`, with overrides applied first; `what` names its origin in messages.

    Raises:
        ConfigError: any key or value is wrong; all are named.
    """
    problems: list[str] = []
    for override in overrides:
        _apply_override(mapping, override, problems)
    result = _build(cls, mapping, "", problems)
    if problems:
        raise ConfigError(f"{what} has {len(problems)} mistake(s):\n{bullet_list(problems)}")
    return typing.cast(Settings, result)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines at its top level")
    return content


def _apply_override(mapping: dict[str, Any], override: str, problems: list[str]) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"--set {override}: write it as key=value, for example quantize.bits=3")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"--set {override}: the value is not valid YAML")
        return
    *parents, last = key.split(".")
    for parent in parents:
        child = mapping.setdefault(parent, {})
        if not isinstance(child, dict):
            problems.append(f"--set {override}: {parent} is a value, not a section")
            return
        mapping = child
    mapping[last] = value


def _build(cls: type, mapping: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    known = {field.name: field for field in fields(cls)}
    for key in mapping:
        if key not in known:
            problems.append(f"{where}{key}: no such setting ({_nearest(str(key), cls)})")
    hints = typing.get_type_hints(cls)
    before = len(problems)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in mapping:
            values[name] = _convert(mapping[name], hints[name], f"{where}{name}", field, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{where}{name}: missing")
    return cls(**values) if len(problems) == before else None


def _nearest(key: str, cls: type) -> str:
    """The likeliest meaning of an unknown key: one of this section, or of a section inside it."""
    names = [field.name for field in fields(cls)]
    inside = {
        field.name: f"{section}.{field.name}"
        for section, hint in typing.get_type_hints(cls).items()
        if is_dataclass(hint)
        for field in fields(hint)
    }
    for known in ({name: name for name in names}, inside):
        near = difflib.get_close_matches(key, known, n=1)
        if near:
            return f"did you mean {known[near[0]]}?"
    return f"known: {', '.join(names)}"


def _convert(value: Any, hint: Any, where: str, field: Field[Any], problems: list[str]) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if is_dataclass(hint):
        if not isinstance(value, dict):
            problems.append(f"{where}: must be a section with keys of its own")
            return None
        return _build(typing.cast(type, hint), value, f"{where}.", problems)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            problems.append(f"{where}: must be a list")
            return ()
        item = typing.get_args(hint)[0]
        return tuple(
            _convert(entry, item, f"{where}[{index}]", field, problems)
            for index, entry in enumerate(value)
        )
    if hint is float:
        value = _as_float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{where}: {value!r} must be of type {hint.__name__}")
        return value
    _check_bounds(value, where, field, problems)
    return value


def _as_float(value: Any) -> Any:
    """A whole number, or `1e-2` (without a dot YAML 1.1 reads it as text), as a float."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _check_bounds(value: Any, where: str, field: Field[Any], problems: list[str]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where}: {value!r} is not a finite number")
        return
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        problems.append(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    if minimum is not None and value < minimum:
        problems.append(f"{where}: {value!r} is below {minimum}")
    if maximum is not None and value > maximum:
        problems.append(f"{where}: {value!r} is above {maximum}")
