"""The verify job: a bundle, or a pair of folders, level by level, to one verdict.

static -> numeric -> served: a level begins only where nothing failed before it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.bundle import Bundle, read_bundle
from qsun.config import VerifyConfig
from qsun.errors import IncompatibleError, OutputError, QsunError
from qsun.jobs.base_model import fetch_base
from qsun.progress import announce
from qsun.records import new_record
from qsun.verdict import VERDICT, Check, Outcome, Verdict
from qsun.verify.static.level import static_checks
from qsun.verify.subject import Subject

LEVELS = ("static", "numeric", "served")


@dataclass(frozen=True)
class Request:
    """What is to be verified, how far, and which checks the user leaves out by name.

    `base` and `references` (a file of prompts and responses) are for what the subject lacks.
    """

    subject: Subject
    bundle: Bundle | None
    levels: tuple[str, ...]
    skip: tuple[str, ...] = ()
    base: Path | None = None
    references: Path | None = None


def bundle_request(
    folder: Path, levels: Sequence[str], skip: Sequence[str], base: Path | None
) -> Request:
    """A bundle's verification.

    Raises:
        IncompatibleError: no bundle, or a manifest that is not what was written.
    """
    bundle = read_bundle(folder.absolute())
    return Request(Subject.from_bundle(bundle), bundle, tuple(levels), tuple(skip), base)


def run_verify(request: Request, settings: VerifyConfig) -> Verdict:
    """Every check of the levels asked for."""
    runs: dict[str, Callable[[], list[Check]]] = {
        "static": lambda: static_checks(request.subject, request.skip),
        "numeric": lambda: _numeric(request, settings),
        "served": lambda: _served(request),
    }
    checks: list[Check] = []
    seconds: dict[str, float] = {}
    for level in LEVELS:
        if level not in request.levels:
            continue
        if any(check.outcome is Outcome.FAILED for check in checks):
            message = "an earlier level failed"
            checks.append(Check(level, Outcome.UNCHECKED, f"the {level} level", message))
            continue
        announce(f"verify: {level}")
        started = time.monotonic()
        checks += [_unless_skipped(check, request.skip) for check in _guarded(level, runs[level])]
        seconds[level] = round(time.monotonic() - started, 2)
    return Verdict(request.subject.digest, tuple(checks), seconds)


def _unless_skipped(check: Check, skip: Sequence[str]) -> Check:
    if check.name not in skip or check.outcome is Outcome.SKIPPED:
        return check
    return Check(check.name, Outcome.SKIPPED, check.compared, f"left out; found: {check.message}")


def _guarded(level: str, run: Callable[[], list[Check]]) -> list[Check]:
    """The level's checks, or one that says why there are none."""
    try:
        return run()
    except IncompatibleError as error:
        return [Check(level, Outcome.FAILED, f"the {level} level", str(error))]
    except QsunError as error:
        return [Check(level, Outcome.UNCHECKED, f"the {level} level", str(error))]


def _numeric(request: Request, settings: VerifyConfig) -> list[Check]:
    from qsun.verify.numeric.level import numeric_checks

    references = _references(request)
    missing = sorted(request.subject.prefill.keys() - references.keys())
    if missing:
        message = f"no prompts and responses for {', '.join(missing)}"
        remedy = "Give a file of them by --references."
        return [Check("numeric", Outcome.UNCHECKED, "the numeric level", message, remedy)]
    with tempfile.TemporaryDirectory() as scratch:
        base = _base_folder(request, Path(scratch))
        return numeric_checks(request.subject, base, references, settings)


def _references(request: Request) -> Mapping[str, Path]:
    if request.references is not None:
        return dict.fromkeys(request.subject.prefill, request.references)
    folder = request.subject.folder
    if folder is None:
        return {}
    return {task: folder / f"verification/{task}.jsonl" for task in request.subject.prefill}


def _base_folder(request: Request, scratch: Path) -> Path:
    """The full-precision base checkpoint: given, the bundle's own, or where its manifest says."""
    if request.base is not None:
        return request.base
    if request.subject.base is not None:
        return request.subject.base
    manifest = request.subject.manifest
    if manifest is None:
        raise OutputError("a pair of folders needs the base model's folder: give it by --base")
    return fetch_base(manifest.base, scratch)


def _served(request: Request) -> list[Check]:
    if request.bundle is None:
        message = "the served level needs a bundle: its launch spec says what to start"
        remedy = "Export the modules as a bundle."
        return [Check("served", Outcome.UNCHECKED, "the served level", message, remedy)]
    from qsun.environments import find_serving_environment
    from qsun.verify.served.level import served_checks

    serving = find_serving_environment(None)
    return served_checks(request.bundle, serving)


def write_verdict(
    verdict: Verdict, settings: VerifyConfig, folder: Path, plots: Path | None = None
) -> Path:
    """Write the verdict's record below `folder`, and its plots beside it; gives its path.

    Raises:
        OutputError: the folder cannot be written to.
    """
    from qsun.verify.numeric.plots import write_plots

    path = folder / VERDICT
    try:
        write_plots(verdict.checks, plots or path.with_suffix(""))
        new_record("verdict", settings, settings.seed, verdict.summary()).write(path)
    except OSError as error:
        raise OutputError(
            f"cannot write the verdict to {path}: {error.strerror}. Choose another --out."
        ) from error
    return path
