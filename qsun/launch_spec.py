"""The launch spec: which vLLM workers serve a bundle, each with its arguments and environment.

Workers are for the router alone: on loopback here, inside the cluster's network there. vLLM serves
whoever asks, and a client of a worker could get another task's cache, the decode module's own
answer, or end the engine of all tasks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.bundle import Manifest, PrefillModule
from qsun.errors import IncompatibleError, bullet_list
from qsun.kernel_advice import kernel_advice
from qsun.launch_arguments import (
    BASE_NAME,
    DECODE_NAME,
    LORA_RANKS,
    SIDE_CHANNEL_PORT,
    Accelerator,
    Role,
    arguments,
    environment,
    models,
    worker_label,
)

SCHEMA = 1
LAUNCH_SPEC = "serving/launch.json"
NOTE = (
    "Workers bind to loopback or to addresses inside the cluster. Clients must never reach them: "
    "the router alone keeps tasks apart and prompts away from the decode module."
)
SERVED_BOUNDARY = "n-1"
ROUTER_PORT = 8000
TASK_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,46}[A-Za-z0-9])?")
PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class WorkerSpec:
    """One vLLM server: `python -m SERVER_MODULE *arguments`, started in `folder` of the bundle.

    Every one has the literal `--model ./`: NIXL's compatibility hash contains the model's path, so
    that P and D agree and the check stays on. `arguments` lack host and port. `tasks` are the
    models that a prefill worker answers to; a decode worker serves them all as `DECODE_NAME`.
    """

    name: str
    role: Role
    tasks: tuple[str, ...]
    folder: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class LaunchSpec:
    """Everything to start. No two side channels share a port: one host can hold all workers.

    `advice` is `KernelAdvice` as plain values, None where nothing like D was measured: decode
    workers on a GPU follow it.
    """

    accelerator: Accelerator
    workers: tuple[WorkerSpec, ...]
    router_host: str = "127.0.0.1"
    router_port: int = ROUTER_PORT
    advice: dict[str, Any] | None = None
    note: str = NOTE
    schema: int = SCHEMA

    def of(self, role: Role) -> tuple[WorkerSpec, ...]:
        """The workers of one role."""
        return tuple(worker for worker in self.workers if worker.role == role)

    def summary(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def launch_spec(manifest: Manifest, accelerator: Accelerator) -> LaunchSpec:
    """The workers of a bundle: one for all LoRA tasks, one for each full P, one for D.

    Raises:
        IncompatibleError: vLLM could not serve it; names every reason.
    """
    problems = list(_problems(manifest))
    if problems:
        raise IncompatibleError(
            f"bundle {manifest.name} cannot be served:\n{bullet_list(problems, at_most=40)}"
        )
    advice = kernel_advice(manifest.decode_scheme, manifest.kv_layout, manifest.decode_batch)
    kernel = advice.arguments if advice is not None and accelerator == "gpu" else ()
    workers = tuple(
        WorkerSpec(
            name=model.worker,
            role=model.role,
            tasks=model.tasks,
            folder=model.folder,
            arguments=(
                *arguments(manifest, accelerator, model),
                *(kernel if model.role == "decode" else ()),
                *model.arguments,
            ),
            environment=environment(manifest, accelerator, SIDE_CHANNEL_PORT + index),
        )
        for index, model in enumerate(models(manifest))
    )
    told = None if advice is None else json.loads(json.dumps(asdict(advice)))
    return LaunchSpec(accelerator, workers, advice=told)


def read_launch_spec(path: Path) -> LaunchSpec:
    """Read what `LaunchSpec.summary` gave.

    Raises:
        IncompatibleError: missing, unreadable, of an unknown schema or with unknown fields.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            found = value["schema"]
            raise IncompatibleError(f"{path} has schema {found}; this qsun reads schema {SCHEMA}")
        workers = tuple(
            WorkerSpec(**worker | {key: tuple(worker[key]) for key in ("tasks", "arguments")})
            for worker in value.pop("workers")
        )
        return LaunchSpec(workers=workers, **value)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IncompatibleError(f"{path} is not a launch spec: {error!r}") from error


def _problems(manifest: Manifest) -> Iterator[str]:
    if not manifest.prefill:
        yield "it has no prefill module"
    if manifest.boundary != SERVED_BOUNDARY:
        yield f"boundary {manifest.boundary}: vLLM serves {SERVED_BOUNDARY} alone"
    if manifest.base_path is None and any(one.module == "lora" for one in manifest.prefill):
        yield "its LoRA modules need the base checkpoint, which it lacks"
    labels = Counter(worker_label(module.task) for module in manifest.prefill)
    for module in manifest.prefill:
        yield from (f"task {module.task}: {problem}" for problem in _module_problems(module))
        if labels[worker_label(module.task)] > 1:
            yield f"task {module.task}: another task has that name, but for case, dots or `_`"
    paths = [manifest.base_path, manifest.decode_path, manifest.tokenizer_path]
    for path in (*paths, *(module.path for module in manifest.prefill)):
        if path is not None and not all(map(PATH_PART.fullmatch, path.split("/"))):
            yield f"path {path}: not a plain relative path inside the bundle"


def _module_problems(module: PrefillModule) -> Iterator[str]:
    if not TASK_NAME.fullmatch(module.task):
        yield "a name has at most 48 letters, digits, dots, `_` or `-`, no sign first or last"
    if module.task in (DECODE_NAME, BASE_NAME):
        yield "that name is kept for a model that is no task"
    if module.module not in ("full", "lora"):
        yield f"module {module.module}, but full and lora are served"
    if module.boundary != SERVED_BOUNDARY:
        yield f"tuned for boundary {module.boundary}; vLLM serves {SERVED_BOUNDARY} alone"
    if module.module == "lora" and not 0 < (module.rank or 0) <= LORA_RANKS[-1]:
        yield f"LoRA rank {module.rank}: vLLM takes 1 to {LORA_RANKS[-1]}"
