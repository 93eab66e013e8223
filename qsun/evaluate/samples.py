"""Samples: every response of one system to one test set, and what is counted over them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qsun.evaluate.statistics import exact_interval
from qsun.files import write_atomically


@dataclass(frozen=True)
class Sample:
    """One row: digests of prompt and target, the response, and how it was judged.

    `value` is the metric's, 1 for right and 0 for wrong where it is an accuracy. `tokens` and
    `ended` (by itself, before the limit) are None where nothing was generated.
    """

    index: int
    prompt_sha256: str
    target_sha256: str
    response: str
    value: float
    invalid: bool | None = None
    tokens: int | None = None
    ended: bool | None = None


@dataclass(frozen=True)
class Samples:
    """All samples of a system and a test set, by which metric, and the seconds they took."""

    system: str
    test: str
    metric: str
    seconds: float
    rows: tuple[Sample, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over prompts and targets: equal where two systems were asked the same."""
        asked = [[row.index, row.prompt_sha256, row.target_sha256] for row in self.rows]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def values(self) -> list[float]:
        """The metric of each sample."""
        return [row.value for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """What a scorecard keeps: accuracy with its exact interval, lengths, shares, speed."""
        total, value = len(self.rows), fmean(self.values)
        binary = all(one in (0.0, 1.0) for one in self.values)
        generated = [row.tokens for row in self.rows if row.tokens is not None]
        found: dict[str, Any] = {
            "metric": self.metric,
            "accuracy": value,
            "total": total,
            "correct": round(sum(self.values)) if binary else None,
            "interval_95": exact_interval(round(sum(self.values)), total) if binary else None,
            "mean_tokens": fmean(generated) if generated else None,
            "invalid": _share([row.invalid for row in self.rows]),
            "unfinished": _share(
                [None if row.ended is None else not row.ended for row in self.rows]
            ),
            "seconds": round(self.seconds, 2),
            "tokens_per_second": None,
        }
        if generated and self.seconds:
            found["tokens_per_second"] = round(sum(generated) / self.seconds, 1)
        return found


def _share(flags: Sequence[bool | None]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return fmean(known) if known else None


def write_samples(samples: Samples, path: Path) -> None:
    """Write them as JSON lines, gzipped, the first line without rows; all or nothing."""
    header = {key: value for key, value in vars(samples).items() if key != "rows"}
    lines = [header, *map(asdict, samples.rows)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def read_samples(path: Path) -> Samples:
    """What `write_samples` wrote."""
    # Not by splitlines: a response may hold other characters that end a line.
    lines = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
    header, *rows = map(json.loads, lines)
    return Samples(**header, rows=tuple(Sample(**row) for row in rows))
