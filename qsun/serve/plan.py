"""What is started on this machine: the bundle's launch spec, with as many workers as asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qsun.errors import ConfigError, bullet_list
from qsun.launch_spec import LaunchSpec, WorkerSpec

GPU_SHARE = 0.9  # of a GPU's memory, for all its workers together
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
SHARE_OPTION = "--gpu-memory-utilization"


def serving_plan(spec: LaunchSpec, decode: int, prefill: Mapping[str, int]) -> LaunchSpec:
    """The spec with `decode` decode workers, and `prefill` workers for the tasks named in it.

    Tasks whose modules are on one worker are on all of its copies: the largest number counts.

    Raises:
        ConfigError: tasks that the bundle does not have, or numbers below 1.
    """
    tasks = sorted({task for worker in spec.of("prefill") for task in worker.tasks})
    wrong = [
        f"--prefill {task}: the tasks are {', '.join(tasks)}" for task in prefill.keys() - tasks
    ]
    wrong += [
        f"--prefill {task}={count}: at least 1" for task, count in prefill.items() if count < 1
    ]
    wrong += [f"--decode {decode}: at least 1"] if decode < 1 else []
    if wrong:
        raise ConfigError(f"these workers cannot be started:\n{bullet_list(sorted(wrong))}")
    copies = [
        copy
        for worker in spec.workers
        for copy in _copies(
            worker,
            decode
            if worker.role == "decode"
            else max(prefill.get(task, 1) for task in worker.tasks),
        )
    ]
    twice = [name for name, count in Counter(copy.name for copy in copies).items() if count > 1]
    if twice:
        names = ", ".join(sorted(twice))
        raise ConfigError(f"two workers would be called {names}: give their tasks other numbers")
    return replace(spec, workers=tuple(copies))


def on_gpus(spec: LaunchSpec, gpus: Sequence[str]) -> LaunchSpec:
    """The workers dealt to these GPUs in turn; those on one share its memory evenly.

    `gpus` are named as CUDA_VISIBLE_DEVICES names them.

    Raises:
        ConfigError: there is no GPU.
    """
    if not gpus:
        raise ConfigError("the workers need a GPU, and this machine has none")
    on_each = [len(spec.workers[place :: len(gpus)]) for place in range(len(gpus))]
    workers = []
    for number, worker in enumerate(spec.workers):
        place = number % len(gpus)
        share = () if on_each[place] == 1 else (SHARE_OPTION, f"{GPU_SHARE / on_each[place]:.3f}")
        environment = worker.environment | {VISIBLE_GPUS: gpus[place]}
        arguments = (*worker.arguments, *share)
        workers.append(replace(worker, arguments=arguments, environment=environment))
    return replace(spec, workers=tuple(workers))


def _copies(worker: WorkerSpec, count: int) -> Iterator[WorkerSpec]:
    if count == 1:
        yield worker
        return
    for number in range(count):
        yield replace(worker, name=f"{worker.name}-{number}")
