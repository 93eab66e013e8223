"""One system on one test set, by lm-eval: the same requests for every system, sample by sample."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qsun.errors import ConfigError, DataError, QsunError, bullet_list, nearest
from qsun.evaluate.lm import Generated
from qsun.evaluate.samples import Sample, Samples
from qsun.evaluate.test_sets import ACCURACY, INVALID, TestSet

SEED = 1234  # lm-eval's own, of few-shot examples


@dataclass(frozen=True)
class Asking:
    """What asks a system: lm-eval's tasks, at most `limit` rows of each."""

    tasks: Mapping[str, Any]
    limit: int | None
    unsafe_code: bool = False


def load_test_sets(
    test_sets: Sequence[TestSet], tokenizer: Path, limit: int | None, unsafe_code: bool
) -> Asking:
    """Open every test set, so that what is missing is said before a model is loaded.

    Raises:
        ConfigError: names every test set that lm-eval does not know, or that is a group.
        DataError: names every one that cannot be read, has no row, or runs code unasked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(any(one.definition is None for one in test_sets))
    own = [one.test for one in test_sets if one.definition is None]
    unknown = [_no_task(manager, name) for name in own if name not in manager.all_subtasks]
    if unknown:
        raise ConfigError(f"these test sets do not exist:\n{bullet_list(unknown)}")
    tasks, problems = {}, []
    for one in test_sets:
        try:
            tasks[one.name] = _loaded(manager, one, tokenizer, unsafe_code)
        except QsunError as error:
            problems.append(f"{one.name}: {error}")
    if problems:
        raise DataError(f"these test sets cannot be used:\n{bullet_list(problems)}")
    return Asking(tasks, limit, unsafe_code)


@cache
def _manager(lm_evals_own: bool) -> Any:
    """What opens tasks; listing lm-eval's own takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=lm_evals_own)


def _no_task(manager: Any, name: str) -> str:
    """Why a name is not one task; said before a group's many data sets are fetched."""
    if name not in manager.all_tasks:
        return f"lm-eval has no task {name!r} ({nearest(name, manager.all_subtasks)})"
    members = [one for one in manager.all_subtasks if one.startswith(name)]
    such_as = f", such as {', '.join(members[:3])}" if members else ""
    return f"{name!r} is a group of lm-eval's: name its tasks{such_as}"


def _loaded(manager: Any, one: TestSet, tokenizer: Path, unsafe_code: bool) -> Any:
    try:
        found = manager.load([one.lm_eval(tokenizer)])
    except QsunError:
        raise
    except Exception as error:  # whatever a data set's own code, or the network, raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"it cannot be read: {reason}") from error
    (task,) = found["tasks"].values()
    if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
        raise DataError(
            "it runs generated code without a sandbox: set evaluate.unsafe_code=true, or use the "
            "task `code`, which has one"
        )
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise DataError("it scores whole texts, which has no accuracy: ask it by qsun-lm-eval")
    if not len(task.eval_docs):
        raise DataError("it has no rows")
    return task


def ask(asking: Asking, test_set: TestSet, system: str, lm: Any) -> Samples:
    """All samples of a system on one test set; `lm` is lm-eval's model.

    Raises:
        DataError: no sample is left after the limit, or an answer is missing.
    """
    from lm_eval.evaluator import simple_evaluate

    task = asking.tasks[test_set.name]
    began = lm.seconds
    found = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=_manager(False),  # its own would list every task of lm-eval's each time
        limit=asking.limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=asking.unsafe_code,
        fewshot_random_seed=SEED,
    )
    (rows,) = found["samples"].values() if found else ([],)
    if not rows:
        raise DataError(f"{test_set.name}: no sample is left after --limit {asking.limit}")
    rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    metric = ACCURACY if ACCURACY in rows[0] else _accuracy_of(rows)
    samples = tuple(_sample(row, metric, lm.length_of) for row in rows)
    return Samples(system, test_set.name, metric, lm.seconds - began, samples)


def _accuracy_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first metric that says right or wrong of each row; the first where none does."""
    metrics = [str(name) for name in rows[0]["metrics"]]
    binary = (name for name in metrics if all(row[name] in (0, 1) for row in rows))
    return next(binary, metrics[0])


def _sample(row: Mapping[str, Any], metric: str, length_of: Callable[[str], Any]) -> Sample:
    response = row["filtered_resps"][0]
    text = response if isinstance(response, str) else json.dumps(row["filtered_resps"])
    length: Generated | None = length_of(str(row["arguments"][0][0]))
    return Sample(
        index=int(row["doc_id"]),
        prompt_sha256=row["prompt_hash"],
        target_sha256=row["target_hash"],
        response=text,
        value=float(row[metric]),
        invalid=bool(row[INVALID]) if INVALID in row else None,
        tokens=None if length is None else length.tokens,
        ended=None if length is None else length.ended,
    )
