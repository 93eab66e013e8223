"""Our verdicts on function calls are BFCL's own, over its data and over answers gone wrong."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qsun.calls import canonical_calls
from qsun.errors import DataError
from qsun.tasks.function_calls import check_function_calls

Json = dict[str, Any]
CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
# Mistakes of the data: a parameter that is required, but better left out ("" comes first); one that
# the function does not specify, but must be given; one that no value is acceptable for.
UNANSWERABLE = {
    "simple_python": {"simple_python_200"},
    "parallel_multiple": {"parallel_multiple_26"},
    "live_simple": {"live_simple_106-63-0", "live_simple_112-68-0"},
    "live_multiple": {
        *("live_multiple_144-56-0", "live_multiple_507-149-4", "live_multiple_834-178-9"),
        *("live_multiple_862-181-3", "live_multiple_964-207-0"),
    },
}
TYPED_VALUES: tuple[Any, ...] = (
    "some other text",
    7,
    2.5,
    True,
    None,
    [],
    ["x"],
    [1],
    {},
    {"x": 1},
    [{"x": 1}],
    "",
)


@cache
def cases(category: str) -> list[Json]:
    """Each problem with its answer."""
    spec = find_spec("bfcl_eval")
    assert spec is not None
    assert spec.origin is not None
    data = Path(spec.origin).parent / "data"
    name = f"BFCL_v4_{category}.json"
    answers = {row["id"]: row for row in map(json.loads, (data / "possible_answer" / name).open())}
    return [row | answers[row["id"]] for row in map(json.loads, (data / name).open())]


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[Json, str, list[Json]], bool]]:
    """BFCL's AST checker; the table of models that it looks into would import their clients."""

    class AnyModel:
        underscore_to_dot = False

    stub = ModuleType("bfcl_eval.constants.model_config")
    stub.__dict__["MODEL_CONFIG_MAPPING"] = defaultdict(AnyModel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

        def says(case: Json, category: str, calls: list[Json]) -> bool:
            output = [{call["name"]: call["arguments"]} for call in calls]
            answer = case["ground_truth"]
            said = checker(case["function"], output, answer, python, category, "any")
            return bool(said["valid"])

        yield says


def expected(case: Json) -> str:
    return json.dumps({"calls": case["ground_truth"], "functions": case["function"]})


def mutations(case: Json) -> Iterator[list[Json]]:
    """The right answer, and what a model makes of it."""
    right: list[Json] = json.loads(canonical_calls(case["ground_truth"]))
    yield right
    yield right[::-1]
    yield [*right, right[0]]
    yield right[:-1]
    yield right[1:] + right[1:2]
    for at, call in enumerate(right):

        def changed(at: int = at, **changes: Any) -> list[Json]:
            calls = copy.deepcopy(right)
            calls[at]["arguments"].update(changes)
            return calls

        renamed = copy.deepcopy(right)
        renamed[at]["name"] += "_other"
        yield renamed
        yield changed(no_such_parameter=1)
        specified = function_named(case, call["name"])["parameters"]["properties"]
        for key in specified:
            if key not in call["arguments"]:
                yield changed(**{key: default(specified[key])})
        for key, value in call["arguments"].items():
            left_out = copy.deepcopy(right)
            del left_out[at]["arguments"][key]
            yield left_out
            for other in (*TYPED_VALUES, *variants(value)):
                yield changed(**{key: other})
        ground_truth = case["ground_truth"][at][call["name"]]
        for key, acceptable in ground_truth.items():
            for other in acceptable:
                yield changed(**{key: other})


def function_named(case: Json, name: str) -> Json:
    return next(entry for entry in case["function"] if entry["name"] == name)


def default(specified: Json) -> Any:
    return specified.get("default", {"string": "", "boolean": False}.get(specified["type"], 0))


def variants(value: Any) -> Iterator[Any]:
    """Values that are nearly `value`."""
    if isinstance(value, str):
        yield from (value.upper(), value.replace(" ", ""), f"{value}.", f"{value}!", f"'{value}'")
        yield from (value.replace("'", '"'), value.replace(",", " -_*^/"), value[:-1], [value])
    elif isinstance(value, bool):
        yield from (not value, int(value), str(value))
    elif isinstance(value, int | float):
        yield from (value + 1, -value, float(value), int(value), str(value), [value], bool(value))
    elif isinstance(value, list):
        yield from (value[::-1], value[:-1], value + value[:1], value[0] if value else 0)
        for at, entry in enumerate(value):
            for other in variants(entry):
                yield [*value[:at], other, *value[at + 1 :]]
    elif isinstance(value, dict):
        yield from ([value], value | {"no_such_key": 1}, str(value))
        for key, entry in value.items():
            yield {other: value[other] for other in value if other != key}
            for other in variants(entry):
                yield value | {key: other}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_verdict_is_bfcls(
    category: str, oracle: Callable[[Json, str, list[Json]], bool]
) -> None:
    tried = [
        (case, calls, oracle(case, category, calls))
        for case in cases(category)
        for calls in mutations(case)
    ]
    ours = check_function_calls(
        [json.dumps(calls) for _, calls, _ in tried], [expected(case) for case, _, _ in tried]
    )
    wrong = [
        (case["id"], calls, case["ground_truth"], said)
        for (case, calls, said), verdict in zip(tried, ours, strict=True)
        if verdict != said
    ]
    assert wrong == []
    assert {said for *_, said in tried} == {True, False}


@pytest.mark.parametrize("category", CATEGORIES)
def test_canonical_calls_are_right(category: str) -> None:
    found = check_function_calls(
        [canonical_calls(case["ground_truth"]) for case in cases(category)],
        [expected(case) for case in cases(category)],
    )
    wrong = {case["id"] for case, right in zip(cases(category), found, strict=True) if not right}
    assert wrong == UNANSWERABLE.get(category, set())


FUNCTIONS = [
    {
        "name": "book",
        "parameters": {
            "type": "dict",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "nights": {"type": "integer"},
                "price": {"type": "float"},
                "extras": {"type": "array", "items": {"type": "string"}},
            },
        },
    }
]
TRUTH = [{"book": {"city": ["St. Gallen"], "nights": ["", 2], "price": [90.0], "extras": ["", []]}}]
BOOKING = {"city": "st gallen", "price": 90}


def verdict(response: Any, truth: Any = TRUTH) -> bool:
    text = response if isinstance(response, str) else json.dumps(response)
    answer = json.dumps({"calls": truth, "functions": FUNCTIONS})
    return check_function_calls([text], [answer])[0]


def booking(**changes: Any) -> Json:
    return {"name": "book", "arguments": BOOKING | changes}


def test_a_call_is_right_by_bfcls_rules() -> None:
    assert verdict([booking()])
    assert verdict(booking())  # one call alone
    assert verdict([booking(city="ST-GALLEN", nights=2, extras=[])])
    assert not verdict([booking(city="Bern")])
    assert not verdict([booking(nights="2")])
    assert not verdict([booking(nights=2.0)])
    assert not verdict([booking(price=True)])
    assert not verdict([booking(stars=5)])
    assert not verdict([booking(), booking()])
    assert not verdict([])


@pytest.mark.parametrize(
    ("acceptable", "extras", "right"),
    [
        ([["spa"], None, 3], ["Spa"], True),
        ([["spa"], None, 3], [3], False),
        ([["spa"], None, 3], "spa", False),
        # The first one gives the other type that counts.
        ([["spa"], None, 3], None, False),
        ([None, ["spa"]], None, True),
    ],
)
def test_acceptable_values_may_differ_in_type(
    acceptable: list[Any], extras: Any, right: bool
) -> None:
    truth = [{"book": {"city": ["Bern"], "extras": acceptable}}]
    call = {"name": "book", "arguments": {"city": "Bern", "extras": extras}}
    assert verdict([call], truth) == right


@pytest.mark.parametrize(
    "text",
    [
        *("", "book", "null", "3", "[3]", "[[]]", "{}", "[" * 100_000),
        "Sure! " + json.dumps([booking()]),
        f"```json\n{json.dumps([booking()])}\n```",
        json.dumps([{"name": "book"}]),
        json.dumps([{"name": 1, "arguments": BOOKING}]),
        json.dumps([{"name": "book", "arguments": [BOOKING]}]),
        json.dumps([booking() | {"id": 1}]),
    ],
)
def test_what_is_no_list_of_calls_is_wrong(text: str) -> None:
    assert not verdict(text)


def test_calls_match_in_any_order_and_each_once() -> None:
    truth = [{"book": {"city": [city], "nights": [1]}} for city in ("Bern", "Chur")]
    calls = [
        {"name": "book", "arguments": {"city": city, "nights": 1}} for city in ("Chur", "Bern")
    ]
    assert verdict(calls, truth)
    assert not verdict(calls[:1] * 2, truth)
    # The one that is wrong by its type alone stays, and is one too many.
    wrong = {"name": "book", "arguments": {"city": "Bern", "nights": True}}
    assert not verdict([wrong, calls[1]], truth)
    assert not verdict([wrong, *calls], truth)


def test_a_list_of_calls_must_be_equal() -> None:
    answer = json.dumps([{"name": "f", "arguments": {"x": 1, "y": "a"}}, booking()])

    def says(*calls: Json) -> bool:
        return check_function_calls([json.dumps(calls)], [answer])[0]

    assert says(booking(), {"name": "f", "arguments": {"y": "a", "x": 1.0}})
    assert not says(booking(), {"name": "f", "arguments": {"y": "A", "x": 1}})
    assert not says(booking(), {"name": "f", "arguments": {"y": "a", "x": True}})
    assert not says(booking())
    assert not check_function_calls(["no calls"], [answer])[0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("no JSON", "an answer is not JSON"),
        ("[3]", "an answer must list calls"),
        ("3", "an answer needs calls"),
        ('{"calls": []}', "one lacks 'functions'"),
        (json.dumps({"calls": [{"fly": {}}], "functions": FUNCTIONS}), "fly, which is not among"),
    ],
)
def test_a_broken_answer_is_named(answer: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_function_calls([json.dumps([booking()])], [answer])


def test_canonical_calls_take_first_values_and_leave_out_optional_ones() -> None:
    truth: list[Json] = [
        {
            "f": {
                "x": [1, 2],
                "unit": ["", "m"],
                "none": [],
                "at": [{"city": ["Zürich"], "z": [""]}],
            }
        },
        {"g": {"rows": [[{"a": ["b", "c"]}, {"a": [None]}]], "table": [[[1, 2], [3]]]}},
    ]
    assert canonical_calls(truth) == (
        '[{"name": "f", "arguments": {"x": 1, "at": {"city": "Zürich"}}}, '
        '{"name": "g", "arguments": {"rows": [{"a": "b"}, {"a": null}], "table": [[1, 2], [3]]}}]'
    )
