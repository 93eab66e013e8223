"""The static level: files alone prove that modules belong together. No weight is read.

Each check names one cause; one that cannot be made because another failed is unchecked. A bundle
is held to its manifest, a bare pair to its decode module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qsun.verdict import Check, Outcome
from qsun.verify.static.bundle_files import BundleFiles
from qsun.verify.static.bundle_steps import (
    FILES,
    PATHS,
    agreement_steps,
    file_steps,
    pair_steps,
)
from qsun.verify.static.module_steps import base_steps, decode_steps
from qsun.verify.static.modules import open_modules
from qsun.verify.static.prefill_steps import prefill_steps
from qsun.verify.steps import Step, run_steps
from qsun.verify.subject import Subject


def static_checks(subject: Subject, skip: Sequence[str] = ()) -> list[Check]:
    """Make every check that files alone allow, the cause before what follows from it.

    `skip` names checks to leave out, such as `static.files`, which hashes everything.
    """
    if subject.folder is None or subject.manifest is None:
        return run_steps([*pair_steps(subject), *_module_steps(subject)], skip)
    files = BundleFiles(subject.folder, subject.manifest)
    checks = run_steps(file_steps(files), skip)
    damaged = _damaged(files, {check.name: check.outcome for check in checks})
    return checks + run_steps(_module_steps(subject), skip, checks, damaged)


def _damaged(files: BundleFiles, outcomes: dict[str, Outcome]) -> list[Path]:
    """Files that no later check should take for what they say."""
    if outcomes[PATHS] not in (Outcome.PASSED, Outcome.SKIPPED):
        return []  # nothing is read then
    try:
        changed = files.changed if outcomes[FILES] is Outcome.FAILED else []
        return [files.folder / name for name in [*files.missing, *changed]]
    except OSError:
        return []  # a disk that cannot be read: these checks failed of it, and all others will


def _module_steps(subject: Subject) -> list[Step]:
    modules = open_modules(subject)
    first = () if subject.manifest is None else (PATHS,)
    steps = decode_steps(modules, first) + base_steps(modules, first)
    for task in subject.prefill:
        steps += prefill_steps(modules, task, first)
    if subject.folder is not None and subject.manifest is not None:
        steps += agreement_steps(modules, subject.folder, subject.manifest)
    return steps
