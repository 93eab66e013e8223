"""Steps: checks still to be made, and how they end without ever showing a traceback."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.errors import QsunError, UncheckedError
from qsun.verdict import Check, Outcome

# What reading a damaged file may raise: valid JSON can hold anything in any place.
MALFORMED = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
             RecursionError)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A check to be made.

    `run` gives what was found where all agrees; it raises `UncheckedError` where something is
    missing, and any other `QsunError` where something is wrong. A step is not run unless the
    steps that it `needs` passed, nor where a file in `reads`, or below it, is damaged.
    """

    name: str
    compared: str
    remedy: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()


def run_steps(
    steps: Sequence[Step],
    skip: Collection[str] = (),
    before: Sequence[Check] = (),
    damaged: Iterable[Path] = (),
) -> list[Check]:
    """Make the checks in order. `before` are those made already, for steps that need them."""
    outcomes = {check.name: check.outcome for check in before}
    broken = tuple(damaged)
    checks = []
    for step in steps:
        check = _checked(step, skip, outcomes, broken)
        outcomes[step.name] = check.outcome
        checks.append(check)
    return checks


def _checked(
    step: Step, skip: Collection[str], outcomes: dict[str, Outcome], damaged: tuple[Path, ...]
) -> Check:
    if step.name in skip:
        return Check(step.name, Outcome.SKIPPED, step.compared, "left out as asked")
    hindrance = _hindrance(step, outcomes, damaged)
    if hindrance is not None:
        return Check(
            step.name, Outcome.UNCHECKED, step.compared, hindrance, "Put that right first."
        )
    try:
        return Check(step.name, Outcome.PASSED, step.compared, step.run())
    except UncheckedError as error:
        return Check(step.name, Outcome.UNCHECKED, step.compared, str(error), step.remedy)
    except QsunError as error:
        return Check(step.name, Outcome.FAILED, step.compared, str(error), step.remedy)
    except MALFORMED as error:
        message = f"what the files hold makes no sense: {type(error).__name__}: {error}"
        return Check(step.name, Outcome.FAILED, step.compared, message, step.remedy)


def _hindrance(step: Step, outcomes: dict[str, Outcome], damaged: tuple[Path, ...]) -> str | None:
    """Why a step cannot be run."""
    fine = (Outcome.PASSED, Outcome.SKIPPED)
    waiting = [name for name in step.needs if outcomes.get(name) not in fine]
    if waiting:
        return f"not looked at, because {waiting[0]} did not pass"
    for path in damaged:
        if any(path == read or read in path.parents for read in step.reads):
            return f"not looked at, because {path.name} is missing or damaged (static.files)"
    return None


def enumerated(findings: Sequence[str], at_most: int = 4) -> str:
    """Findings in one line; a long list ends with the number of those left out."""
    shown = "; ".join(findings[:at_most])
    left_out = len(findings) - at_most
    return f"{shown}; and {left_out} more" if left_out > 0 else shown
