"""Checkers: what says whether a response is right, by the name that a task's definition gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qsun.tasks.container import require_sandbox
from qsun.tasks.final_number import check_final_numbers, gives_number
from qsun.tasks.function_calls import check_function_calls, makes_calls
from qsun.tasks.unit_tests import check_unit_tests, is_code

Checker = Callable[[Sequence[str], Sequence[str]], list[bool]]


def check_exact_matches(responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each response is its answer, white space around either aside."""
    return [
        response.strip() == answer.strip()
        for response, answer in zip(responses, answers, strict=True)
    ]


CHECKERS: dict[str, Checker] = {
    "final-number": check_final_numbers,
    "function-calls": check_function_calls,
    "unit-tests": check_unit_tests,
    "exact-match": check_exact_matches,
}

# Whether a response has a form that can be right, by checker: a number, calls, code, any text.
FORMS: dict[str, Callable[[str], bool]] = {
    "final-number": gives_number,
    "function-calls": makes_calls,
    "unit-tests": is_code,
    "exact-match": lambda response: bool(response.strip()),
}


def require_checker(name: str | None) -> None:
    """Make sure that this machine can judge by a checker, before there is anything to judge.

    Raises:
        DataError: it runs programs, and bubblewrap is missing or refused.
    """
    if name == "unit-tests":
        require_sandbox()
