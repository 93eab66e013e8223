"""The verdict: whether modules belong together, check by check, and what to do where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from qsun.bundle import Bundle
from qsun.errors import IncompatibleError, QsunError, UncheckedError, bullet_list
from qsun.records import read_record

VERDICT = "records/verdict.json"


class Outcome(Enum):
    """How a check ended."""

    PASSED = "passed"
    """What was compared agrees."""
    FAILED = "failed"
    """It does not: these modules must not be served together."""
    UNCHECKED = "unchecked"
    """Something that the check needs is missing; `message` says what."""
    SKIPPED = "skipped"
    """The user asked by name to leave it out."""


@dataclass(frozen=True)
class Check:
    """One check. `name` is stable and unique, like `static.kv_layout.math`.

    `compared` says what with what, `message` what was found, in words, with numbers; `remedy` what
    to do where it failed; `values` the figures behind it, plain JSON.
    """

    name: str
    outcome: Outcome
    compared: str
    message: str
    remedy: str = ""
    values: dict[str, Any] | None = None

    @property
    def level(self) -> str:
        """`static`, `numeric` or `served`."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Verdict:
    """All checks of one verification. `bundle` is the digest of the manifest, if there was one.

    `seconds` is what each level took.
    """

    bundle: str | None
    checks: tuple[Check, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, outcome: Outcome) -> list[Check]:
        """The checks that ended so."""
        return [check for check in self.checks if check.outcome is outcome]

    @property
    def compatible(self) -> bool | None:
        """None where nothing failed but something could not be checked."""
        if self.of(Outcome.FAILED):
            return False
        return None if self.of(Outcome.UNCHECKED) or not self.checks else True

    def summary(self) -> dict[str, Any]:
        """Plain values, for a record."""
        checks = [asdict(check) | {"outcome": check.outcome.value} for check in self.checks]
        return {
            "bundle": self.bundle,
            "compatible": self.compatible,
            "checks": checks,
            "seconds": dict(self.seconds),
        }


def require(verdict: Verdict, what: str) -> None:
    """Raise unless everything was checked and agrees.

    Raises:
        IncompatibleError: names every failed check, its finding and its remedy.
        UncheckedError: nothing failed, but not all could be checked.
    """
    failed, unchecked = verdict.of(Outcome.FAILED), verdict.of(Outcome.UNCHECKED)
    if failed:
        lines = [f"{check.name}: {check.message} {check.remedy}".strip() for check in failed]
        raise IncompatibleError(f"{what}: INCOMPATIBLE\n{bullet_list(lines, at_most=40)}")
    if unchecked or not verdict.checks:
        lines = [f"{check.name}: {check.message} {check.remedy}".strip() for check in unchecked]
        raise UncheckedError(f"{what}: could not be checked\n{bullet_list(lines, at_most=40)}")


def require_verdict(bundle: Bundle, levels: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Refuse a bundle without a verdict of its own that passes at `levels`.

    `allowed` names failed or unchecked checks that the user takes the responsibility for.

    Raises:
        IncompatibleError: none, another bundle's, a level that was not run, or failed checks.
    """
    path = bundle.folder / VERDICT
    verify = f"Run `qsun verify {bundle.folder}`."
    if not path.is_file():
        raise IncompatibleError(f"{bundle.folder} was never verified. {verify}")
    try:
        result = read_record(path, "verdict").result
    except QsunError as error:
        raise IncompatibleError(f"{error}. {verify}") from error
    if result["bundle"] != bundle.digest:
        raise IncompatibleError(f"{path} is the verdict of another bundle. {verify}")
    checked = {check["name"].partition(".")[0] for check in result["checks"]}
    missing = [level for level in levels if level not in checked]
    if missing:
        raise IncompatibleError(f"{path} lacks the level {', '.join(missing)}. {verify}")
    bad = [
        f"{check['name']}: {check['message']}"
        for check in result["checks"]
        if check["outcome"] != Outcome.PASSED.value and check["name"] not in allowed
    ]
    if bad:
        raise IncompatibleError(f"{bundle.folder} did not pass:\n{bullet_list(bad, at_most=40)}")
