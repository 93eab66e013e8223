"""Checks of a tuning without weights or rows: its settings, its task, the model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsun.config import RunConfig
from qsun.errors import ConfigError, ModelError, bullet_list
from qsun.kv_layout import kv_layout
from qsun.processes import count
from qsun.skeleton import skeleton
from qsun.tasks.definition import TaskDefinition


def definition_of(run: RunConfig, task_name: str, relative_to: Path) -> Path:
    """The file that defines one of the config's tasks.

    Raises:
        ConfigError: there is no such task.
    """
    paths = {Path(path).stem: relative_to / path for path in run.tasks}
    if task_name not in paths:
        known = ", ".join(paths) or "none: list task definitions under `tasks`"
        raise ConfigError(f"--task {task_name}: the config has no such task (it has {known})")
    return paths[task_name]


def check_settings(run: RunConfig, system: str) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: names all of them.
    """
    tune = run.tune
    problems = []
    at_once = tune.micro_batch_size * count()
    if tune.batch_size % at_once:
        problems.append(
            f"tune.batch_size {tune.batch_size} is no multiple of {at_once}, micro_batch_size "
            f"{tune.micro_batch_size} on {count()} process(es)"
        )
    if system == "qsun" and tune.decode is None:
        problems.append(
            "system qsun needs tune.decode, the folder of a decode module by `qsun quantize`"
        )
    if tune.cuda_graphs and (tune.gradient_checkpointing or count() > 1 or not _has_gpu()):
        problems.append(
            "tune.cuda_graphs needs one process with an NVIDIA GPU, and no gradient_checkpointing"
        )
    if tune.loss != "nll" and tune.teacher is None:
        problems.append(f"tune.loss {tune.loss} needs tune.teacher, a checkpoint's folder")
    if system == "full-ft" and tune.boundary != "n-1":
        problems.append("system full-ft has no boundary: leave tune.boundary at n-1")
    if problems:
        raise ConfigError(f"the run cannot be tuned as asked:\n{bullet_list(problems)}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_model(run: RunConfig, task: TaskDefinition, model_config: dict[str, Any]) -> None:
    """Refuse a task that is too long for the model, and adapters of layers that it does not have.

    Raises:
        ConfigError: which, and what there is.
        ModelError: the model attends to less than the task's tokens.
    """
    _check_lengths(task, model_config)
    if run.tune.module == "lora":
        _check_targets(run.tune.lora.targets, model_config)


def _check_lengths(task: TaskDefinition, model_config: dict[str, Any]) -> None:
    context = model_config["max_position_embeddings"]
    if max(task.max_tokens, task.max_new_tokens) > context:
        raise ConfigError(
            f"task {task.name}: max_tokens {task.max_tokens} or max_new_tokens "
            f"{task.max_new_tokens} is above the model's max_position_embeddings {context}"
        )
    window = kv_layout(model_config).sliding_window
    if window is not None and window < task.max_tokens:
        raise ModelError(
            f"the model attends to a sliding window of {window} tokens, less than the task's "
            f"max_tokens {task.max_tokens}: lower max_tokens"
        )


def _check_targets(targets: Sequence[str], model_config: dict[str, Any]) -> None:
    known = {layer.name.rpartition(".")[2] for layer in skeleton(model_config).linears}
    unknown = [target for target in targets if target not in known]
    if unknown or not targets:
        raise ConfigError(
            f"tune.lora.targets: the model has no layer {', '.join(unknown) or '(none is named)'}; "
            f"it has {', '.join(sorted(known))}"
        )
