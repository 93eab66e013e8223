"""Batches: every row in its turn, rows of like length together, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qsun.chats import encode_prompts, encode_responses
from qsun.errors import DataError
from qsun.sources import SourceDefinition
from qsun.tasks.examples import Example
from qsun.tune.batches import (
    IGNORED,
    Encoded,
    MicroBatches,
    Row,
    encode_examples,
    model_inputs,
    padding_share,
)
from tests.builders import problems, tiny_tokenizer

SOURCE = SourceDefinition(name="sums", kind="jsonl", prompt="prompt", response="response")


def many_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of very different lengths; the first token of a prompt is the row's number."""
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [7] * round(rng.lognormvariate(4, 1))

    return [Row([number, 7, *tokens()], [7, *tokens()]) for number in range(count)]


def numbers(found: MicroBatches) -> list[list[int]]:
    """The rows of each micro-batch, by number."""
    return [[row.prompt[0] for row in found[index]] for index in range(len(found))]


def in_order(found: MicroBatches) -> list[int]:
    return [row for micro_batch in numbers(found) for row in micro_batch]


@pytest.mark.parametrize(("count", "batch"), [(64, 8), (50, 8), (1000, 32), (5000, 128)])
def test_each_row_comes_once_an_epoch(count: int, batch: int) -> None:
    found = MicroBatches(many_rows(count), batch, batch // 4, epochs=1, seed=0)
    assert found.steps == count // batch
    assert len(found) == found.steps * 4
    assert {len(micro_batch) for micro_batch in numbers(found)} == {batch // 4}
    order = in_order(found)
    assert len(set(order)) == len(order) == count // batch * batch


@pytest.mark.parametrize(("count", "batch"), [(64, 8), (50, 8), (5000, 128)])
def test_an_epoch_ends_before_the_next_begins(count: int, batch: int) -> None:
    found = MicroBatches(many_rows(count), batch, batch // 4, epochs=3, seed=0)
    assert found.steps == 3 * count // batch
    order = in_order(found)
    dropped = 3 * count - len(order)
    times = Counter(order)
    assert dropped == 3 * count % batch
    assert set(times) == set(range(count))
    assert sorted(Counter(times.values()).items()) == sorted(
        {2: dropped, 3: count - dropped}.items() if dropped else {3: count}.items()
    )
    # Until the first epoch's rows fill no batch any more, none comes a second time.
    whole = count // batch * batch
    assert len(set(order[:whole])) == whole
    # And a step never learns one row twice.
    for start in range(0, whole, batch):
        assert len(set(order[start : start + batch])) == batch


def test_the_order_is_the_seeds() -> None:
    rows = many_rows(200)
    first = numbers(MicroBatches(rows, 8, 4, epochs=2, seed=1))
    assert numbers(MicroBatches(rows, 8, 4, epochs=2, seed=1)) == first
    assert numbers(MicroBatches(rows, 8, 4, epochs=2, seed=2)) != first
    torch.manual_seed(5)
    random.seed(5)
    assert numbers(MicroBatches(rows, 8, 4, epochs=2, seed=1)) == first


def test_the_second_epoch_has_an_order_of_its_own() -> None:
    order = in_order(MicroBatches(many_rows(200), 8, 4, epochs=2, seed=1))
    steps = [frozenset(order[start : start + 8]) for start in range(0, len(order), 8)]
    first, second = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    assert first != second
    assert len(set(first) & set(second)) < 5


def test_micro_batches_hold_rows_of_like_length() -> None:
    rows = many_rows(8000)
    found = MicroBatches(rows, 64, 16, epochs=1, seed=0)
    share = padding_share(rows, found)
    assert share < 0.5 * random_share(rows, 16)
    assert share == pytest.approx(share_of([found[index] for index in range(len(found))]))


def test_a_batch_holds_rows_of_different_lengths() -> None:
    found = numbers(MicroBatches(many_rows(2000), 64, 8, epochs=1, seed=0))
    rows = many_rows(2000)
    means = [sum(len(rows[row]) for row in micro_batch) / 8 for micro_batch in found]
    within = [
        max(means[start : start + 8]) / min(means[start : start + 8]) for start in range(0, 240, 8)
    ]
    assert sum(within) / len(within) > 2
    # No curriculum: the run's first half is as long as its second.
    half = len(means) // 2
    assert sum(means[:half]) / sum(means[half:]) == pytest.approx(1, abs=0.2)


def random_share(rows: Sequence[Row], size: int) -> float:
    shuffled = random.Random(0).sample(list(rows), len(rows))
    return share_of([shuffled[start : start + size] for start in range(0, len(rows), size)])


def share_of(chosen: list[list[Row]]) -> float:
    """Padding of all positions, by the shapes that a model gets."""
    padded = tokens = 0
    for rows in chosen:
        inputs = model_inputs(rows)
        padded += inputs["prompts"].numel() + inputs["labels"].numel()
        tokens += int(inputs["prompt_lengths"].sum() + inputs["labels"].ne(IGNORED).sum())
    return 1 - tokens / padded


def test_fewer_rows_than_a_batch_make_no_step() -> None:
    found = MicroBatches(many_rows(7), 8, 4, epochs=1, seed=0)
    assert (found.steps, len(found)) == (0, 0)
    assert MicroBatches(many_rows(7), 8, 4, epochs=3, seed=0).steps == 2


def test_model_inputs_are_padded_and_labelled() -> None:
    inputs = model_inputs([Row([5, 6], [1, 0, 3]), Row([7, 8, 9], [4])])
    assert inputs["prompts"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert inputs["prompt_lengths"].tolist() == [2, 3]
    assert inputs["labels"].tolist() == [[1, 0, 3], [4, IGNORED, IGNORED]]


def examples(count: int) -> list[Example]:
    return [
        Example((("user", row["prompt"] * (1 + index % 4)),), row["response"], "", SOURCE)
        for index, row in enumerate(problems(count, seed=1))
    ]


def lengths(split: list[Example]) -> list[tuple[int, int]]:
    tokenizer: Any = tiny_tokenizer()
    prompts = encode_prompts([(one.messages, one.source) for one in split], tokenizer)
    responses = encode_responses([one.response for one in split], tokenizer)
    return [(len(prompt), len(end)) for prompt, end in zip(prompts, responses, strict=True)]


def encode(split: list[Example], max_tokens: int) -> Encoded:
    return encode_examples(split, tiny_tokenizer(), max_tokens, "sums train")


def test_rows_are_encoded_whole_where_there_is_room() -> None:
    split = examples(40)
    found = encode(split, max_tokens=512)
    assert (found.cut, found.dropped) == (0, 0)
    assert [(len(row.prompt), len(row.response)) for row in found.rows] == lengths(split)
    tokenizer = tiny_tokenizer()
    for row, one in zip(found.rows, split, strict=True):
        assert row.response[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.response[:-1]) == one.response
        assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")


def test_what_is_cut_and_dropped_is_counted() -> None:
    split = examples(40)
    both = lengths(split)
    limit = sorted({prompt for prompt, _ in both})[-2] + 5
    found = encode(split, max_tokens=limit)
    assert found.dropped == sum(prompt >= limit for prompt, _ in both) > 0
    assert found.cut == sum(prompt < limit < prompt + response for prompt, response in both) > 0
    assert len(found.rows) == len(split) - found.dropped
    assert max(map(len, found.rows)) == limit
    summary = found.summary()
    assert (summary["cut"], summary["dropped"]) == (found.cut, found.dropped)
    assert summary["response_tokens"] == sum(len(row.response) for row in found.rows)
    assert summary["prompt_tokens"] == sum(len(row.prompt) for row in found.rows)


def test_the_digest_knows_every_token_and_where_the_prompt_ends() -> None:
    def digest(*rows: Row) -> str:
        return str(Encoded(list(rows), 0, 0).summary()["sha256"])

    one = digest(Row([5, 6], [1, 2]))
    assert digest(Row([5, 6], [1, 2])) == one
    assert len({one, digest(Row([5, 6, 1], [2])), digest(Row([5, 6], [1, 3]))}) == 3
    assert digest(Row([5, 6], [1]), Row([7, 8], [2])) != digest(Row([7, 8], [2]), Row([5, 6], [1]))


def test_no_response_tokens_left_is_an_error() -> None:
    with pytest.raises(DataError, match="sums train: no response tokens are left: all 40 prompts"):
        encode(examples(40), max_tokens=min(prompt for prompt, _ in lengths(examples(40))))


def test_a_prompt_of_one_token_is_an_error() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ '.' }}")
    with pytest.raises(DataError, match="source sums: a prompt has 1 token"):
        encode_examples(examples(1), tokenizer, 512, "sums train")
