"""Records: what is written is read again, with what made it; files appear whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import qsun
from qsun.config import LoadCheckConfig
from qsun.errors import QsunError
from qsun.files import size, write_json
from qsun.records import SCHEMA, Record, new_record, peak_memory_bytes, read_record


def make_record() -> Record:
    return new_record("quantization", LoadCheckConfig(prompts=5), 7, {"loss": 0.25})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "records" / "quantization.json"
    record = make_record()
    record.write(path)
    assert read_record(path, "quantization") == record


def test_a_record_says_what_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/opt/bin/qsun", "quantize", "my run.yaml", "--dry-run"]
    monkeypatch.setattr(sys, "argv", typed)
    record = make_record()
    assert record.command == "qsun quantize 'my run.yaml' --dry-run"
    assert record.config["prompts"] == 5
    assert record.seed == 7
    assert record.schema == SCHEMA == 1
    assert record.versions["qsun"] == qsun.__version__
    assert record.versions.keys() >= {"python", "torch", "transformers", "llmcompressor"}
    assert record.hardware["cores"] > 0
    assert record.hardware["memory_gib"] > 0
    assert record.created.endswith("+00:00")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "verdict"}, "is a verdict of schema 1, not a quantization of schema 1"),
        ({"schema": 2}, "is a quantization of schema 2, not a quantization of schema 1"),
        ({"extra": 1}, "is not a qsun record"),
    ],
)
def test_another_record_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "record.json"
    make_record().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(QsunError) as caught:
        read_record(path, "quantization")
    assert f"{path} {said}" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"kind": "quantization"}'])
def test_no_record_at_all_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(QsunError, match="is not a qsun record"):
        read_record(path, "quantization")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_is_json_for_every_reader(tmp_path: Path) -> None:
    # NaN and Infinity are Python's own additions; other readers stop at them.
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "record.json", {"perplexity": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (1024**2, "1.00 MiB"), (1e11, "93.13 GiB")],
)
def test_a_size_has_a_unit_that_shows_it(count: float, text: str) -> None:
    assert size(count) == text


def test_peak_memory_is_that_of_this_program_alone() -> None:
    held = bytearray(b"x") * (600 << 20)
    code = "from qsun.records import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory_bytes() > len(held)
    assert 5 << 20 < int(told.stdout) < 300 << 20
