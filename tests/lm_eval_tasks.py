"""Local lm-eval tasks of every output type, few rows each, and what lm-eval finds by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
)
CHOICES = ("Paris", "Rome", "Tokyo", "Buenos Aires")
STORY = (
    "Once upon a time there was a baker who got up before the sun to knead the dough. "
    "Every morning the whole street smelled of fresh bread, and the children came by on their "
    "way to school. One day the oven stayed cold, and nobody knew why. "
)
TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "{{label}}",
        "num_fewshot": 3,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "loglikelihood": {
        "doc_to_target": " {{capital}}, of course",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generate_until": {
        "doc_to_target": "{{capital}}",
        "num_fewshot": 3,
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def capitals(**_arguments: Any) -> dict[str, Dataset]:
    """Rows of a split that is asked, and of one that few-shot examples come from."""
    rows = [
        {
            "country": country,
            "capital": capital,
            "label": CHOICES.index(capital) if capital in CHOICES else 3,
            "story": f"{country}. {STORY * (1 + index % 3)}{capital}.",
        }
        for index, (country, capital) in enumerate(CAPITALS)
    ]
    return {"test": Dataset.from_list(rows), "shown": Dataset.from_list(rows[::-1])}


def local_task(output_type: str, **changes: Any) -> dict[str, Any]:
    """A task of this output type as lm-eval's config; `changes` are keys of it."""
    return {
        "task": f"local_{output_type}",
        "custom_dataset": capitals,
        "output_type": output_type,
        "test_split": "test",
        "fewshot_split": "shown",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "Question: What is the capital of {{country}}?\nAnswer:",
        "metadata": {"version": 1.0},
        **TASKS[output_type],
        **changes,
    }


def asked(
    lm: Any, task: dict[str, Any], limit: int | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """What lm-eval scores a model with, and each row's responses."""
    found = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    (rows,) = found["samples"].values()
    rows = sorted(rows, key=lambda row: int(row["doc_id"]))
    (scores,) = found["results"].values()
    numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
    return numbers, [row["resps"] for row in rows]


@contextmanager
def hurried() -> Iterator[None]:
    """lm-eval without its half-second look at this machine, which no score depends on."""
    with patch("lm_eval.evaluator.add_env_info"), patch("lm_eval.evaluator.get_git_commit_hash"):
        yield


def numbers_in(responses: list[Any]) -> list[float]:
    """Every log-likelihood among responses, in order."""
    found: list[float] = []
    for one in responses:
        if isinstance(one, list | tuple):
            found += numbers_in(list(one))
        elif isinstance(one, float):
            found.append(one)
    return found
