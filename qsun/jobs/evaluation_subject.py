"""The subject of an evaluation: modules by what they were made as, and their test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, read_bundle
from qsun.checkpoint_files import read_config_file
from qsun.config import RunConfig
from qsun.decode_recipe import Likeness
from qsun.errors import ConfigError, ModelError, bullet_list, nearest
from qsun.evaluate.systems import Modules
from qsun.jobs.evaluation_request import Request
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
from qsun.records import read_record
from qsun.scheme import scheme_of
from qsun.verdict import require_verdict

LEVELS = ("static", "numeric")
DEFINITIONS = "verification"
# What a module that makes a system must have been tuned as, where it has a record.
TUNED_AS = {"full_ft": "full-ft", "sun": "sun", "qsun": "qsun"}


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


def bundle_subject(request: Request) -> Subject:
    """A verified bundle's modules and test sets.

    Raises:
        IncompatibleError: no bundle, or one without a verdict that passes.
    """
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


def config_subject(request: Request) -> Subject:
    """The modules that a config names, each looked at.

    Raises:
        ConfigError: none is named.
        ModelError: names everything that is not there, or is not what it is called.
    """
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
