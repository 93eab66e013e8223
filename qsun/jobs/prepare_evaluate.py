"""Preparing an evaluation: systems and test sets, checked before weights are opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsun.environments import find_serving_environment
from qsun.errors import ConfigError, OutputError, ServingEnvironmentError, bullet_list, nearest
from qsun.evaluate.floors import Floor, load_floors, require_measured
from qsun.evaluate.router_address import require_router
from qsun.evaluate.systems import Shared, System, choose_systems, systems_of
from qsun.evaluate.test_sets import TestSet
from qsun.files import existing_parent
from qsun.jobs.evaluation_request import Request, router_address
from qsun.jobs.evaluation_subject import Subject, bundle_subject, config_subject
from qsun.records import Record, read_record
from qsun.tasks.checkers import require_checker
from qsun.tasks.definition import load_task

BASE = Path("base")  # stands for the base model's checkpoint, which is opened later


@dataclass(frozen=True)
class PreparedEvaluation:
    """Everything that an evaluation needs, checked."""

    request: Request
    subject: Subject
    systems: Mapping[str, list[System]]
    tests: tuple[TestSet, ...]
    floors: tuple[Floor, ...]
    before: Record | None

    @property
    def planned(self) -> dict[str, list[str]]:
        """The systems of each test set, by name."""
        return {one.name: [system.name for system in self.systems[one.task]] for one in self.tests}


def prepare_evaluation(request: Request) -> PreparedEvaluation:
    """Check everything that can be wrong before a model is opened.

    Raises:
        QsunError: names everything that stands in the way.
    """
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit {request.limit} leaves no sample: give 1 or more")
    subject = bundle_subject(request) if request.bundle else config_subject(request)
    shared = Shared(BASE, subject.decode)
    available = {task: systems_of(shared, modules) for task, modules in subject.tasks.items()}
    _require_writable(request.out)
    tests = choose_tests(subject, request.tests)
    _require_room(tests, subject.max_tokens)
    if not request.dry_run:
        for one in tests:
            require_checker(None if one.definition is None else load_task(one.definition).checker)
    tasks = {one.task for one in tests}
    systems = choose_systems(
        {task: found for task, found in available.items() if task in tasks}, request.systems
    )
    if request.settings.tpot == "measure" and subject.decode is not None and not request.served:
        _require_serving(request)
    if request.served is not None:
        systems = _served_systems(request, subject, systems)
    before = None if request.compare is None else read_record(request.compare, "scorecard")
    floors = () if request.floors is None else load_floors(request.floors)
    prepared = PreparedEvaluation(request, subject, systems, tests, floors, before)
    require_measured(floors, prepared.planned)
    return prepared


def _require_writable(out: Path) -> None:
    nearest_folder = existing_parent(out / "records")
    if not nearest_folder.is_dir() or not os.access(nearest_folder, os.W_OK):
        raise OutputError(f"cannot write a scorecard to {out}: {nearest_folder} takes no files")


def _require_room(tests: Sequence[TestSet], max_tokens: int) -> None:
    problems = [
        f"{one.name}: max_new_tokens is {answer}"
        for one in tests
        if one.definition and (answer := load_task(one.definition).max_new_tokens) >= max_tokens
    ]
    if problems:
        raise ConfigError(
            f"the modules read {max_tokens} tokens, which leaves no room for a prompt:\n"
            f"{bullet_list(problems)}"
        )


def _served_systems(
    request: Request, subject: Subject, systems: Mapping[str, list[System]]
) -> dict[str, list[System]]:
    """What a bundle's router answers with: the bundle's own modules, one system a task."""
    if subject.bundle is None:
        raise ConfigError("--served needs the BUNDLE that the router serves")
    pool = subject.decode or BASE
    own = {
        task: [one for one in found if not one.one_model and one.decode == pool]
        for task, found in systems.items()
    }
    missing = [task for task, found in own.items() if not found]
    if missing:
        raise ConfigError(f"--served: the router answers with no such system ({missing})")
    require_router(router_address(request), subject.bundle, list(own))
    return own


def _require_serving(request: Request) -> None:
    if request.dry_run:
        return
    try:
        find_serving_environment(None)
    except ServingEnvironmentError as error:
        raise ServingEnvironmentError(
            f"TPOT is measured in vLLM: {error}\nOr leave it out: --set evaluate.tpot=skip"
        ) from error


def choose_tests(subject: Subject, wanted: Sequence[str]) -> tuple[TestSet, ...]:
    """Test sets by `TASK`, `TASK.TEST`, or `TASK:NAME` for lm-eval's own; all where none is named.

    Raises:
        ConfigError: names every unknown one, with the nearest.
    """
    known = [
        TestSet(task, source.name, path)
        for task, path in subject.definitions.items()
        for source in load_task(path).tests
    ]
    defined = {one.name for one in known}
    known += [TestSet(task, name) for task, names in subject.lm_eval.items() for name in names]
    twice = [one.name for one in known if one.definition is None and one.name in defined]
    if twice:
        raise ConfigError(
            f"evaluate.modules[].lm_eval names what is a task's own test set: {', '.join(twice)}.\n"
            "Leave it out there; --tasks TASK:NAME asks lm-eval's in its place."
        )
    names = {one.name: one for one in known}
    chosen: dict[str, TestSet] = {}
    problems = []
    for name in wanted or names:
        task, colon, own = name.partition(":")
        of_task = [one for one in known if one.task == name]
        if colon and task in subject.tasks:
            chosen[f"{task}.{own}"] = TestSet(task, own)
        elif name in names or of_task:
            chosen |= {one.name: one for one in ([names[name]] if name in names else of_task)}
        else:
            problems.append(f"{name!r} ({nearest(name, [*subject.tasks, *names])})")
    if problems or not chosen:
        problems = problems or ["no task has one: name a definition, or TASK:NAME of lm-eval's"]
        raise ConfigError(f"these test sets do not exist:\n{bullet_list(problems)}")
    return tuple(chosen.values())


def with_base(prepared: PreparedEvaluation, base: Path) -> PreparedEvaluation:
    """The same with the base model's folder in place of what stood for it."""
    systems = {
        task: [
            replace(
                one,
                prefill=base if one.prefill == BASE else one.prefill,
                decode=base if one.decode == BASE else one.decode,
            )
            for one in found
        ]
        for task, found in prepared.systems.items()
    }
    return replace(prepared, systems=systems)
