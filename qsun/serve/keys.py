"""API keys: who may ask, from a file with one `NAME KEY` a line. Keys are never logged."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from qsun.errors import ConfigError, bullet_list

SHORTEST = 16


class Keys:
    """Names by their keys' digests. Without keys, everybody may ask."""

    def __init__(self, digests: dict[str, bytes] | None = None) -> None:
        self._digests = digests or {}

    @property
    def required(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def name_of(self, authorization: str | None) -> str | None:
        """Whose key an `Authorization: Bearer KEY` header has; None where nobody's.

        Every key is compared, in constant time: how long it takes tells nothing about them.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        names = [name for name, known in self._digests.items() if hmac.compare_digest(known, given)]
        return names[0] if names and scheme.lower() == "bearer" else None


def read_keys(path: Path) -> Keys:
    """Read a file of keys. Empty lines and lines that begin with `#` are left out.

    Raises:
        ConfigError: a file that cannot be read or holds no key; names every line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keys in {path} cannot be read: {error}") from error
    digests: dict[str, bytes] = {}
    wrong = []
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 2:
            wrong.append(f"line {number}: not NAME KEY")
        elif len(parts[1]) < SHORTEST:
            wrong.append(f"line {number}: {parts[0]}'s key has fewer than {SHORTEST} characters")
        elif parts[0] in digests:
            wrong.append(f"line {number}: {parts[0]} has a key already")
        else:
            digests[parts[0]] = _digest(parts[1])
    if not digests and not wrong:
        wrong.append("there is no key in it")
    if wrong:
        raise ConfigError(f"{path}:\n{bullet_list(wrong)}")
    return Keys(digests)


def _digest(key: str) -> bytes:
    # A header holds any bytes; those that are no UTF-8 are nobody's key.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
