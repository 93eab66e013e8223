"""Preparing engine qsun: what its calibration and its prefill modules must be, known at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.block import LAYERS
from qsun.calibrate.definition import TextDefinition
from qsun.config import QuantizeConfig, SearchConfig
from qsun.errors import ConfigError, ModelError, bullet_list, nearest
from qsun.files import bytes_of
from qsun.jobs.prepare_export import module_problems, resolved
from qsun.kv_layout import kv_layout
from qsun.prefill_module import check_plain_lora
from qsun.quantize.plan import Plan
from qsun.skeleton import Skeleton


def check_search(
    settings: QuantizeConfig,
    plan: Plan,
    calibration: TextDefinition,
    model_config: Mapping[str, Any],
    shape: Skeleton,
    relative_to: Path,
) -> dict[str, Path]:
    """The folder of each named source's prefill module.

    Raises:
        ConfigError: settings that another engine would not see, or that contradict one another.
        ModelError: a module that is missing, of another KV layout, or no plain LoRA adapter on
            this base model; all are named.
    """
    problems = _contradictions(settings, plan, calibration)
    if problems:
        raise ConfigError(f"this search cannot be made:\n{bullet_list(problems)}")
    layout = kv_layout(model_config)
    folders = {one.task: resolved(one.module, relative_to) for one in settings.search.prefill}
    for task, folder in folders.items():
        adapter, found = module_problems(task, folder, layout)
        problems += found
        if adapter is not None:
            problems += _adapter_problems(task, folder, shape)
    if problems:
        raise ModelError(
            f"these modules write no cache for the base model:\n{bullet_list(problems)}"
        )
    return folders


def _adapter_problems(task: str, folder: Path, shape: Skeleton) -> list[str]:
    try:
        check_plain_lora(folder, shape.tensors)
    except ModelError as error:
        return [f"task {task}: {error}"]
    return []


def memory_limit(search: SearchConfig) -> int:
    """Bytes that a search may hold: as set, or what is free."""
    if search.memory is not None:
        return bytes_of(search.memory)
    import psutil

    return int(psutil.virtual_memory().available)


def _memory_problems(memory: str | None) -> list[str]:
    try:
        bytes_of(memory or "0B")
    except ValueError as error:
        return [f"quantize.search.memory: {error}"]
    return []


def _contradictions(settings: QuantizeConfig, plan: Plan, calibration: TextDefinition) -> list[str]:
    search = settings.search
    if settings.engine != "qsun":
        if search == SearchConfig():
            return []
        return [
            f"quantize.search is engine qsun's, and quantize.engine is {settings.engine}: leave it "
            "out (--set quantize.search={})"
        ]
    problems = _memory_problems(search.memory)
    problems += [
        f"{layer.name} is in no decoder block, and engine qsun searches in these alone: "
        "name it in quantize.keep_full_precision"
        for layer in plan.layers
        if not layer.name.startswith(f"{LAYERS}.")
    ]
    names = [source.name for source in calibration.sources]
    chosen = [one.task for one in search.prefill]
    problems += [
        f"quantize.search.prefill: the calibration has no source {name!r} ({nearest(name, names)})"
        for name in chosen
        if name not in names
    ]
    problems += [
        f"quantize.search.prefill: task {name!r} is named {chosen.count(name)} times"
        for name in sorted(set(chosen))
        if chosen.count(name) > 1
    ]
    if search.positions == "all" and chosen:
        problems.append(
            "quantize.search.positions is all: whole texts are read by the decode module itself, "
            "and no prefill module has a part in it; leave quantize.search.prefill out"
        )
    if search.positions == "responses":
        problems += [
            f"source {source.name} has no responses, and a decode module computes no other "
            "positions; give it prompt and response, or set quantize.search.positions to all"
            for source in calibration.sources
            if source.text is not None or (source.prompt is not None and source.response is None)
        ]
    return problems
