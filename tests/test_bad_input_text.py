"""Calibration text that is missing, empty or not where the definition says."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.builders import problems, tiny_model, write_config, write_definition, write_jsonl
from tests.command import refused

CHAT = {"prompt": "prompt", "response": "response"}
ROW = b'{"prompt": "How many?", "response": "One."}\n'


class Text:
    """A run over the tiny model whose calibration text a test chooses."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.config = write_config(folder, model)

    def refuse(
        self, rows: list[dict[str, Any]] | bytes, name: str = "mine.jsonl", **source: Any
    ) -> str:
        path = self.folder / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            write_jsonl(path, rows)
        return self.refuse_source(kind="jsonl", path=name, **(source or CHAT))

    def refuse_source(self, **source: Any) -> str:
        write_definition(self.folder / "calibration.yaml", {"name": "mine", **source})
        return refused(self.config, 6)


@pytest.fixture
def text(tmp_path: Path, tiny_folder: Path) -> Text:
    return Text(tmp_path, tiny_folder)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_source(text: Text, content: bytes) -> None:
    assert "source mine: it is empty" in text.refuse(content)


def test_a_missing_file(text: Text) -> None:
    message = text.refuse_source(kind="jsonl", path="nowhere.jsonl", **CHAT)
    assert f"cannot read {text.folder / 'nowhere.jsonl'}: No such file or directory" in message


def test_a_missing_column_lists_the_columns(text: Text) -> None:
    message = text.refuse(problems(9, seed=0), prompt="question", response="response")
    assert "there is no column 'question'; its columns are prompt, response" in message


def test_a_column_missing_in_a_later_row(text: Text) -> None:
    rows: list[dict[str, Any]] = [*problems(3, seed=0), {"response": "alone"}]
    assert "there is no column 'prompt'; its columns are response" in text.refuse(rows)


def test_a_missing_column_of_a_template_lists_the_columns(text: Text) -> None:
    message = text.refuse(problems(9, seed=0), prompt="Q: {{ question }}")
    assert "'question' is undefined; its columns are prompt, response" in message


@pytest.mark.parametrize(
    "template", ["{{ prompt / 2 }}", "{{ prompt", "{{ prompt.__class__.mro() }}"]
)
def test_a_template_that_fails(text: Text, template: str) -> None:
    message = text.refuse(problems(9, seed=0), prompt=template)
    assert f"source mine: template {template!r}: " in message


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (None, "NoneType"), (["a"], "list")])
@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_text_column_without_text(text: Text, column: str, value: object, kind: str) -> None:
    message = text.refuse([{"body": value}] * 9, **{column: "body"})
    assert f"source mine: column 'body' holds {kind}, not text: a row has {value!r}" in message


def test_a_value_that_is_no_text_is_shown_by_its_beginning(text: Text) -> None:
    message = text.refuse([{"body": [7] * 99}] * 9, text="body")
    assert f"a row has {str([7] * 99)[:60]}...\n" in message


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "hi"}],
    ],
)
def test_messages_that_are_none(text: Text, messages: object) -> None:
    message = text.refuse([{"chat": messages}] * 9, messages="chat")
    assert "column 'chat' must hold a list of messages with role and content" in message


def test_too_few_rows(text: Text) -> None:
    message = text.refuse(problems(3, seed=0))
    assert "source mine gave 3 of 4 samples" in message
    assert "Lower samples or min_tokens, or give it more text." in message


def test_rows_that_are_too_short(text: Text) -> None:
    message = text.refuse([{"body": "Hi"}] * 9, text="body")
    assert "gave 0 of 4 samples: 9 of its 9 rows are under min_tokens 8" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": oops}\n', "not a line of JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}\n", "not a line of JSON"),  # an integer too long
        (b"[1]\n", "each line must be a JSON object"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(text: Text, line: bytes, reason: str) -> None:
    # The empty line is skipped as a row and still counts as a line.
    assert f"mine.jsonl:4: {reason}" in text.refuse(ROW + b"\n" + ROW + line + ROW)


def test_a_line_that_is_no_utf8_is_named_by_its_number(text: Text) -> None:
    assert "mine.jsonl:3: " in text.refuse(ROW + ROW + b'{"prompt": "\xff"}\n')


def test_a_gzip_file_that_is_none(text: Text) -> None:
    message = text.refuse(ROW, name="mine.jsonl.gz")
    assert f"cannot read {text.folder / 'mine.jsonl.gz'}: Not a gzipped file" in message


def test_a_gzip_file_that_ends_early(text: Text) -> None:
    whole = gzip.compress(ROW * 1000)
    message = text.refuse(whole[:-20], name="mine.jsonl.gz")
    assert f"cannot read {text.folder / 'mine.jsonl.gz'}: it is cut short or damaged" in message


def test_a_gzip_file_that_is_damaged(text: Text) -> None:
    damaged = bytearray(gzip.compress(ROW * 1000))
    damaged[12:40] = b"\xff" * 28
    message = text.refuse(bytes(damaged), name="mine.jsonl.gz")
    assert f"cannot read {text.folder / 'mine.jsonl.gz'}: it is cut short or damaged" in message


def test_a_missing_package(text: Text) -> None:
    message = text.refuse_source(kind="package", package="no_such", path="a.jsonl", **CHAT)
    assert "package 'no_such' is not installed; `make setup` installs" in message


def test_an_unknown_generator(text: Text) -> None:
    message = text.refuse_source(kind="generator", dataset="no_such", prompt="question")
    assert "source mine: Dataset 'no_such' not registered" in message


def test_a_chat_that_the_model_refuses(tmp_path: Path) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    tiny_model(tmp_path / "model", chat_template=refusing)
    message = refused(write_config(tmp_path / "run", "../model"), 6)
    assert "chat template refuses a row with the roles user, assistant" in message
    assert "roles must alternate" in message


def test_a_data_set_folder_that_is_missing(text: Text) -> None:
    message = text.refuse_source(kind="huggingface", dataset="./nowhere", **CHAT)
    assert f"cannot load {text.folder / 'nowhere'}" in message


def test_a_split_that_is_missing_names_those_there(text: Text) -> None:
    (text.folder / "data").mkdir()
    write_jsonl(text.folder / "data" / "train.jsonl", problems(9, seed=0))
    message = text.refuse_source(kind="huggingface", dataset="./data", split="tset", **CHAT)
    assert "Unknown split \"tset\". Should be one of ['train']" in message


def test_a_data_set_file_that_is_malformed(text: Text) -> None:
    (text.folder / "data").mkdir()
    (text.folder / "data" / "train.jsonl").write_text('{"prompt": oops}\n')
    message = text.refuse_source(kind="huggingface", dataset="./data", **CHAT)
    assert f"cannot load {text.folder / 'data'}: JSON parse error: Invalid value" in message
