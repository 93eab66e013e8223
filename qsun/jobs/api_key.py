"""The key that a router asks for."""

from __future__ import annotations

from pathlib import Path

from qsun.errors import ConfigError


def read_api_key(path: Path | None) -> str | None:
    """The key in a file of one `NAME KEY` a line, or of the key alone; none without a file.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key in {path} cannot be read: {error}") from error
    if not words:
        raise ConfigError(f"there is no key in {path}")
    return words[min(1, len(words) - 1)]
