"""How many rows and tokens a task has, as far as this machine can tell without weights or network.

Rows that lie here are read, and their tokens counted by their characters. Rows on the Hub are not
fetched: counts then come from the config, lengths are assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from qsun.errors import DataError
from qsun.evaluate.estimate import LM_EVAL, UNKNOWN, Asked
from qsun.sources import SourceDefinition
from qsun.tasks.definition import TaskDefinition, load_task
from qsun.tasks.examples import read_task, read_tests
from qsun.tune.estimate import Rows

if TYPE_CHECKING:
    from qsun.evaluate.test_sets import TestSet

CHARACTERS_PER_TOKEN = 3  # fewer than most tokenizers take: the estimate is on the high side
ASSUMED_SHARE = 3 / 16  # of max_tokens, for a prompt and again for a response
ASSUMED_ROWS = 10_000


def rows_of(task: TaskDefinition, relative_to: Path, samples: int | None) -> Rows:
    """The training rows: counted and measured, or assumed and said so."""
    if any(map(_on_the_hub, (*task.train, *task.validation, *task.tests))):
        return _assumed(task, samples, "rows on the Hub are not fetched")
    try:
        found = read_task(task, relative_to, samples).train
    except DataError as error:
        return _assumed(task, samples, f"rows cannot be read ({_first_line(error)})")
    prompt = min(_mean_tokens(one.text for one in found), task.max_tokens - 1.0)
    response = min(_mean_tokens(one.response for one in found), task.max_tokens - prompt)
    told = f"rows counted, a token taken for {CHARACTERS_PER_TOKEN} characters"
    return Rows(len(found), prompt, response, task.max_tokens, told)


def _assumed(task: TaskDefinition, samples: int | None, why: str) -> Rows:
    named = "tune.samples" if samples else "the task's samples"
    count = samples or task.samples
    if count is None:
        count, named = ASSUMED_ROWS, "assumption, as neither tune.samples nor the task has one"
    each = ASSUMED_SHARE * task.max_tokens
    return Rows(count, each, each, task.max_tokens, f"{why}: count by {named}, lengths assumed")


def asked_of(test_set: TestSet, limit: int | None) -> Asked:
    """A test set's prompts: counted and measured, known, or assumed and said so."""
    found = _asked(test_set)
    return found if limit is None else replace(found, prompts=min(limit, found.prompts))


def _asked(test_set: TestSet) -> Asked:
    if test_set.definition is None:
        return LM_EVAL.get(test_set.test, UNKNOWN)
    task, relative_to = load_task(test_set.definition), test_set.definition.absolute().parent
    (source,) = (one for one in task.tests if one.name == test_set.test)
    why = "rows on the Hub are not fetched"
    if not _on_the_hub(source):
        try:
            # The others of the task may be out of reach.
            rows = read_tests(replace(task, tests=(source,)), relative_to)[source.name]
        except DataError as error:
            why = f"rows cannot be read ({_first_line(error)})"
        else:
            prompt = _mean_tokens(one.text for one in rows)
            told = f"rows counted, a token taken for {CHARACTERS_PER_TOKEN} characters"
            return Asked(len(rows), prompt, task.max_new_tokens, told)
    known = LM_EVAL.get(source.name)
    count = task.test_samples or (known or UNKNOWN).prompts
    named = "the task" if task.test_samples else "lm-eval's task" if known else "assumption"
    told = f"{why}: count by {named}, length assumed"
    return Asked(count, ASSUMED_SHARE * task.max_tokens, task.max_new_tokens, told)


def _on_the_hub(source: SourceDefinition) -> bool:
    local = str(source.dataset).startswith((".", "/", "~"))
    return source.kind == "huggingface" and not local


def _mean_tokens(texts: Iterable[str]) -> float:
    return max(1.0, fmean(map(len, texts)) / CHARACTERS_PER_TOKEN)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
