"""Keys: a file that is wrong is refused line by line, and only whole keys open."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsun.errors import ConfigError
from qsun.serve.keys import SHORTEST, Keys, read_keys

ADA, BERT = "ada-has-a-long-key", "bert-has-another-one"


def keys_of(folder: Path, text: str | bytes) -> Keys:
    path = folder / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_keys(path)


def mistakes(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        keys_of(folder, text)
    return str(caught.value)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return keys_of(tmp_path, f"# who may ask\n\nada {ADA}\n  bert\t{BERT}  \n")


def test_a_key_has_a_name(keys: Keys) -> None:
    assert keys.required
    assert keys.name_of(f"Bearer {ADA}") == "ada"
    assert keys.name_of(f"bearer  {BERT} ") == "bert"


@pytest.mark.parametrize(
    "header",
    [
        *(
            None,
            "",
            "Bearer",
            "Bearer ",
            ADA,
            f"Basic {ADA}",
            f"Bearer {ADA}x",
            f"Bearer {ADA[:-1]}",
        ),
        *(f"Bearer {ADA.upper()}", f"Bearer {ADA} {BERT}", "Bearer ada", f"Token Bearer {ADA}"),
        # What aiohttp makes of header bytes that are no UTF-8.
        *("Bearer \udcff\udcfe", f"Bearer {ADA}\udc80", "Bearer ключ"),
    ],
)
def test_nothing_else_opens(keys: Keys, header: str | None) -> None:
    assert keys.name_of(header) is None


def test_without_keys_none_is_needed() -> None:
    assert not Keys().required
    assert Keys().name_of("Bearer anything-at-all-here") is None


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    text = f"ada {ADA}\nlonely\n# fine\nbert short\nada {BERT}\ncleo one two\n"
    message = mistakes(tmp_path, text)
    for part in (
        "line 2: not NAME KEY",
        f"line 4: bert's key has fewer than {SHORTEST} characters",
        "line 5: ada has a key already",
        "line 6: not NAME KEY",
    ):
        assert part in message
    assert "line 1" not in message
    assert "line 3" not in message


def test_no_message_shows_a_key(tmp_path: Path) -> None:
    message = mistakes(tmp_path, f"ada {ADA}\nada {BERT}\nbert {ADA} {BERT}\ncleo too-short\n")
    assert ADA not in message
    assert BERT not in message
    assert "too-short" not in message


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a note\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    """Else a file that was emptied by mistake would let everybody in."""
    assert "there is no key in it" in mistakes(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing cannot be read"):
        read_keys(tmp_path / "missing")
    assert "cannot be read" in mistakes(tmp_path, b"ada \xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe")


def test_a_shortest_key_is_long_enough(tmp_path: Path) -> None:
    key = "k" * SHORTEST
    assert keys_of(tmp_path, f"ada {key}\n").name_of(f"Bearer {key}") == "ada"
