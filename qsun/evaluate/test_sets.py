"""Test sets: those of qsun's task definitions as lm-eval's tasks, and lm-eval's own by name.

A definition's test set is a generation task: the prompt is the text after which an answer begins,
with the model's own chat template, as prefill modules are tuned on; its checker judges.
`calib/lm_eval/*.yaml` are such tasks for lm-eval's own command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsun.chats import prompt_texts
from qsun.errors import DataError
from qsun.evaluate.registry import register_models
from qsun.models import load_tokenizer
from qsun.tasks.checkers import CHECKERS, FORMS
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_tests

SPLIT = "test"
ACCURACY, INVALID = "accuracy", "invalid"
# The argument of lm-eval's models that names where the tokenizer lies.
TOKENIZER_ARGUMENTS = ("tokenizer", "pretrained")

register_models()


@dataclass(frozen=True)
class TestSet:
    """One test set of a task: a definition's, or lm-eval's own where there is no `definition`."""

    task: str
    test: str
    definition: Path | None = None

    @property
    def name(self) -> str:
        """Unique among all, and a file's name."""
        return f"{self.task}.{self.test}"

    def lm_eval(self, tokenizer: Path) -> str | dict[str, Any]:
        """The task as `lm_eval.simple_evaluate` takes it."""
        if self.definition is None:
            return self.test
        return generation_task(self.name, self.definition, self.test, tokenizer)


def generation_task(name: str, definition: Path, test: str, tokenizer: Path) -> dict[str, Any]:
    """A definition's test set as the config of an lm-eval task."""
    task = load_task(definition)
    arguments = {"definition": str(definition), "test": test, "tokenizer": str(tokenizer)}
    return {
        "task": name,
        "custom_dataset": read_test_set,
        "dataset_kwargs": arguments,
        "output_type": "generate_until",
        "test_split": SPLIT,
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "process_results": judge,
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": list(task.stop),
            "max_gen_toks": task.max_new_tokens,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": ACCURACY, "aggregation": "mean", "higher_is_better": True},
            {"metric": INVALID, "aggregation": "mean", "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    }


def read_test_set(definition: str, test: str, **arguments: Any) -> Mapping[str, Any]:
    """The rows of a test set by split, each with `prompt`, `answer` and `checker`.

    `arguments` are those of the model, as lm-eval passes them on: the tokenizer is found by them.

    Raises:
        DataError: there is no such test set, or nothing names a tokenizer.
    """
    return _read(definition, test, _tokenizer_folder(arguments))


def _tokenizer_folder(arguments: Mapping[str, Any]) -> Path:
    for name in TOKENIZER_ARGUMENTS:
        if arguments.get(name):
            return Path(str(arguments[name]))
    if arguments.get("bundle"):
        return Path(str(arguments["bundle"])) / "tokenizer"
    raise DataError("a test set needs the model's tokenizer: name its folder as `tokenizer`")


@cache
def _read(definition: str, test: str, tokenizer: Path) -> Mapping[str, Any]:
    from datasets import Dataset

    task = load_task(Path(definition))
    sets = read_tests(task, Path(definition).absolute().parent)
    if not sets.get(test):
        known = ", ".join(sets) or "none"
        raise DataError(f"{definition}: no test set {test!r} with a row (it has {known})")
    examples = sets[test]
    texts = prompt_texts(
        [(one.messages, one.source) for one in examples], load_tokenizer(tokenizer)
    )
    rows = [
        {"prompt": text, "answer": one.answer, "checker": task.checker}
        for text, one in zip(texts, examples, strict=True)
    ]
    return {SPLIT: Dataset.from_list(rows)}


def judge(row: Mapping[str, Any], responses: list[str]) -> dict[str, float]:
    """Whether the response is right, and whether it has no form that could be."""
    checker, response = row["checker"], responses[0]
    right = CHECKERS[checker]([response], [row["answer"]])[0]
    return {ACCURACY: float(right), INVALID: float(not FORMS[checker](response))}
