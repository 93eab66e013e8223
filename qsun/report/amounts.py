"""Numbers as they stand on the page: three figures, their unit in the table's header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOT_RECORDED = "not recorded"
FIGURES = 3


def number(value: float | None) -> str:
    """Three figures, thousands whole, never an exponent; what is not there is said not to be."""
    if value is None:
        return NOT_RECORDED
    if value == 0:
        return "0"
    decimals = FIGURES - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:,.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if isinstance(value, int) and "." in text else text


def count(value: float | None) -> str:
    """A number of things."""
    return NOT_RECORDED if value is None else f"{value:,.0f}"


def setting(value: float | None) -> str:
    """A number that was chosen, as it was given."""
    return NOT_RECORDED if value is None else f"{value:g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds, in milliseconds."""
    return number(None if seconds is None else 1000 * seconds)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share, in percent; the sign is the header's."""
    return NOT_RECORDED if share is None else f"{100 * share:.{decimals}f}"


def interval(bounds: Sequence[float] | None, scale: float = 1.0, decimals: int = 1) -> str:
    """An interval's two ends."""
    if bounds is None:
        return NOT_RECORDED
    low, high = (f"{scale * bound:.{decimals}f}" for bound in bounds)
    return f"{low} to {high}"


def with_interval(value: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    """A summary's mean, and its interval where there was more than one run."""
    if value is None or value["mean"] is None:
        return NOT_RECORDED
    mean = number(scale * value["mean"])
    if value.get("interval") is None:
        return mean
    low, high = (number(scale * bound) for bound in value["interval"])
    return f"{mean} ({low} to {high})"
