"""Calls: the JSON text of functions, and of the calls that BFCL's acceptable values stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPTIONAL = ""  # among the acceptable values: the parameter may be left out

Acceptable = Mapping[str, Sequence[Any]]  # by parameter: each value that is right for it


def canonical_calls(ground_truth: Sequence[Mapping[str, Acceptable]]) -> str:
    """One right response: the first acceptable value each, without what is better left out.

    `[{"f": {"x": [1, 2], "unit": ["", "m"]}}]` gives `[{"name": "f", "arguments": {"x": 1}}]`.
    """
    calls = [
        {"name": name, "arguments": _arguments(acceptable)}
        for call in ground_truth
        for name, acceptable in call.items()
    ]
    return json_text(calls)


def json_text(value: Any) -> str:
    """JSON as a model should see it; Jinja's own `tojson` escapes quotes and sorts keys."""
    return json.dumps(value, ensure_ascii=False)


def _arguments(acceptable: Acceptable) -> dict[str, Any]:
    return {key: _unfolded(value) for key, value in _first_values(acceptable).items()}


def _unfolded(value: Any) -> Any:
    """A dictionary, alone or in a list, has acceptable values for its keys; none lie deeper."""
    if isinstance(value, dict):
        return _first_values(value)
    if isinstance(value, list):
        return [_first_values(entry) if isinstance(entry, dict) else entry for entry in value]
    return value


def _first_values(acceptable: Acceptable) -> dict[str, Any]:
    return {
        key: values[0] for key, values in acceptable.items() if values and values[0] != OPTIONAL
    }
