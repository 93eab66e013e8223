"""Checkers by name, final numbers, exact matches, and that importing them is quick."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import pytest

from qsun.errors import DataError
from qsun.tasks.checkers import CHECKERS, FORMS
from qsun.tasks.final_number import check_final_numbers, final_number


def test_checkers_have_the_names_that_definitions_use() -> None:
    assert set(CHECKERS) == {"final-number", "function-calls", "unit-tests", "exact-match"}


def test_checkers_import_nothing_heavy() -> None:
    script = "import sys, qsun.tasks.checkers; print(*{m.partition('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(found.stdout.split())
    assert "qsun" in loaded
    assert loaded & {"torch", "transformers", "numpy", "datasets", "jinja2"} == set()


@pytest.mark.parametrize("name", CHECKERS)
def test_responses_and_answers_must_pair(name: str) -> None:
    with pytest.raises(ValueError, match="shorter"):
        CHECKERS[name](["1"], [])


def test_exact_matches_ignore_space_around() -> None:
    check = CHECKERS["exact-match"]
    assert check([" Yes\n", "yes", "Yes."], ["Yes"] * 3) == [True, False, False]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5, so 9.\n#### 288", "288"),
        ("#### 3\nThe answer is 4.\n#### 4", "3"),
        ("####\n#### 4", "4"),
        ("#### 72 apples in 3 boxes", "72"),
        ("#### $1,234,567.50.", "1234567.50"),
        ("#### -5", "-5"),
        ("####-5", "-5"),
        ("#### €2047.5", "2047.5"),
        ("It grows by 25%.", "25"),
        ("She pays -$5 then", "-5"),
        ("She pays $-5 then", "-5"),
        ("\u22127 degrees", "-7"),
        ("from 10-4", "4"),
        ("the pair 3,4", "4"),
        ("\\boxed{18}", "18"),
        ("**18**", "18"),
        ("a share of .5", "0.5"),
        ("so it is 36 ####", "36"),
        ("12km", "12"),
        ("60/2=30 (thirty)", "30"),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("#### 36.0", "36", True),
        ("#### 36", "36.0", True),
        ("#### 36.4", "36", False),
        ("#### 37", "36", False),
        ("#### -36", "36", False),
        ("1,000", "1000", True),
        ("#### 72", "so 70 + 2 = <<70+2=72>>72\n#### 72", True),
        ("0.3333", "0.33", True),
        ("0.34", "0.33", False),
        ("2047", "2047.5", False),
        ("none at all", "36", False),
        ("", "36", False),
    ],
)
def test_a_response_is_right_to_the_answers_decimals(
    response: str, answer: str, right: bool
) -> None:
    assert check_final_numbers([response], [answer]) == [right]


def test_an_answer_without_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="no number: 'many'"):
        check_final_numbers(["3"], ["many"])


def test_generated_solutions_are_right() -> None:
    import reasoning_gym

    problems = list(reasoning_gym.create_dataset("gsm_symbolic", seed=5, size=300))
    solutions = [problem["metadata"]["answer_cot"] for problem in problems]
    answers = [problem["answer"] for problem in problems]
    assert all(check_final_numbers(solutions, answers))
    assert sum(check_final_numbers(solutions[1:], answers[:-1])) < 30


@pytest.mark.parametrize(
    ("checker", "formed", "formless"),
    [
        ("final-number", "so 12 it is", "I do not know"),
        ("function-calls", '[{"name": "f", "arguments": {}}]', '[{"name": "f"'),
        ("unit-tests", "    return sorted(values)\n", "    return sorted(values\n"),
        ("unit-tests", "```python\ndef f(x):\n    return x\n```", "Let us think step by step."),
        ("unit-tests", "return sorted(values)\n", " \n"),  # of a body, the indentation may be lost
        ("unit-tests", "x = 1\n", "x = '\0'\n"),
        ("exact-match", "Paris", " \n"),
    ],
)
def test_an_answer_without_the_form_of_one_is_told(
    checker: str, formed: str, formless: str
) -> None:
    assert FORMS[checker](formed)
    assert not FORMS[checker](formless)
