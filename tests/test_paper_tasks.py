"""The paper's three tasks, read from local copies in the format of their datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsun.errors import DataError
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_task
from tests.builders import write_jsonl

TASKS = Path(__file__).parent.parent / "calib" / "tasks"
CALLS = json.dumps([{"name": "add", "arguments": {"a": 1, "b": 2}}])
# A row of each Hub dataset, with its columns.
ROWS: dict[str, dict[str, Any]] = {
    "meta-math/MetaMathQA": {
        "type": "GSM_AnsAug",
        "query": "What is {} plus 1?",
        "original_question": "What is it plus 1?",
        "response": "It is {}. The answer is: {}",
    },
    "openai/gsm8k": {"question": "How many are 2 and {}?", "answer": "2+{}=9\n#### 9"},
    "nickrosh/Evol-Instruct-Code-80k-v1": {"instruction": "Print {}.", "output": "print({})"},
    "Salesforce/xlam-function-calling-60k": {
        "id": 0,
        "query": "Add 1 and {}.",
        "tools": '[{"name": "add"}]',
        "answers": CALLS,
    },
}


def local_copy(name: str, folder: Path, drop: str | None = None) -> Path:
    """The shipped definition with every Hub dataset as a local folder of the same format."""
    definition = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    definition["validation_samples"] = 4
    for split in ("train", "validation", "tests"):
        for source in definition.get(split, []):
            if source["kind"] != "huggingface":
                continue
            template = ROWS[source["dataset"]]
            rows = [
                {
                    key: value.replace("{}", str(number)) if isinstance(value, str) else value
                    for key, value in template.items()
                    if key != drop
                }
                for number in range(20)
            ]
            data = folder / source["dataset"].replace("/", "-")
            data.mkdir(exist_ok=True)
            write_jsonl(data / f"{source.get('split', 'train')}.jsonl", rows)
            source |= {"dataset": str(data)}
            source.pop("subset", None)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(definition))
    return path


@pytest.mark.parametrize("name", ["paper-math", "paper-code", "paper-tools"])
def test_a_paper_task_reads_its_datasets_columns(name: str, tmp_path: Path) -> None:
    path = local_copy(name, tmp_path)
    data = read_task(load_task(path), path.parent)
    assert (len(data.train), len(data.validation)) == (16, 4)
    assert all(example.text and example.response for example in data.train)
    assert all(example.answer for tests in data.tests.values() for example in tests)


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    path = local_copy("paper-math", tmp_path, drop="query")
    with pytest.raises(DataError, match="'query' is undefined; its columns are type"):
        read_task(load_task(path), path.parent)
