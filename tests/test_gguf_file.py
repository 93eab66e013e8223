"""GGUF: SmolLM2's own file, opened once where transformers would open it for each of its parts."""

from __future__ import annotations

import gguf
import pytest

from qsun.gguf_file import gguf_config
from tests.reference import smollm2_file


def test_a_file_is_parsed_once_and_the_reader_is_gguf_s_own_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    assert gguf_config(smollm2_file())["architectures"] == ["LlamaForCausalLM"]
    assert opened == [str(smollm2_file())]
    assert gguf.GGUFReader is Counted
