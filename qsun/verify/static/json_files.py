"""JSON files of a module folder, as mappings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsun.errors import ModelError


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ModelError: missing, unreadable, or something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent.name} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent.name}/{path.name} does not hold a JSON object")
    return value
