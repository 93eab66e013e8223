"""What the page needs of each kind of record: which keys, of which type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qsun.records import Record


@dataclass(frozen=True)
class Value:
    """What may stand at a key: in words, and as a test."""

    word: str
    holds: Callable[[Any], bool]

    @property
    def or_none(self) -> Value:
        """The same, or nothing."""
        return Value(f"{self.word} or null", lambda value: value is None or self.holds(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


TEXT = Value("text", lambda value: isinstance(value, str))
TEXT_OR_NONE = TEXT.or_none
NUMBER = Value("a number", _is_number)
NUMBER_OR_NONE = NUMBER.or_none
YES_OR_NO = Value("true or false", lambda value: isinstance(value, bool))
INTERVAL_OR_NONE = Value("two numbers", _is_interval).or_none
MAPPING = Value("a mapping", lambda value: isinstance(value, dict))

# Of a path's parts, `[]` stands for every entry of a list and `{}` for every value of a mapping,
# of which there must be one with `[+]`; a key that ends with `?` may be missing or null.
RECORD: dict[str, Value] = {
    "config": MAPPING,
    "seed": NUMBER,
    "result": MAPPING,
    "command": TEXT,
    "created": TEXT,
    "versions.{}": TEXT,
    "hardware": MAPPING,
}
_TPOT = {"format": TEXT, "batch": NUMBER, "context_tokens?": NUMBER, "tpot_s": NUMBER}
_LOAD = {
    **{"rate_per_s?": NUMBER, "concurrency?": NUMBER, "arrivals?": TEXT, "alpha?": NUMBER},
    **{"prompt_tokens?": TEXT, "output_tokens?": TEXT, "trace?": TEXT, "seed?": NUMBER},
}
_FLEET = {
    **{"system": TEXT, "tasks": NUMBER, "rate_per_s": NUMBER, "alpha": NUMBER_OR_NONE},
    **{"decode_workers": NUMBER_OR_NONE, "prefill_workers?": NUMBER},
    **{"tpot_p50_s?": NUMBER, "tpot_p99_s?": NUMBER, "ttft_p99_s?": NUMBER},
}


def _below(path: str, keys: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{path}.{key}": value for key, value in keys.items()}


NEEDS: dict[str, dict[str, Value]] = {
    "verdict": {
        "bundle": TEXT_OR_NONE,
        "compatible": YES_OR_NO.or_none,
        **_below("checks.[+]", {"name": TEXT, "outcome": TEXT, "message": TEXT, "remedy?": TEXT}),
        "seconds?.{}": NUMBER,
    },
    "scorecard": {
        "bundle": TEXT_OR_NONE,
        **_below(
            "systems.{+}.{}",
            {"accuracy": NUMBER, "total": NUMBER, "interval_95": INTERVAL_OR_NONE},
        ),
        **_below("pairs?.[]", {"first": TEXT, "second": TEXT, "test": TEXT, "difference": NUMBER}),
        **_below("pairs?.[]", {"interval_95": INTERVAL_OR_NONE, "p?": NUMBER}),
        **_below("floors?.[]", {"system": TEXT, "test": TEXT, "accuracy?": NUMBER}),
        **_below("floors?.[]", {"of?": TEXT, "ratio?": NUMBER}),
        "warnings?.[]": TEXT,
        "limit?": NUMBER,
        **_below("tpot?.by_streams?.[]", dict.fromkeys(("streams", "base_s", "decode_s"), NUMBER)),
    },
    "quantization": {
        **_below(
            "quantization.layers.[+]",
            {"name": TEXT, "bits": NUMBER, "error": NUMBER, "rtn_error": NUMBER},
        ),
        **_below(
            "quantization.perplexity?",
            dict.fromkeys(("full_precision", "round_to_nearest", "quantized"), NUMBER),
        ),
        "quantization.size_ratio?": NUMBER,
        "files?.{}": TEXT,
    },
    "latency": {
        "bundle?": TEXT,
        **_below("tpot.[+]", _TPOT),
        **_below("floor?.[]", _TPOT),
        **_below("prefill?.[]", dict.fromkeys(("prompt_tokens", "seconds"), NUMBER)),
        "hand_off_s?": NUMBER,
    },
    "decode-tpot": {
        **_below("sweeps.[+]", dict.fromkeys(("shape", "name", "label", "backend"), TEXT)),
        "sweeps.[+].kernels.[]": TEXT,
        **_below("sweeps.[+].tpot.[+]", {"batch": NUMBER, "context_tokens": NUMBER}),
        **_below("sweeps.[+].tpot.[+]", {"tpot_s": NUMBER, "floor_s?": NUMBER}),
    },
    "bench": {
        "bundle": TEXT_OR_NONE,
        "system": TEXT_OR_NONE,
        "decode": TEXT_OR_NONE,
        "policy?": TEXT,
        "workers.prefill": NUMBER,
        "workers.decode": NUMBER,
        "tasks.[]": TEXT,
        "slo?.ttft_s?": NUMBER,
        "slo?.tpot_s?": NUMBER,
        "complete": YES_OR_NO,
        "missing?.[]": TEXT,
        **_below("points.[].load", _LOAD),
        **_below("points.[].runs.[]", dict.fromkeys(("sent", "answered", "failed"), NUMBER)),
        "points.[].runs.[].failures?.{}": NUMBER,
        "points.[].runs.[].steady?": YES_OR_NO,
        "points.[].summary.{}.mean": NUMBER_OR_NONE,
        "points.[].summary.{}.interval": INTERVAL_OR_NONE,
    },
    "simulation": _below("fleet?.[]", _FLEET),
}


def problems_of(record: Record) -> list[str]:
    """What a record of a known kind lacks, or has of another type; each key is named."""
    whole = vars(record)
    found = [line for path, value in RECORD.items() for line in _look(whole, path, value)]
    if found:
        return found
    needed = NEEDS[record.kind].items()
    return [line for path, value in needed for line in _look(record.result, path, value, "result")]


def _look(at: Any, path: str, value: Value, where: str = "") -> list[str]:
    """What is wrong along a path: the first of a kind, and how many more there are."""
    found: dict[str, list[str]] = {}
    for line in _follow(at, path.split("."), value, where):
        found.setdefault(re.sub(r"\[.*\]", "[]", line), []).append(line)
    return [
        lines[0] if len(lines) == 1 else f"{lines[0]}, and in {len(lines) - 1} more entries"
        for lines in found.values()
    ]


def _follow(at: Any, parts: Sequence[str], value: Value, where: str) -> Iterator[str]:
    if not parts:
        if not value.holds(at):
            yield f"{where} is not {value.word}"
        return
    part, rest = parts[0], parts[1:]
    if part[0] in "[{":
        yield from _each(at, part, rest, value, where)
        return
    key = part.removesuffix("?")
    here = f"{where}.{key}".lstrip(".")
    if not isinstance(at, dict):
        yield f"{where} is not a mapping"
    elif key in at and (at[key] is not None or key == part):
        yield from _follow(at[key], rest, value, here)
    elif key == part:
        yield f"{here} is missing"


def _each(at: Any, part: str, rest: Sequence[str], value: Value, where: str) -> Iterator[str]:
    kind = list if part[0] == "[" else dict
    if not isinstance(at, kind):
        yield f"{where} is not a {'list' if kind is list else 'mapping'}"
        return
    if not at and "+" in part:
        yield f"{where} is empty"
    entries = enumerate(at) if isinstance(at, list) else at.items()
    for key, entry in entries:
        yield from _follow(entry, rest, value, f"{where}[{key}]")
