"""Values as a JSON schema describes them, for as much of JSON Schema as pydantic writes.

hypothesis-jsonschema would do, but for hypothesis's own insides, which it reaches into.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]
CHARACTERS = st.characters(exclude_categories=["Cs"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(CHARACTERS, max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)
WORDS = {"title", "description", "default"}


def described(schema: Json, definitions: Json) -> st.SearchStrategy[Any]:
    """Values of a schema whose references are names in `definitions`."""
    rest = {key: value for key, value in schema.items() if key not in WORDS}
    if "$ref" in rest:
        return described(definitions[rest.pop("$ref").rpartition("/")[2]], definitions)
    if "anyOf" in rest:
        return st.one_of([described(one, definitions) for one in rest.pop("anyOf")])
    if "const" in rest:
        return st.just(rest["const"])
    if "enum" in rest:
        return st.sampled_from(rest["enum"])
    kind = rest.pop("type")
    made = _KINDS[kind](rest, definitions)
    assert not rest, f"{kind} with {rest}, which is not made here"
    return made


def _text(rest: Json, _: Json) -> st.SearchStrategy[Any]:
    least, most = rest.pop("minLength", 0), rest.pop("maxLength", None)
    if "pattern" in rest:
        # Python's `$` also stands before a last line break.
        return st.from_regex(rest.pop("pattern").replace("$", r"\Z"))
    return st.text(CHARACTERS, min_size=least, max_size=most if most is not None else least + 8)


def _integer(rest: Json, _: Json) -> st.SearchStrategy[Any]:
    most = rest.pop("maximum", None)
    if "exclusiveMaximum" in rest:
        most = rest.pop("exclusiveMaximum") - 1
    return st.integers(rest.pop("minimum", None), most)


def _number(rest: Json, _: Json) -> st.SearchStrategy[Any]:
    above = rest.pop("exclusiveMinimum", None)
    return st.floats(
        rest.pop("minimum", above),
        rest.pop("maximum", None),
        exclude_min=above is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def _array(rest: Json, definitions: Json) -> st.SearchStrategy[Any]:
    least, most = rest.pop("minItems", 0), rest.pop("maxItems", 4)
    items = described(rest.pop("items"), definitions)
    return st.lists(items, min_size=least, max_size=max(least, min(most, 4)))


def _object(rest: Json, definitions: Json) -> st.SearchStrategy[Any]:
    fields = {name: described(one, definitions) for name, one in rest.pop("properties", {}).items()}
    required = rest.pop("required", [])
    known = st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: one for name, one in fields.items() if name not in required},
    )
    more = rest.pop("additionalProperties", True)
    patterns = rest.pop("patternProperties", {})
    rest.pop("maxProperties", None)
    if patterns:
        ((pattern, values),) = patterns.items()
        names = st.from_regex(pattern.replace("$", r"\Z"))
        return st.dictionaries(names, described(values, definitions), max_size=3)
    if more is False:
        return known
    values = ANYTHING if more is True else described(more, definitions)
    others = st.dictionaries(st.text("xyz", min_size=1), values, max_size=2)
    return st.builds(lambda one, other: {**other, **one}, known, others)


_KINDS = {
    "string": _text,
    "integer": _integer,
    "number": _number,
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
    "array": _array,
    "object": _object,
}
