"""D by its own codes and scales: none is dead, and they are those that P was tuned through."""

from __future__ import annotations

from pathlib import Path

import torch

from qsun.decode_checkpoint import DecodeCheckpoint, Scheme
from qsun.decode_recipe import QUANTIZATION, Likeness, likeness
from qsun.records import read_record
from qsun.verdict import Check, Outcome
from qsun.verify.subject import TUNING_RECORD, Subject

EXPORT_AGAIN = "Export the bundle again from the module that was tuned for this decode module."
OTHER_WEIGHTS = (
    "Use the decode module that `qsun quantize` made from this base model: nothing that feeds the "
    "cache may be rescaled, rotated or reordered."
)


def scales_check(decode: Path) -> Check:
    """Whether every group of weights has a scale that leaves something of it."""
    name, compared = "numeric.scales", "the scale of every group of weights with 0"
    bad: list[str] = []
    groups = 0
    with DecodeCheckpoint(decode) as checkpoint:
        for layer in checkpoint.layers():
            dead = ~(torch.isfinite(layer.scales.float()) & (layer.scales.float() > 0))
            groups += dead.numel()
            if dead.any():
                bad.append(f"{layer.name}: {int(dead.sum())} of {dead.numel()}")
    if bad:
        found = "groups whose scale is zero or not finite, all of their weights lost: "
        message = found + "; ".join(bad[:6])
        return Check(name, Outcome.FAILED, compared, message, OTHER_WEIGHTS)
    return Check(name, Outcome.PASSED, compared, f"all {groups} scales are positive and finite")


def tuned_through_checks(subject: Subject, scheme: Scheme | None) -> list[Check]:
    """Whether D is the quantized module that a P was tuned through, where its record says."""
    results = {
        task: read_record(folder / TUNING_RECORD, "tuning").result
        for task, folder in subject.prefill.items()
        if (folder / TUNING_RECORD).is_file()
    }
    # Of a bundle, the record lies beside the decode module's folder.
    record = (subject.folder or subject.decode) / QUANTIZATION
    compared = "the decode module that P was tuned through with D, by all codes and scales"
    checks = []
    for task, result in results.items():
        digest = result.get("decode_digest")
        if not digest:
            continue
        found = Likeness.OTHER
        if scheme is not None:
            found = likeness(subject.decode, record, digest, result.get("decode_recipe"))
        passed = found is not Likeness.OTHER
        checks.append(
            Check(
                f"numeric.tuned_through.{task}",
                Outcome.PASSED if passed else Outcome.FAILED,
                compared,
                f"{found.value}: {digest[:12]}... then",
                "" if passed else EXPORT_AGAIN,
            )
        )
    return checks
