"""What tests share with training is found, counted, and told from the common instruction."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from qsun.tasks import leaks
from qsun.tasks.leaks import N, overlap

RNG = random.Random(7)
WORDS = [f"word{number}" for number in range(5000)]


@dataclass(frozen=True)
class Text:
    text: str
    response: str = ""


def words(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


def texts(count: int, instruction: str = "") -> list[Text]:
    return [Text(f"{words(30)} {instruction}", words(20)) for _ in range(count)]


def test_a_shared_run_of_words_is_found_whatever_its_case_and_punctuation() -> None:
    run = words(N)
    shouted = run.upper().replace(" ", ", ") + "!"
    train = [*texts(3000), Text(words(5), f"{words(5)} {run}")]
    tests = [*texts(2), Text(f"{words(9)}\n{shouted}"), Text(words(3), f"{shouted} {words(2)}")]
    found = overlap(train, tests)
    assert (found.n, found.tests, found.shared, found.boilerplate) == (N, 4, 2, 0)
    assert found.examples == (tests[2].text[:160], tests[3].text)
    assert found.summary() == {
        "n": N,
        "tests": 4,
        "shared": 2,
        "boilerplate": 0,
        "examples": [tests[2].text[:160], tests[3].text],
    }


def test_fewer_words_or_words_across_texts_are_no_run() -> None:
    run = words(N)
    first, last = run.split(" ", 1)
    train = [*texts(10), Text(run), Text(words(2))]
    tests = [Text(last), Text(first, last), Text(words(2), first), Text(last), Text("")]
    assert overlap(train, tests).shared == 0
    assert overlap(train, [*tests, Text(words(20), run)]).shared == 1


def test_the_instruction_that_all_have_is_no_leak() -> None:
    instruction = words(N + 2)
    train = [*texts(300, instruction), Text(f"the last word {instruction}")]
    tests = [*texts(9, instruction), Text(f"the last word {instruction}")]
    found = overlap(train, tests)
    assert (found.shared, found.boilerplate) == (0, 3)
    after = Text(f"{instruction} the first word")
    before = [Text(f"{instruction} {words(20)}") for _ in range(30)]
    assert overlap([*before, after], [after]).shared == 0
    question = train[0].text.split()[:N]
    assert overlap(train, [*tests, Text(" ".join(question))]).shared == 1


def test_a_run_in_few_examples_is_no_instruction() -> None:
    run = words(N)
    for copies, count in ((19, 30), (40, 2000)):
        found = overlap([*texts(count), *[Text(run)] * copies], [Text(run)])
        assert (found.shared, found.boilerplate) == (1, 0)
    found = overlap([*texts(30), *[Text(run)] * 20], [Text(run)])
    assert (found.shared, found.boilerplate) == (0, 1)


def test_an_example_counts_once_for_a_run_that_it_repeats() -> None:
    run = words(N)
    found = overlap([*texts(30), Text(f"{run} " * 25)], [Text(run)])
    assert (found.shared, found.boilerplate) == (1, 0)


def test_chunks_of_examples_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    instruction = words(N)
    train = [*texts(40, instruction), *texts(5)]
    tests = [
        *texts(5),
        train[2],
        *texts(5, instruction),
        train[-1],
        Text(f"{words(9)} {instruction}"),
    ]
    whole = overlap(train, tests)
    assert whole.examples == (tests[5].text[:160], tests[11].text[:160])
    monkeypatch.setattr(leaks, "CHUNK", 3)
    assert overlap(train, tests) == whole


def test_nothing_is_shared_without_training_or_tests() -> None:
    assert overlap([], texts(3)).shared == 0
    assert overlap(texts(3), []).tests == 0


def test_fifty_thousand_words_take_no_time() -> None:
    train = texts(5000)
    start = time.perf_counter()
    assert overlap(train, train[:500]).shared == 500
    assert time.perf_counter() - start < 3
