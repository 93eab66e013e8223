"""Preparing an evaluation: systems and test sets, checked before weights are opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, read_bundle
from qsun.checkpoint_files import read_config_file
from qsun.config import EvaluateConfig, RunConfig, load_config
from qsun.decode_checkpoint import scheme_of
from qsun.decode_recipe import Likeness
from qsun.environments import find_serving_environment
from qsun.errors import (
    ConfigError,
    ModelError,
    OutputError,
    ServingEnvironmentError,
    bullet_list,
)
from qsun.evaluate.floors import Floor, load_floors, require_measured
from qsun.evaluate.router_address import RouterAddress, require_router
from qsun.evaluate.systems import Modules, Shared, System, choose_systems, nearest, systems_of
from qsun.evaluate.test_sets import TestSet
from qsun.files import existing_parent
from qsun.jobs.plan_model import planned_model
from qsun.jobs.prepare_export import (
    TUNING,
    checkpoint_problems,
    module_problems,
    resolved,
    tuned_through,
)
from qsun.kv_layout import kv_layout
from qsun.models import ModelSource, locate, read_config
from qsun.prefill_module import ADAPTER_CONFIG
from qsun.records import Record, read_record
from qsun.settings import settings_from
from qsun.tasks.definition import load_task
from qsun.verdict import require_verdict

LEVELS = ("static", "numeric")
BASE = Path("base")  # stands for the base model's checkpoint, which is opened later
DEFINITIONS = "verification"
# What a module that makes a system must have been tuned as, where it has a record.
TUNED_AS = {"full_ft": "full-ft", "sun": "sun", "qsun": "qsun"}


@dataclass(frozen=True)
class Request:
    """What the user asks for: a bundle or a config with its path, and what of it."""

    settings: EvaluateConfig
    out: Path
    bundle: Path | None = None
    run: RunConfig | None = None
    config: Path | None = None
    systems: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    limit: int | None = None
    floors: Path | None = None
    compare: Path | None = None
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    served: str | None = None
    api_key: Path | None = None
    resume: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Subject:
    """What is evaluated, wherever it came from. `tasks` gives each task's modules by field.

    `missing` are the folders that a dry run did not find.
    """

    base: ModelSource | Mapping[str, Any] | Path
    decode: Path | None
    tasks: Mapping[str, Modules]
    definitions: Mapping[str, Path]
    lm_eval: Mapping[str, Sequence[str]]
    boundary: str
    max_tokens: int
    bundle: Bundle | None = None
    relative_to: Path = field(default_factory=Path)
    missing: tuple[Path, ...] = ()


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


def request_of(
    subject: Path, overrides: Sequence[str], *, out: Path | None, **options: Any
) -> Request:
    """The request for a bundle's folder or a config's file, its settings overridden.

    Raises:
        ConfigError: neither a bundle nor a config; or wrong settings, all named.
    """
    if subject.is_dir():
        bundle = read_bundle(subject.absolute())
        run = settings_from(_Settings, {}, overrides)
        return Request(run.evaluate, out or subject, bundle=bundle.folder, **options)
    run_config = load_config(subject, overrides)
    if out is None and not options.get("dry_run"):
        raise ConfigError("an evaluation of a config needs --out, the folder of its scorecard")
    folder = out or Path("exports")
    return Request(run_config.evaluate, folder, run=run_config, config=subject, **options)


@dataclass(frozen=True)
class _Settings:
    """What an override of a bundle's evaluation may name: the same keys as in a config."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def prepare_evaluation(request: Request) -> PreparedEvaluation:
    """Check everything that can be wrong before a model is opened.

    Raises:
        QsunError: names everything that stands in the way.
    """
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit {request.limit} leaves no sample: give 1 or more")
    subject = _bundle_subject(request) if request.bundle else _config_subject(request)
    shared = Shared(BASE, subject.decode)
    available = {task: systems_of(shared, modules) for task, modules in subject.tasks.items()}
    _require_writable(request.out)
    tests = choose_tests(subject, request.tests)
    _require_room(tests, subject.max_tokens)
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
    require_router(router_address(request), list(own))
    return own


def router_address(request: Request) -> RouterAddress:
    """Where the router is, with its key from a file of one `NAME KEY` a line, or of the key alone.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    if request.api_key is None:
        return RouterAddress(str(request.served))
    try:
        words = request.api_key.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key in {request.api_key} cannot be read: {error}") from error
    if not words:
        raise ConfigError(f"there is no key in {request.api_key}")
    return RouterAddress(str(request.served), words[min(1, len(words) - 1)])


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


def _bundle_subject(request: Request) -> Subject:
    bundle = read_bundle(Path(str(request.bundle)).absolute())
    require_verdict(bundle, LEVELS, request.allowed)
    tasks = {}
    for module in bundle.manifest.prefill:
        folder = bundle.folder / module.path
        field_of = {name: made for made, name in TUNED_AS.items()}
        tasks[module.task] = Modules(**{field_of.get(module.system or "", "sun"): folder})
    definitions = {
        task: path
        for task in tasks
        if (path := bundle.folder / DEFINITIONS / f"{task}.yaml").is_file()
    }
    quantized = scheme_of(read_config_file(bundle.decode / "config.json")) is not None
    return Subject(
        base=request.base or bundle.base or bundle.manifest.base,
        decode=bundle.decode if quantized else None,
        tasks=tasks,
        definitions=definitions,
        lm_eval={},
        boundary=bundle.manifest.boundary,
        max_tokens=bundle.manifest.max_tokens,
        bundle=bundle,
    )


def _config_subject(request: Request) -> Subject:
    run, path = request.run, request.config
    assert run is not None
    assert path is not None
    settings, relative_to = run.evaluate, path.absolute().parent
    if not settings.modules:
        raise ConfigError(
            f"{path} has no modules to evaluate: name each task's folders under evaluate.modules"
        )
    source, model_config = _base_model(request, run, relative_to)
    layout = kv_layout(model_config)
    definitions = {Path(name).stem: relative_to / name for name in run.tasks}
    decode = None if settings.decode is None else resolved(settings.decode, relative_to)
    problems, missing = [], []
    if decode is not None and request.dry_run and not decode.exists():
        missing.append(decode)
    elif decode is not None:
        problems += checkpoint_problems("evaluate.decode", decode, layout)
    tasks, boundaries = {}, set()
    for one in settings.modules:
        if one.task not in definitions and not one.lm_eval:
            known = nearest(one.task, definitions)
            problems.append(f"task {one.task}: not among the config's `tasks` ({known})")
        folders = {
            name: resolved(str(getattr(one, name)), relative_to)
            for name in vars(Modules())
            if getattr(one, name) is not None
        }
        for name, folder in folders.items():
            if request.dry_run and not folder.exists():
                missing.append(folder)
                continue
            _, found = module_problems(f"{one.task}, {name}", folder, layout)
            opened = None if decode in missing else decode
            problems += found or _record_problems(one.task, name, folder, opened)
            boundaries |= set() if found else _boundaries(folder)
        tasks[one.task] = Modules(**folders)
    if len(boundaries) > 1:
        problems.append(f"modules were tuned for different boundaries: {sorted(boundaries)}")
    if problems:
        raise ModelError(f"these modules cannot be evaluated together:\n{bullet_list(problems)}")
    return Subject(
        base=source if request.base is None else request.base,
        decode=decode,
        tasks=tasks,
        definitions={task: definitions[task] for task in tasks if task in definitions},
        lm_eval={one.task: one.lm_eval for one in settings.modules},
        boundary=boundaries.pop() if boundaries else "n-1",
        max_tokens=layout.max_tokens,
        relative_to=relative_to,
        missing=tuple(missing),
    )


def _base_model(
    request: Request, run: RunConfig, relative_to: Path
) -> tuple[ModelSource, Mapping[str, Any]]:
    if request.dry_run:
        return planned_model(run, relative_to)
    source = locate(run.base.model, run.base.revision, relative_to)
    return source, read_config(source)


def _boundaries(folder: Path) -> set[str]:
    if not (folder / TUNING).is_file():
        return set()
    result = read_record(folder / TUNING, "tuning").result
    return set() if result["system"] == "full-ft" else {str(result["boundary"])}


def _record_problems(task: str, name: str, folder: Path, decode: Path | None) -> list[str]:
    """What a module's own record says against being called this."""
    if name == "awq_full_ft":
        config = folder / "config.json"
        dense = (folder / ADAPTER_CONFIG).exists() or scheme_of(read_config_file(config)) is None
        return [f"task {task}, {name}: {folder} is not quantized"] if dense else []
    if not (folder / TUNING).is_file():
        return []
    result = read_record(folder / TUNING, "tuning").result
    problems = []
    if result["system"] != TUNED_AS[name]:
        problems.append(f"task {task}, {name}: {folder} was tuned as {result['system']}")
    if name == "qsun" and decode and tuned_through(result, decode) is Likeness.OTHER:
        problems.append(f"task {task}, {name}: tuned through another decode module than {decode}")
    return problems


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
