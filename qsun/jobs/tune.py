"""The tune job: from a config file to a prefill module in a folder of its own.

config -> task definition -> model configs -> task rows -> base checkpoint -> training, with
checkpoints in OUT.run -> tests -> record -> published folder. Each step refuses before the next.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.config import RunConfig
from qsun.errors import ConfigError, ModelError, OutputError, bullet_list
from qsun.files import digest_folder, publish_folder, refuse_used_folder, write_json
from qsun.jobs.check_tune import check_model, check_settings, definition_of
from qsun.kv_layout import kv_layout, layout_differences
from qsun.models import ModelSource, checkpoint_folder, fingerprint, locate, read_config
from qsun.models import serving_dtype as dtype_of
from qsun.processes import first_process_first, rank
from qsun.progress import announce
from qsun.records import new_record
from qsun.scheme import scheme_of
from qsun.skeleton import skeleton
from qsun.tasks.checkers import require_checker
from qsun.tasks.definition import TaskDefinition, load_task
from qsun.tasks.examples import TaskData, read_task

SYSTEMS = ("sun", "qsun", "full-ft")
RECORD = Path("records") / "tuning.json"
LOGS = ("log.jsonl", "tensorboard")


@dataclass(frozen=True)
class PreparedTuning:
    """Everything known before weights are opened."""

    run: RunConfig
    system: str
    task: TaskDefinition
    data: TaskData
    source: ModelSource
    model_config: dict[str, Any]
    decode: Path | None
    teacher: Path | None
    out: Path
    resume: bool

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs grow until the module is published."""
        return self.out.with_name(f"{self.out.name}.run")

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change between a run and its resumption."""
        return {
            "system": self.system,
            "run": asdict(self.run),
            "task": asdict(self.task),
            "rows": self.data.digest,
        }


def prepare_tuning(
    run: RunConfig, config_path: Path, task_name: str, system: str, out: Path, resume: bool
) -> PreparedTuning:
    """Check all that can be checked without opening weights, and read the task's rows.

    Raises:
        QsunError: whatever would stop the run later and can be known now.
    """
    relative_to = config_path.absolute().parent
    definition_path = definition_of(run, task_name, relative_to)
    task = load_task(definition_path)
    check_settings(run, system)
    source = locate(run.base.model, run.base.revision, relative_to)
    model_config = read_config(source)
    check_model(run, task, model_config)
    if run.tune.test and task.tests:
        require_checker(task.checker)
    decode = _module(run.tune.decode, relative_to) if system == "qsun" else None
    teacher = _module(run.tune.teacher, relative_to) if run.tune.loss != "nll" else None
    for folder, what in ((decode, "tune.decode"), (teacher, "tune.teacher")):
        if folder is not None:
            _check_shape(folder, what, model_config)
    refuse_used_folder(out)
    announce(f"reading task {task.name}")
    data = read_task(task, definition_path.parent, run.tune.samples)
    prepared = PreparedTuning(
        run, system, task, data, source, model_config, decode, teacher, out, resume
    )
    _check_run_folder(prepared)
    return prepared


def _module(path: str | None, relative_to: Path) -> Path:
    folder = (relative_to / Path(str(path)).expanduser()).resolve()
    if not folder.is_dir():
        raise ModelError(f"there is no module folder at {folder}")
    return folder


def _check_shape(folder: Path, what: str, model_config: dict[str, Any]) -> None:
    config = read_config_file(folder / "config.json")
    differences = layout_differences(kv_layout(model_config), kv_layout(config))
    if differences:
        raise ModelError(
            f"{what}: {folder} has another KV layout than the base model (base, module):\n"
            f"{bullet_list(differences)}\nUse a module made from this base model."
        )
    quantized = scheme_of(config) is not None
    if quantized != (what == "tune.decode"):
        kind = "is quantized" if quantized else "is not quantized"
        raise ModelError(f"{what}: {folder} {kind}")


def _check_run_folder(prepared: PreparedTuning) -> None:
    started = prepared.folder / "run.json"
    if not prepared.resume:
        if prepared.folder.exists() and rank() == 0:
            raise OutputError(
                f"an interrupted run lies in {prepared.folder}.\n"
                "Go on with it by --resume, or remove it yourself."
            )
        return
    if not started.exists():
        raise OutputError(f"--resume: there is no interrupted run in {prepared.folder}")
    before = _flat(json.loads(started.read_text(encoding="utf-8")))
    now = _flat(json.loads(json.dumps(prepared.identity)))
    changed = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"--resume: the run in {prepared.folder} was started differently:\n"
            f"{bullet_list(changed)}\nRestore these settings, or remove the folder and start anew."
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, entry in entries:
        flat |= _flat(entry, f"{name}.{key}".removeprefix("."))
    return flat


def run_tuning(prepared: PreparedTuning) -> dict[str, Any]:
    """Do it all and publish `prepared.out`; returns the result of the tuning record.

    Raises:
        QsunError: nothing was published; `prepared.folder` holds what a resume needs.
    """
    from qsun.tune.trainer import last_checkpoint

    try:
        return _run(prepared)
    except BaseException:
        if rank() == 0 and last_checkpoint(prepared.folder) is None:
            shutil.rmtree(prepared.folder, ignore_errors=True)  # nothing to go on with
        raise


def _run(prepared: PreparedTuning) -> dict[str, Any]:
    from qsun.tune.run import tune
    from qsun.tune.work import Checkpoints, Work

    with first_process_first():
        base = _open_base(prepared)
    work = Work(
        run=prepared.run,
        system=prepared.system,
        task=prepared.task,
        data=prepared.data,
        checkpoints=Checkpoints(base, prepared.decode, prepared.teacher),
        dtype=dtype_of(prepared.model_config),
        folder=prepared.folder,
        resume=prepared.resume,
    )
    if rank() > 0:
        return tune(work, prepared.out)
    with publish_folder(prepared.out) as scratch:
        result = tune(work, scratch)
        for name in LOGS:
            _copy(prepared.folder / name, scratch / "logs" / name)
        result["base"] = {
            "model": prepared.run.base.model,
            "revision": prepared.run.base.revision,
            "sha256": fingerprint(prepared.source, base),
        }
        result["files"] = digest_folder(scratch)
        new_record("tuning", prepared.run, prepared.run.seed, result).write(scratch / RECORD)
    shutil.rmtree(prepared.folder)
    return result


def _open_base(prepared: PreparedTuning) -> Path:
    """The base model's folder; a conversion is kept with the run's checkpoints."""
    prepared.folder.mkdir(parents=True, exist_ok=True)
    write_json(prepared.folder / "run.json", prepared.identity)
    converted = prepared.folder / "base"
    if prepared.source.gguf is not None and (converted / "tokenizer_config.json").exists():
        return converted
    announce("opening the base model")
    return checkpoint_folder(
        prepared.source,
        skeleton(prepared.model_config),
        converted,
        dtype_of(prepared.model_config),
    )


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copy(path, target)
