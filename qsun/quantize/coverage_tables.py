"""Tables of what calibration covered: each source, and the inputs of each kind of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from qsun.quantize.reasons import FEW, few_positions
from qsun.quantize.tables import UNKNOWN, error_text, markdown_table, percent


def coverage_section(result: Mapping[str, Any]) -> Iterator[str]:
    """What calibration covered, by source and by stage; `result` is a quantization's."""
    sources = result["calibration"].get("coverage")
    if sources is None:
        yield f"By source: {UNKNOWN}."
    else:
        yield markdown_table(
            [
                *("source", "samples", "left out", "prompt tokens", "decode positions"),
                *(
                    "tokens of the vocabulary there",
                    "read whole beside",
                    "longest context",
                    "share",
                ),
            ],
            [_source_row(one) for one in sources],
        )
        yield (
            "Decode positions are those that the decode module computes, with as many different "
            "tokens of the vocabulary; *read whole beside* are positions of texts that it reads by "
            "itself. *share* is what a source's positions count for. Samples are left out that "
            "keep no response within `max_tokens`."
        )
    yield from _stages(result["quantization"].get("stages") or [])


def _source_row(source: Mapping[str, Any]) -> list[str]:
    name, *counts, share = source.values()
    return [name, *(f"{count:,}" for count in counts), percent(share)]


def _stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not stages:
        yield (
            f"How many directions of the layers' inputs they cover is {UNKNOWN}: this engine keeps "
            "no sums of what its layers read."
        )
        return
    yield markdown_table(
        [
            *("inputs of", "inputs", "positions", "an input", "directions"),
            *("largest channel", "independent", "changed"),
        ],
        [_stage_row(kinds, ours) for kinds, ours in _by_stage(stages).items()],
    )
    yield (
        "Medians over blocks. *directions* is the effective rank of the inputs' Gram matrix G, "
        "tr(G)^2 / ||G||^2. *independent* is the share of an input's energy that is in none of the "
        "weaker inputs, *largest channel* what one input holds, *changed* the relative difference "
        "from full precision's inputs."
    )
    few = _by_stage(few_positions(stages))
    if few:
        yield (
            f"**Few positions**, under {FEW} for an input: {', '.join(few)}. The search fits them, "
            "and errors on other text are larger than those above; more samples mend it."
        )


def _by_stage(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        kinds = ", ".join(name.rpartition(".")[2] for name in stage["layers"])
        found.setdefault(kinds, []).append(stage)
    return found


def _stage_row(kinds: str, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    def middle(key: str) -> float:
        return float(median(stage[key] for stage in stages))

    changed = [stage["input_change"] for stage in stages]
    return [
        kinds,
        f"{middle('inputs'):,.0f}",
        f"{middle('positions'):,.0f}",
        f"{median(stage['positions'] / stage['inputs'] for stage in stages):.1f}",
        f"{middle('directions'):.1f}",
        percent(middle("largest_channel")),
        percent(middle("independence")),
        UNKNOWN if None in changed else error_text(median(changed)),
    ]
