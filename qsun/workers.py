"""The workers of a launch spec, started on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsun.launch_spec import LaunchSpec, WorkerSpec
from qsun.ports import free_ports
from qsun.vllm_server import ServerCommand, VllmServer, serve_all

GUARD = Path(__file__).with_name("guard")
"""The only folder of qsun's that vLLM's Python looks into."""
MODEL_NAME = "--served-model-name"
SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"


@contextmanager
def running_workers(
    folder: Path, spec: LaunchSpec, python: Path, start_timeout_s: int
) -> Iterator[dict[str, VllmServer]]:
    """Start every worker of the bundle in `folder`, all at once; the ready servers by name.

    Raises:
        ServingEnvironmentError: one ended, or was not ready in time; says vLLM's own reason.
    """
    with serve_all(python, worker_commands(folder, spec), start_timeout_s) as servers:
        yield dict(zip((worker.name for worker in spec.workers), servers, strict=True))


def worker_commands(folder: Path, spec: LaunchSpec) -> list[ServerCommand]:
    """What starts each worker of the bundle in `folder`.

    Arguments and environment are the spec's, but for the side channels' ports: those are free
    ones, so that workers of the same bundle that are serving here already do not stand in the way.
    Workers without a GPU share this machine's cores, as far as the spec does not say otherwise:
    more threads than cores would wait for each other in loops that take the cores.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // len(spec.workers))
    shared = {"OMP_NUM_THREADS": str(threads)} if spec.accelerator == "cpu" else {}
    return [
        _command(folder, worker, shared | worker.environment | {SIDE_CHANNEL_PORT: str(port)})
        for worker, port in zip(spec.workers, free_ports(len(spec.workers)), strict=True)
    ]


def _command(folder: Path, worker: WorkerSpec, environment: dict[str, str]) -> ServerCommand:
    return ServerCommand(
        name=f"worker {worker.name}",
        model=worker.arguments[worker.arguments.index(MODEL_NAME) + 1],
        folder=folder / worker.folder,
        arguments=worker.arguments,
        environment=environment | {"PYTHONPATH": str(GUARD)},
    )
