"""Latency records, read into curves, or refused with everything that is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from qsun.errors import DataError, QsunError, bullet_list, nearest
from qsun.files import sha256_file
from qsun.records import read_record
from qsun.simulate.curves import Line, StepTimes, Timing

KIND = "latency"
# A longer prompt, context or batch cannot be quicker; a measurement may say so by its noise.
NOISE = 0.1


@dataclass(frozen=True)
class Curves:
    """Every decode format's step times, and prefill and hand-off, which all formats share.

    `origin` says what they were read from; `notes` what of it was passed over as noise.
    """

    steps: Mapping[str, StepTimes]
    prefill_s: Line
    hand_off_s: float
    origin: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def timing(self, decode_format: str) -> Timing:
        """What takes how long with a decode module of this format."""
        return Timing(self.steps[decode_format], self.prefill_s, self.hand_off_s)

    def format_problems(self, decode_format: str) -> list[str]:
        """Why there are no curves of a format; nothing where there are."""
        if decode_format in self.steps:
            return []
        return [f"no curves of format {decode_format} ({nearest(decode_format, self.steps)})"]


def read_curves(paths: Sequence[Path]) -> Curves:
    """The curves of latency records, one or several formats each.

    Prefill and hand-off are the first record's.

    Raises:
        QsunError: no record, or of another kind or schema.
        DataError: tables that are empty, wrong, or measured twice; all problems are named.
    """
    problems: list[str] = []
    notes: list[str] = []
    steps: dict[str, StepTimes] = {}
    origin = []
    first: tuple[Line, float] | None = None
    for path in paths:
        record = read_record(path, KIND)
        found = _Checked(path.name, record.result)
        steps_here, line, hand_off = found.steps(), found.prefill(), found.hand_off()
        problems += found.problems
        notes += found.notes
        problems += [
            f"{path.name}: format {name} is in another record, too"
            for name in steps_here.keys() & steps
        ]
        steps |= steps_here
        first = first or (line, hand_off)
        origin.append(_origin(path, found.result, record.hardware, list(steps_here)))
    if first is None:
        raise QsunError("no latency record: give one or more CURVES, measured by qsun")
    if problems:
        raise DataError(f"these curves cannot be simulated:\n{bullet_list(problems, 40)}")
    return Curves(steps, first[0], first[1], origin, notes)


def _origin(
    path: Path, result: Mapping[str, Any], hardware: Mapping[str, Any], formats: list[str]
) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "bundle": result.get("bundle"),
        "decode": result.get("decode"),
        "served": result.get("served"),
        "hardware": dict(hardware),
        "formats": formats,
    }


class _Checked:
    """One record's tables as curves; what is wrong is noted, and stands as a curve of nothing."""

    nothing = Line((1.0,), (1.0,))

    def __init__(self, where: str, result: Any) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._where = where
        self.result: Mapping[str, Any] = result if isinstance(result, dict) else {}
        if not isinstance(result, dict):
            self.problems.append(f"{where}: result is no mapping")

    def steps(self) -> dict[str, StepTimes]:
        """Step times by format."""
        rows = self._rows("tpot", ("batch", "context_tokens", "tpot_s"), named=True)
        found = {}
        for name in dict.fromkeys(str(row["format"]) for row in rows):
            mine = [row for row in rows if row["format"] == name]
            by_batch: dict[int, list[tuple[float, float]]] = {}
            for row in mine:
                point = row["context_tokens"], row["tpot_s"]
                by_batch.setdefault(int(row["batch"]), []).append(point)
            lines = {
                batch: self._line(f"tpot of {name}, batch {batch}", points)
                for batch, points in sorted(by_batch.items())
            }
            self._check_batches(name, lines)
            if all(len(line.at) == 1 for line in lines.values()):
                self.notes.append(
                    f"{self._where}: {name} has one context a batch; longer takes as long"
                )
            found[name] = StepTimes(lines)
        return found

    def prefill(self) -> Line:
        """Seconds of one prompt by its length."""
        rows = self._rows("prefill", ("prompt_tokens", "seconds"))
        points = [(row["prompt_tokens"], row["seconds"]) for row in rows]
        return self._line("prefill", points) if points else self.nothing

    def hand_off(self) -> float:
        """Seconds from the end of a prefill to the cache's arrival."""
        value = self.result.get("hand_off_s")
        if not _is_number(value) or value < 0:
            self._wrong(f"hand_off_s: {value!r} is not a number of seconds from 0 on")
            return 0.0
        return float(value)

    def _rows(
        self, table: str, numbers: Sequence[str], named: bool = False
    ) -> list[dict[str, Any]]:
        rows = self.result.get(table)
        if not isinstance(rows, list) or not rows:
            self._wrong(f"{table}: no rows")
            return []
        good = []
        for place, row in enumerate(rows):
            wrong = list(_row_problems(row, numbers, named))
            self.problems += [f"{self._where}: {table}[{place}]: {one}" for one in wrong]
            if not wrong:
                good.append(row)
        return good

    def _line(self, what: str, points: list[tuple[float, float]]) -> Line:
        points = sorted(points)
        at = [length for length, _ in points]
        twice = sorted({length for length in at if at.count(length) > 1})
        if twice:
            self._wrong(f"{what}: {', '.join(f'{one:g}' for one in twice)} tokens, more than once")
            return self.nothing
        values = [seconds for _, seconds in points]
        for left, right in pairwise(points):
            self._check_fall(f"{what}: {right[0]:g} tokens", right[1], left[1], f"{left[0]:g}")
        return Line(tuple(map(float, at)), tuple(map(float, values)))

    def _check_batches(self, name: str, lines: Mapping[int, Line]) -> None:
        """A larger batch takes longer, at each context that both were measured at."""
        for small, large in pairwise(lines):
            for context in sorted({*lines[small].at} & {*lines[large].at}):
                what = f"tpot of {name}, {context:g} tokens: batch {large}"
                self._check_fall(what, lines[large](context), lines[small](context), f"{small}")

    def _check_fall(self, what: str, later: float, earlier: float, beside: str) -> None:
        if later >= earlier:
            return
        said = f"{what} takes {later:g} s, less than {beside} ({earlier:g} s)"
        if later < earlier * (1 - NOISE):
            self._wrong(said)
        else:
            self.notes.append(f"{self._where}: {said}; taken as noise")

    def _wrong(self, problem: str) -> None:
        self.problems.append(f"{self._where}: {problem}")


def _row_problems(row: Any, numbers: Sequence[str], named: bool) -> Iterable[str]:
    if not isinstance(row, dict):
        yield f"{row!r} is no row"
        return
    if named and (not isinstance(row.get("format"), str) or not row["format"]):
        yield f"format: {row.get('format')!r} is no name"
    for name in numbers:
        value = row.get(name)
        if not _is_number(value) or value <= 0:
            yield f"{name}: {value!r} is not a number above 0"
        elif name in ("batch", "context_tokens", "prompt_tokens") and value != int(value):
            yield f"{name}: {value!r} is not a whole number"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
