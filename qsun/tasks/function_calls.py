"""Function calls: whether a response calls the right functions with acceptable arguments.

A response is JSON, `[{"name": "f", "arguments": {"x": 1}}]`, and nothing around it. What is
acceptable follows BFCL v4's rules for Python (its AST checker), which its tests compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.calls import OPTIONAL, Acceptable
from qsun.errors import DataError

TYPES: dict[str, type[Any]] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
IGNORED_IN_TEXT = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class Call:
    """One call of a response."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """The types that a function's specification gives a parameter and, in a list, its entries."""

    kind: type[Any]
    entries: type[Any] | None


@dataclass(frozen=True)
class ExpectedCall:
    """A function as specified, and the values that are right for each of its parameters."""

    name: str
    required: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    acceptable: Acceptable


def check_function_calls(responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each response makes its answer's calls, in any order.

    An answer is JSON: `{"calls": ..., "functions": ...}` with BFCL's acceptable values and the
    functions' specifications, or a list of calls that must be equal.

    Raises:
        DataError: an answer is neither.
    """
    return [
        _is_right(response, answer) for response, answer in zip(responses, answers, strict=True)
    ]


def makes_calls(response: str) -> bool:
    """Whether a response is calls at all, right or wrong."""
    return _calls(response) is not None


def _is_right(response: str, answer: str) -> bool:
    try:
        expected = json.loads(answer)
    except ValueError as error:
        raise DataError(f"checker function-calls: an answer is not JSON: {error}") from error
    if isinstance(expected, list):
        return _is_equal(response, answer)
    calls = _calls(response)
    return calls is not None and _is_matched(calls, _expected_calls(expected))


def _calls(response: str) -> list[Call] | None:
    """The calls of a response; a single one may stand without a list around it."""
    try:
        found = json.loads(response)
    except (ValueError, RecursionError):
        return None
    entries = found if isinstance(found, list) else [found]
    return [Call(**entry) for entry in entries] if all(map(_is_call, entries)) else None


def _is_call(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"name", "arguments"}
        and isinstance(entry["name"], str)
        and isinstance(entry["arguments"], dict)
    )


def _is_equal(response: str, answer: str) -> bool:
    if _calls(answer) is None:
        raise DataError(
            "checker function-calls: an answer must list calls with name and arguments, not "
            f"{answer[:60]!r}"
        )
    return _calls(response) is not None and _sorted_texts(response) == _sorted_texts(answer)


def _sorted_texts(calls: str) -> list[str]:
    """Each call as text that is the same for the same call: 2.0 is 2, and true is not 1."""
    found = json.loads(calls, parse_float=_plain_number)
    entries = found if isinstance(found, list) else [found]
    return sorted(json.dumps(entry, sort_keys=True) for entry in entries)


def _plain_number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _expected_calls(answer: Any) -> list[ExpectedCall]:
    try:
        functions = answer["functions"]
        return [
            _expected_call(name, acceptable, functions)
            for call in answer["calls"]
            for name, acceptable in call.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "checker function-calls: an answer needs calls, [{function: {parameter: [values]}}], "
            "and functions, whose parameters have properties (each with a type among "
            f"{', '.join(TYPES)}; arrays with items) and required; one lacks {error}"
        ) from error


def _expected_call(name: str, acceptable: Acceptable, functions: Any) -> ExpectedCall:
    named = [function for function in functions if function["name"] == name]
    if not named:
        raise DataError(
            f"checker function-calls: an answer calls {name}, which is not among its functions: "
            f"{', '.join(function['name'] for function in functions)}"
        )
    specified = named[0]["parameters"]
    parameters = {key: _parameter(value) for key, value in specified["properties"].items()}
    return ExpectedCall(name, tuple(specified["required"]), parameters, acceptable)


def _parameter(specified: Any) -> Parameter:
    kind = TYPES[specified["type"]]
    return Parameter(kind, TYPES[specified["items"]["type"]] if kind is list else None)


def _is_matched(calls: list[Call], expected: list[ExpectedCall]) -> bool:
    """Each expected call takes the first call left that is right for it."""
    left = list(calls)
    for call in expected:
        taken = next((at for at, entry in enumerate(left) if _is_right_call(entry, call)), None)
        if taken is None:
            return False
        del left[taken]
    return not left


def _is_right_call(call: Call, expected: ExpectedCall) -> bool:
    known = expected.parameters.keys() & expected.acceptable.keys()
    left_out = expected.acceptable.keys() - call.arguments.keys()
    return (
        call.name == expected.name
        and call.arguments.keys() >= set(expected.required)
        and call.arguments.keys() <= known
        and all(OPTIONAL in expected.acceptable[key] for key in left_out)
        and all(
            _is_right_value(value, expected.parameters[key], expected.acceptable[key])
            for key, value in call.arguments.items()
        )
    )


def _is_right_value(value: Any, parameter: Parameter, acceptable: Sequence[Any]) -> bool:
    if parameter.kind is float and type(value) is int:
        value = float(value)
    if not _has_right_type(value, parameter, acceptable):
        return False
    # Acceptable values of another type than the specified one stand for themselves.
    if _stated_type(acceptable) not in (None, parameter.kind) or type(value) is not parameter.kind:
        return value in acceptable
    if isinstance(value, dict):
        return _is_right_dict(value, acceptable)
    if isinstance(value, list) and parameter.entries is dict:
        return any(_are_right_dicts(value, entries) for entries in acceptable)
    if isinstance(value, list):
        return _standard_list(value) in [
            _standard_list(entries) for entries in acceptable if isinstance(entries, list | str)
        ]
    if isinstance(value, str):
        return _standard(value) in _standard_list(
            entry for entry in acceptable if isinstance(entry, str)
        )
    return value in acceptable


def _has_right_type(value: Any, parameter: Parameter, acceptable: Sequence[Any]) -> bool:
    """The specified type, or else that of the acceptable values; in a list, of each entry."""
    if type(value) is not parameter.kind:
        return type(value) is _stated_type(acceptable)
    if parameter.entries is None:
        return True
    return any(
        not isinstance(entries, list)
        or all(type(entry) in (parameter.entries, _stated_type(entries)) for entry in value)
        for entries in acceptable
    )


def _stated_type(acceptable: Iterable[Any]) -> type | None:
    return next((type(value) for value in acceptable if value != OPTIONAL), None)


def _is_right_dict(value: dict[str, Any], acceptable: Iterable[Any]) -> bool:
    return any(
        isinstance(entry, dict)
        and value.keys() <= entry.keys()
        and all(_standard(value[key]) in _standard_list(entry[key]) for key in value)
        and all(OPTIONAL in entry[key] for key in entry.keys() - value.keys())
        for entry in acceptable
    )


def _are_right_dicts(value: list[Any], acceptable: Any) -> bool:
    return (
        isinstance(acceptable, list | str)
        and len(value) == len(acceptable)
        and all(
            isinstance(entry, dict) and _is_right_dict(entry, [expected])
            for entry, expected in zip(value, acceptable, strict=True)
        )
    )


def _standard_list(values: Iterable[Any]) -> list[Any]:
    return [_standard(value) for value in values]


def _standard(value: Any) -> Any:
    """Text without what is a matter of taste: case, kind of quote, some punctuation."""
    if not isinstance(value, str):
        return value
    return IGNORED_IN_TEXT.sub("", value).lower().replace("'", '"')
