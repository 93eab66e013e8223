"""What a task's tuning record says of its prefill module, as a section of the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qsun.bundle import PrefillModule
from qsun.records import Record

SYSTEMS = {
    "base": "the base model alone",
    "full-ft": "fine-tuned with a decoder of its own, which this bundle does not hold",
    "naive": "that module, handed to the base model as decoder",
    "sun": "tuned through the frozen base model as decoder",
    "qsun": "tuned through a frozen quantized decoder",
}
FULL_PRECISION_SYSTEMS = ("sun", "full-ft")


def task_section(
    module: PrefillModule, record: Record | None, quantized_decoder: bool
) -> Iterator[str]:
    """The lines of one task; `quantized_decoder` is whether this bundle's decode module is."""
    yield f"### {module.task}"
    yield ""
    if record is None:
        yield "Its tuning record is missing: how it was tuned and what it scores are not known."
        return
    result = record.result
    yield (
        f"Tuned on {result['rows']['train']['rows']} rows, seed {record.seed}. Scores and losses "
        "are of the tuning run and its decoder, not of this bundle as served."
    )
    if quantized_decoder and module.system in FULL_PRECISION_SYSTEMS:
        yield "It was tuned for a decoder in full precision; the one here is quantized."
    yield ""
    yield from _scores(result)
    losses = ", ".join(f"`{name}` {loss:.3f}" for name, loss in result["validation_loss"].items())
    yield f"Validation loss, nats a token: {losses}."
    named = [name for name in SYSTEMS if name in {*result["tests"], *result["validation_loss"]}]
    yield ""
    yield "; ".join(f"`{name}`: {SYSTEMS[name]}" for name in named) + "."
    yield ""
    yield _licences(module)


def _scores(result: Mapping[str, Any]) -> Iterator[str]:
    overlaps = result["task"].get("overlap_with_training", {})
    rows = [
        f"| {test} | `{system}` | {_score(found)} | {found['total']} | {_overlap(overlaps, test)} |"
        for system, tests in result["tests"].items()
        for test, found in tests.items()
    ]
    if not rows:
        yield "No test was run."
        yield ""
        return
    yield "| test | system | right, % (95 % interval) | problems | sharing text with training |"
    yield "|---|---|---|---|---|"
    yield from rows
    yield ""


def _score(found: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in found["interval_95"])
    return f"{100 * found['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def _overlap(overlaps: Mapping[str, Any], test: str) -> str:
    found = overlaps.get(test)
    if found is None:
        return "not recorded"
    return f"{found['shared']}, by {found['n']} words in a row"


def _licences(module: PrefillModule) -> str:
    if not module.licences:
        return "Licences of its task data: none in its definition."
    named = ", ".join(f"{source} ({licence})" for source, licence in module.licences.items())
    return f"Licences of its task data: {named}."
