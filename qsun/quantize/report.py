"""The report of a quantization: tables that a person reads, from its record alone.

What an engine has not taken is said to be not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qsun.layer_picture import by_kind
from qsun.quantize.coverage_tables import coverage_section
from qsun.quantize.reasons import FACTORS, SHARE, Reason, typical, worst_layers
from qsun.quantize.tables import UNKNOWN, error_text, markdown_table, percent

RULES = f"""\
A layer's error is the product of four factors, and nothing is left over:

- **weights**: the error of the weights rounded to nearest, over the weights. It grows with fewer
  bits and with wider groups.
- **inputs**: how far that error reaches into the outputs, over what it would if the inputs' energy
  were spread evenly over all directions. Above 1, rounding falls on the strong inputs.
- **outputs**: the same of the weights themselves, inverted. Large where the outputs are small for
  weights of this size on inputs of this energy, so that any error is large beside them.
- **search**: what the search leaves of round-to-nearest's error. The more the inputs tell of each
  other, the less it is.

*typical* is the geometric mean over all layers; the table has each factor over its typical value,
and their product is the layer's error over the typical one. The reason is the factor that makes at
least {percent(SHARE)} of that excess, as logarithms go; where none does there is no single
cause."""


def report(name: str, record: Mapping[str, Any], picture: str, picture_text: str) -> str:
    """The report as Markdown; `record` is a quantization's, as plain values.

    `picture` is the file beside it, `picture_text` what is said in its place.
    """
    result = record["result"]
    sections = [
        f"# Quantization of {name}",
        "\n".join(_facts(record)),
        f"![{picture_text}]({picture})",
        "## The worst layers",
        *_worst(result["quantization"]),
        "## What calibration covered",
        *coverage_section(result),
        "## Kinds of layers",
        _kinds(result),
        "## All layers",
        _all_layers(result["quantization"]["layers"]),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(record: Mapping[str, Any]) -> Iterator[str]:
    settings, result = record["config"]["quantize"], record["result"]
    plan, found = result["plan"], result["quantization"]
    layers, values = found["layers"], found["perplexity"]
    full = values["full_precision"]
    stored = 16 * found["layer_bytes"] / found["layer_bytes_full_precision"]
    yield f"- base model: `{_origin(result['base']['model'])}`, engine {settings['engine']}"
    yield (
        f"- {len(layers)} layers of {_bits_in_words(layers)} bits, "
        f"{'symmetric' if plan['symmetric'] else 'asymmetric'}: {stored:.2f} stored bits a weight, "
        f"{found['size_ratio']:.3f} of 16-bit"
    )
    yield (
        f"- typical error {error_text(typical(layers).error)}, worst "
        f"{error_text(max(layer['error'] for layer in layers))}; relative, of a layer's outputs"
    )
    yield f"- perplexity on held-out text: full precision {full:.3f}, " + ", ".join(
        f"{label} {values[key]:.3f} ({100 * (values[key] / full - 1):+.1f} %)"
        for label, key in (("quantized", "quantized"), ("round-to-nearest", "round_to_nearest"))
    )


def _origin(model: str) -> str:
    """Where the base model is from; of a local folder no more than its name."""
    return Path(model).name if model.startswith((".", "/", "~")) else model


def _bits_in_words(layers: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(str(bits) for bits in sorted({layer["bits"] for layer in layers}))


def _worst(quantization: Mapping[str, Any]) -> Iterator[str]:
    layers, stages = quantization["layers"], quantization.get("stages") or []
    reasons = worst_layers(layers, stages)
    words = [factor.word for factor in FACTORS]
    yield markdown_table(
        ["layer", "bits", "error", "round-to-nearest", "of typical", *words, "reason"],
        [
            [
                reason.layer["name"],
                str(reason.layer["bits"]),
                error_text(reason.layer["error"]),
                error_text(reason.layer["rtn_error"]),
                f"x {reason.excess:.2f}",
                *(_factor(reason, word) for word in words),
                reason.text,
            ]
            for reason in reasons
        ],
    )
    if any(reason.factors for reason in reasons):
        yield RULES
    else:
        yield "Reasons are not known: this engine keeps no sums of what its layers read."
    yield from _inherited(reasons)


def _factor(reason: Reason, word: str) -> str:
    return f"x {reason.factors[word]:.2f}" if word in reason.factors else UNKNOWN


def _inherited(reasons: Sequence[Reason]) -> Iterator[str]:
    """What came with the inputs of the worst layers, where the search was given both."""
    rows = [
        [reason.layer["name"], *(error_text(value) for value in (*found, reason.layer["error"]))]
        for reason in reasons
        if None not in (found := _against_full_precision(reason.layer))
    ]
    if not rows:
        yield "What comes with inputs that earlier layers' rounding has changed is not known."
        return
    yield (
        "Against the outputs that full precision has, on a sample of the positions. *inherited* is "
        "what the changed inputs alone do to the outputs, *in all* what they and the codes do; "
        "*own* is the error above, on the inputs as they are."
    )
    yield markdown_table(["layer", "inherited", "in all", "own"], rows)


def _against_full_precision(layer: Mapping[str, Any]) -> tuple[Any, Any]:
    numbers = layer.get("numbers") or {}
    return numbers.get("inherited_error"), numbers.get("total_error")


def _kinds(result: Mapping[str, Any]) -> str:
    layers, symmetric = result["quantization"]["layers"], result["plan"]["symmetric"]
    return markdown_table(
        [
            *("kind", "layers", "bits", "group", "stored bits a weight", "median error"),
            *("worst", "round-to-nearest, median"),
        ],
        [
            [
                kind,
                str(len(ours)),
                _bits_in_words(ours),
                " and ".join(str(size) for size in sorted({one["group_size"] for one in ours})),
                f"{sum(stored_bits(one, symmetric) for one in ours) / len(ours):.2f}",
                error_text(median(one["error"] for one in ours)),
                error_text(max(one["error"] for one in ours)),
                error_text(median(one["rtn_error"] for one in ours)),
            ]
            for kind, ours in by_kind(layers).items()
        ],
    )


def stored_bits(layer: Mapping[str, Any], symmetric: bool) -> float:
    """Bits that a weight's code takes on disk, and its share of a 16-bit scale and a zero."""
    packed = layer.get("stored_bits", layer["bits"])
    return float(packed + (16 + (0 if symmetric else packed)) / layer["group_size"])


def _all_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(
        ["layer", "bits", "error", "round-to-nearest", "inherited", "in all"],
        [
            [
                layer["name"],
                str(layer["bits"]),
                error_text(layer["error"]),
                error_text(layer["rtn_error"]),
                *(
                    UNKNOWN if value is None else error_text(value)
                    for value in _against_full_precision(layer)
                ),
            ]
            for layer in layers
        ],
    )
