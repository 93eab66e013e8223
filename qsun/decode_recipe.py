"""The recipe of a decode module: what it was quantized from, with and how, whatever machine did it.

AWQ's search compares sums of floating-point products, which differ from one processor to another in
their last bits: the same recipe gives other codes elsewhere, and other digests of the same module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from qsun.decode_checkpoint import weights_digest
from qsun.records import read_record
from qsun.scheme import candidate_bits

QUANTIZATION = "records/quantization.json"
LLM_COMPRESSOR, OF_ENGINE = "llmcompressor", ("engine", "search")
# What of a quantization's settings, and of its search's, does not change a weight.
NO_WEIGHTS = ("format", "stored_bits", "calibration", "heldout", "tensor_parallel")
# Of prefill modules it is what they hold that counts, not where they lie.
NO_WEIGHTS_OF_SEARCH = ("keep_every_s", "memory", "prefill")


class Likeness(Enum):
    """How a decode module compares with the one that a prefill module was tuned through."""

    SAME = "the same"
    SAME_RECIPE = "of the same recipe"
    OTHER = "another"


def decode_recipe(record: Path) -> str | None:
    """SHA-256 of the recipe that a quantization's record tells; None without a record."""
    if not record.is_file():
        return None
    found = read_record(record, "quantization")
    settings = weight_settings(found.config["quantize"])
    recipe = {
        "base": found.result["base"]["sha256"],
        "calibration": found.result["calibration"]["sha256"],
        "settings": settings,
    }
    if settings.get("engine", LLM_COMPRESSOR) == LLM_COMPRESSOR:
        for name in OF_ENGINE:
            settings.pop(name, None)  # as before there was another engine
    else:
        settings["search"]["prefill"] = found.result["prefill"]
        recipe["sources"] = [one["name"] for one in found.result["calibration"]["sources"]]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def weight_settings(quantize: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings in section `quantize` changes a weight."""
    settings = {name: value for name, value in quantize.items() if name not in NO_WEIGHTS}
    if settings.pop("target_bits", None) is not None:
        # The layers' own bits are of these, and `bits` has no part in them.
        settings["bits"] = {
            "target": quantize["target_bits"],
            "candidates": candidate_bits(quantize["format"], quantize["stored_bits"]),
        }
    if "search" in settings:
        search = settings["search"].items()
        settings["search"] = {
            name: value for name, value in search if name not in NO_WEIGHTS_OF_SEARCH
        }
    return settings


def likeness(decode: Path, record: Path, digest: str, recipe: str | None) -> Likeness:
    """How the module in `decode`, quantized as `record` tells, compares with a tuning's."""
    if weights_digest(decode) == digest:
        return Likeness.SAME
    if recipe is not None and decode_recipe(record) == recipe:
        return Likeness.SAME_RECIPE
    return Likeness.OTHER
