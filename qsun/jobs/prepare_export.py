"""Preparing an export: what can be known, and refused, before weights are opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import check_checkpoint, read_config_file
from qsun.config import ExportConfig, RunConfig
from qsun.decode_recipe import QUANTIZATION, Likeness, likeness
from qsun.errors import ConfigError, ModelError, QsunError, bullet_list
from qsun.files import refuse_used_folder
from qsun.kv_layout import KvLayout, kv_layout, layout_differences
from qsun.models import ModelSource, locate, read_config
from qsun.prefill_module import ADAPTER_CONFIG
from qsun.records import read_record
from qsun.scheme import scheme_of
from qsun.tasks.definition import TaskDefinition, load_task

TUNING = "records/tuning.json"


@dataclass(frozen=True)
class Chosen:
    """One task's prefill module as it was found; `record` is its tuning record's result."""

    task: TaskDefinition
    definition: Path
    folder: Path
    record: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None

    @property
    def boundary(self) -> str:
        """What it was tuned for."""
        return str(self.record["boundary"]) if self.record else "n-1"


@dataclass(frozen=True)
class PreparedExport:
    """Everything that an export needs, checked."""

    run: RunConfig
    settings: ExportConfig
    source: ModelSource
    model_config: dict[str, Any]
    decode: Path
    chosen: tuple[Chosen, ...]
    format: str | None
    out: Path


def prepare_export(
    run: RunConfig, config_path: Path, out: Path, format_: str | None
) -> PreparedExport:
    """Check all that can be checked without opening weights.

    Raises:
        QsunError: names everything that stands in the way.
    """
    if run.export is None:
        raise ConfigError(
            f"{config_path} has no section `export`: name the decode module's folder and a prefill "
            "module for each task there"
        )
    relative_to = config_path.absolute().parent
    source = locate(run.base.model, run.base.revision, relative_to)
    model_config = read_config(source)
    layout = kv_layout(model_config)
    refuse_used_folder(out)
    problems: list[str] = []
    decode = resolved(run.export.decode, relative_to)
    problems += checkpoint_problems("export.decode", decode, layout)
    definitions = {Path(path).stem: relative_to / path for path in run.tasks}
    chosen = []
    for choice in run.export.prefill:
        folder = resolved(choice.module, relative_to)
        if choice.task not in definitions:
            known = ", ".join(definitions) or "none"
            problems.append(f"task {choice.task}: not among the config's `tasks` ({known})")
            continue
        adapter, found = module_problems(choice.task, folder, layout)
        problems += found
        if not found:
            definition = definitions[choice.task]
            record = _tuning_record(folder)
            chosen.append(Chosen(load_task(definition), definition, folder, record, adapter))
    names = [choice.task for choice in run.export.prefill]
    problems += [
        f"task {name}: named twice" for name in sorted(set(names)) if names.count(name) > 1
    ]
    problems += [] if names else ["export.prefill: names no task"]
    boundaries = {one.task.name: one.boundary for one in chosen}
    if len(set(boundaries.values())) > 1:
        problems.append(f"modules were tuned for different boundaries: {boundaries}")
    if not problems:
        problems += _decode_problems(decode, chosen)
    if problems:
        raise ModelError(f"these modules make no bundle:\n{bullet_list(problems)}")
    return PreparedExport(
        run, run.export, source, model_config, decode, tuple(chosen), format_, out
    )


def _decode_problems(decode: Path, chosen: Sequence[Chosen]) -> list[str]:
    """Modules that were tuned through another quantized decode module than the bundle's."""
    return [
        f"task {one.task.name}: tuned through another decode module (SHA-256 "
        f"{one.record['decode_digest'][:12]}...) than {decode}: name that one, or tune through "
        "this one"
        for one in chosen
        if one.record and tuned_through(one.record, decode) is Likeness.OTHER
    ]


def tuned_through(record: Mapping[str, Any], decode: Path) -> Likeness | None:
    """How a decode module compares with the one of a tuning's record; None where it names none."""
    digest = record.get("decode_digest")
    if not digest:
        return None
    if scheme_of(read_config_file(decode / "config.json")) is None:
        return Likeness.OTHER
    return likeness(decode, decode / QUANTIZATION, digest, record.get("decode_recipe"))


def resolved(path: str, relative_to: Path) -> Path:
    """A config's path, relative to the config's folder."""
    return (relative_to / Path(path).expanduser()).resolve()


def checkpoint_problems(what: str, folder: Path, layout: KvLayout) -> list[str]:
    """Why the checkpoint in `folder` cannot share a cache with the base model."""
    try:
        check_checkpoint(folder)
        found = kv_layout(read_config_file(folder / "config.json"))
    except QsunError as error:
        return [f"{what}: {error}"]
    return [
        f"{what}: another KV layout than the base model's (base, module): {difference}"
        for difference in layout_differences(layout, found)
    ]


def module_problems(
    task: str, folder: Path, layout: KvLayout
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """An adapter's own config, None for a checkpoint; and why the module cannot be exported."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None, checkpoint_problems(f"task {task}", folder, layout)
    try:
        return json.loads(path.read_text(encoding="utf-8")), []
    except (OSError, ValueError) as error:
        return None, [f"task {task}: {path} cannot be read: {error}"]


def _tuning_record(folder: Path) -> Mapping[str, Any] | None:
    path = folder / TUNING
    return read_record(path, "tuning").result if path.exists() else None
