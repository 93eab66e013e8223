"""D by its own codes and scales: none is dead, and they are those that P was tuned through."""

from __future__ import annotations

from pathlib import Path

import torch

from qsun.decode_checkpoint import DecodeCheckpoint, QuantizedLayer
from qsun.decode_recipe import QUANTIZATION, Likeness, likeness
from qsun.records import read_record
from qsun.scheme import Scheme
from qsun.verdict import Check, Outcome
from qsun.verify.subject import TUNING_RECORD, Subject

EXPORT_AGAIN = "Export the bundle again from the module that was tuned for this decode module."
OTHER_WEIGHTS = (
    "Use the decode module that `qsun quantize` made from this base model: nothing that feeds the "
    "cache may be rescaled, rotated or reordered."
)


def codes_checks(decode: Path) -> list[Check]:
    """Whether every group of weights has a scale that leaves something of it.

    Where codes are packed in more bits than they have, also whether they have as few as is said:
    round-to-nearest, which D is compared with, is to so many.
    """
    bad: list[str] = []
    wide: list[str] = []
    groups = 0
    with DecodeCheckpoint(decode) as checkpoint:
        scheme = checkpoint.scheme
        for layer in checkpoint.layers():
            dead = ~(torch.isfinite(layer.scales.float()) & (layer.scales.float() > 0))
            groups += dead.numel()
            if dead.any():
                bad.append(f"{layer.name}: {int(dead.sum())} of {dead.numel()}")
            outside = _outside(layer, scheme.bits_of(layer.name))
            if outside:
                wide.append(f"{layer.name}: {outside}")
    checks = [_scales_check(bad, groups)]
    if scheme.stored_bits is not None:
        checks.append(_code_bits_check(wide, scheme))
    return checks


def _outside(layer: QuantizedLayer, bits: int) -> int:
    """Codes and zeros that so many bits cannot be."""
    most = 2 ** (bits - 1)
    parts = (layer.codes, layer.zeros)
    return sum(int(((part < -most) | (part >= most)).sum()) for part in parts)


def _scales_check(bad: list[str], groups: int) -> Check:
    name, compared = "numeric.scales", "the scale of every group of weights with 0"
    if bad:
        found = "groups whose scale is zero or not finite, all of their weights lost: "
        message = found + "; ".join(bad[:6])
        return Check(name, Outcome.FAILED, compared, message, OTHER_WEIGHTS)
    return Check(name, Outcome.PASSED, compared, f"all {groups} scales are positive and finite")


def _code_bits_check(wide: list[str], scheme: Scheme) -> Check:
    name, compared = "numeric.code_bits", "codes and zeros with config.json's code_bits"
    if wide:
        message = f"outside of the bits that config.json tells: {'; '.join(wide[:6])}"
        return Check(name, Outcome.FAILED, compared, message, "Quantize the module again.")
    return Check(name, Outcome.PASSED, compared, f"{scheme}: all within their own bits")


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
