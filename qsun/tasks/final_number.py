"""Final numbers: whether the number that a response ends with is the answer's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from qsun.errors import DataError

MARK = "####"  # before GSM8K's final answers
NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[-\u2212])?"  # in "8-5" it is no sign
    r"[$€£¥₹]?"
    r"(?P<late_sign>(?<=[$€£¥₹])-)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]+)?"
)


def check_final_numbers(responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each response's final number is its answer's, to the decimals that the answer has.

    The final number is the one after the first `####` that has one on its line, since what a model
    that does not stop goes on to say is no answer; without a mark, the last one of the text.
    Thousands' commas, currencies, units and what else stands around it do not count.

    Raises:
        DataError: an answer without a number.
    """
    return [_is_right(*pair) for pair in zip(responses, answers, strict=True)]


def gives_number(response: str) -> bool:
    """Whether a response comes to a number at all, right or wrong."""
    return final_number(response) is not None


def _is_right(response: str, answer: str) -> bool:
    expected = final_number(answer)
    if expected is None:
        raise DataError(f"checker final-number: an answer has no number: {answer[-60:]!r}")
    found = final_number(response)
    if found is None or found == expected:
        return found is not None
    if expected == expected.to_integral_value():
        return False
    last_place = Decimal(1).scaleb(int(expected.as_tuple().exponent))
    return abs(found - expected) <= last_place / 2


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to, if any."""
    for after in text.split(MARK)[1:]:
        if marked := NUMBER.search(after.partition("\n")[0]):
            return _value(marked)
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(match: re.Match[str]) -> Decimal:
    digits = match["digits"].replace(",", "") or "0"
    number = Decimal(digits + (match["decimals"] or ""))
    return -number if match["sign"] or match["late_sign"] else number
