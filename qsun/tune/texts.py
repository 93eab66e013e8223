"""Texts: a task's splits as tokens, refused where a response would have no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsun.chats import encode_prompts
from qsun.errors import DataError, bullet_list
from qsun.tasks.definition import TaskDefinition
from qsun.tasks.examples import Example, TaskData
from qsun.tune.batches import Encoded, encode_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = list[list[int]]


@dataclass(frozen=True)
class Texts:
    """Rows to train on and to take the loss of, and the prompts to answer."""

    train: Encoded
    validation: Encoded
    validation_prompts: Prompts
    test_prompts: dict[str, Prompts]


def encode_task(
    task: TaskDefinition,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
) -> Texts:
    """Tokenize all splits.

    Raises:
        DataError: no response tokens are left, or a test leaves no room for its response.
    """

    def prompts(examples: Sequence[Example]) -> Prompts:
        return encode_prompts([(one.messages, one.source) for one in examples], tokenizer)

    def rows(examples: Sequence[Example], split: str) -> Encoded:
        return encode_examples(examples, tokenizer, task.max_tokens, f"{task.name} {split}")

    test_prompts = {name: prompts(examples) for name, examples in data.tests.items()}
    _check_room(task, test_prompts, context_tokens)
    return Texts(
        rows(data.train, "train"),
        rows(data.validation, "validation"),
        prompts(data.validation),
        test_prompts,
    )


def _check_room(task: TaskDefinition, prompts: dict[str, Prompts], context_tokens: int) -> None:
    """Refuse tests with nothing to hand off, or whose responses would leave the context."""
    bare = [name for name, every in prompts.items() if any(len(prompt) < 2 for prompt in every)]
    if bare:
        raise DataError(
            f"task {task.name}: tests {', '.join(bare)} have prompts under 2 tokens: the prefill "
            "module would have nothing to hand off"
        )
    room = context_tokens - task.max_new_tokens
    too_long = {
        name: sum(len(prompt) > room for prompt in every) for name, every in prompts.items()
    }
    problems = [f"{name}: {count} prompts" for name, count in too_long.items() if count]
    if problems:
        raise DataError(
            f"task {task.name}: max_new_tokens {task.max_new_tokens} is more than these tests "
            f"leave of the model's {context_tokens} tokens:\n{bullet_list(problems)}\n"
            "Lower max_new_tokens, or leave these tests out."
        )
