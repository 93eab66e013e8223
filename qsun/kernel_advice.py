"""Which of vLLM's kernels a decode worker multiplies by, chosen by measured TPOT.

vLLM takes the first of its kernels that can multiply a format, whatever the batch.
`kernel_times.json` has the times of `docs/records/decode-tpot.json`; `docs/kernel_times.py` writes
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

TIMES = Path(__file__).with_name("kernel_times.json")
DEFAULT = "auto"
"""vLLM's own choice, as its `--linear-backend` calls it."""
FULL_PRECISION = "bfloat16"
NOTABLE = 0.97  # of a format's TPOT, to be told of
FOUR_BITS = re.compile(r"(W4A16|.*stored in 4 bits)")


@dataclass(frozen=True)
class KernelTime:
    """TPOT in seconds by decode batch, of a weight format on the kernels of one backend."""

    format: str
    backend: str
    tpot_s: Mapping[int, float]

    def at(self, batch: int) -> float:
        """Between two measured batches as on a line, beyond them as the nearest."""
        known = sorted(self.tpot_s)
        for low, high in pairwise(known):
            if low <= batch <= high:
                part = (batch - low) / (high - low)
                return (1 - part) * self.tpot_s[low] + part * self.tpot_s[high]
        return self.tpot_s[known[0] if batch < known[0] else known[-1]]


@dataclass(frozen=True)
class BatchAdvice:
    """At one decode batch, TPOT in seconds: on the quickest kernel, on vLLM's choice, in bfloat16.

    `quickest_format` is the quickest of all formats that were measured, with its TPOT.
    """

    batch: int
    backend: str
    tpot_s: float
    default_tpot_s: float
    full_precision_tpot_s: float
    quickest_format: str
    quickest_tpot_s: float


@dataclass(frozen=True)
class KernelAdvice:
    """`backend` is the quickest at `decode_batch`, as vLLM's `--linear-backend` names it.

    It is vLLM's own choice where a batch is larger than all that were measured. `measured` says on
    what: accelerator, vLLM's version, the model's shape, tokens of context.
    """

    format: str
    decode_batch: int
    backend: str
    by_batch: tuple[BatchAdvice, ...]
    measured: Mapping[str, Any]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What makes a worker take it: nothing where it is what vLLM takes by itself."""
        return () if self.backend == DEFAULT else ("--linear-backend", self.backend)

    @property
    def text(self) -> str:
        """What was chosen, what it gains, and where another format would be quicker."""
        near = min(self.by_batch, key=lambda one: abs(one.batch - self.decode_batch))
        kernels = "those that vLLM chooses" if self.backend == DEFAULT else self.backend
        tpot_s = near.default_tpot_s if self.backend == DEFAULT else near.tpot_s
        gains = f"{tpot_s / near.full_precision_tpot_s:.2f} of {FULL_PRECISION}'s"
        if self.backend != DEFAULT:
            gains += f" and {tpot_s / near.default_tpot_s:.2f} of vLLM's own choice's"
        others = {
            one.quickest_format: one.batch
            for one in reversed(self.by_batch)
            if one.quickest_format != self.format and one.quickest_tpot_s < NOTABLE * one.tpot_s
        }
        quicker = "".join(f"; {name} was quicker from {least}" for name, least in others.items())
        measured = self.measured
        return (
            f"kernels on a GPU: {kernels}, for about {self.decode_batch} answers at once; at "
            f"{near.batch}, TPOT was {gains}{quicker} ({measured['shape']}'s shape on one "
            f"{measured['accelerator']}, vLLM {measured['vllm']})"
        )


def kernel_advice(
    scheme: str, kv_layout: Mapping[str, Any], decode_batch: int
) -> KernelAdvice | None:
    """The advice for a decode module of this scheme, as `Scheme` prints it.

    It is of the measured shape whose cache is nearest in size a token, among those on which the
    scheme's format met the most kernels. None where nothing like the scheme was measured.
    """
    format_ = measured_format(scheme)
    measured = _times()
    if format_ is None or not measured["shapes"]:
        return None
    size = kv_layout["layers"] * kv_layout["kv_heads"] * kv_layout["head_dim"]

    def fit(shape: Mapping[str, Any]) -> tuple[int, int]:
        kernels = sum(one["format"] == format_ for one in shape["times"])
        return -kernels, abs(shape["cache_values_a_token"] - size)

    shape = min(measured["shapes"], key=fit)
    times = [
        KernelTime(one["format"], one["backend"], {int(b): s for b, s in one["tpot_s"].items()})
        for one in shape["times"]
    ]
    told = {key: value for key, value in measured.items() if key != "shapes"}
    return choose(times, format_, decode_batch, told | {"shape": shape["shape"]})


def choose(
    times: Sequence[KernelTime], format_: str, decode_batch: int, measured: Mapping[str, Any]
) -> KernelAdvice | None:
    """The advice from these times, for batches at which all of them were measured."""
    own = [one for one in times if one.format == format_]
    default = next((one for one in own if one.backend == DEFAULT), None)
    full = next((one for one in times if one.format == FULL_PRECISION), None)
    if default is None or full is None:
        return None
    batches = sorted(set.intersection(*(set(one.tpot_s) for one in [*own, full])))

    def at(batch: int) -> BatchAdvice:
        best = min(own, key=lambda one: one.at(batch))
        there = [one for one in times if batch in one.tpot_s]
        quickest = min(there, key=lambda one: one.tpot_s[batch])
        return BatchAdvice(
            batch=batch,
            backend=best.backend,
            tpot_s=best.at(batch),
            default_tpot_s=default.at(batch),
            full_precision_tpot_s=full.at(batch),
            quickest_format=quickest.format,
            quickest_tpot_s=quickest.tpot_s[batch],
        )

    best = default
    if decode_batch <= max(batches):
        best = min(own, key=lambda one: one.at(decode_batch))
    advised = tuple(at(batch) for batch in batches)
    return KernelAdvice(format_, decode_batch, best.backend, advised, measured)


def measured_format(scheme: str) -> str | None:
    """The format among the measured ones that a scheme is served as; None where none is."""
    if not FOUR_BITS.match(scheme):
        return None
    return f"W4A16 {'asymmetric' if ' asymmetric,' in scheme else 'symmetric'}"


@cache
def _times() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TIMES.read_text(encoding="utf-8"))
    return found
