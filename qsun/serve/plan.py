"""What is started on this machine: the bundle's launch spec, with as many workers as asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qsun.errors import ConfigError, bullet_list
from qsun.launch_spec import LaunchSpec, WorkerSpec

GPU_SHARE = 0.9  # of a GPU's memory, for all its workers together
LEAST_SHARE = 0.01  # what vLLM then wants to find free; it takes what its cache's size says
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
SHARE_OPTION, CACHE_OPTION = "--gpu-memory-utilization", "--kv-cache-memory-bytes"


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


def with_caches(spec: LaunchSpec, cache_bytes: int) -> LaunchSpec:
    """Every worker with a KV cache of this size, whatever memory it finds free."""
    option = (CACHE_OPTION, str(cache_bytes))
    workers = [replace(one, arguments=(*one.arguments, *option)) for one in spec.workers]
    return replace(spec, workers=tuple(workers))


def on_gpus(spec: LaunchSpec, gpus: Sequence[str]) -> LaunchSpec:
    """The workers dealt to these GPUs in turn; those on one share its memory evenly.

    `gpus` are named as CUDA_VISIBLE_DEVICES names them. A worker whose cache has a size by
    `with_caches` has no share.

    Raises:
        ConfigError: there is no GPU.
    """
    if not gpus:
        raise ConfigError("the workers need a GPU, and this machine has none")
    on_each = [len(spec.workers[place :: len(gpus)]) for place in range(len(gpus))]
    workers = []
    for number, worker in enumerate(spec.workers):
        place = number % len(gpus)
        share = GPU_SHARE / on_each[place] if on_each[place] > 1 else None
        share = LEAST_SHARE if CACHE_OPTION in worker.arguments else share
        option = () if share is None else (SHARE_OPTION, f"{share:.3f}")
        environment = worker.environment | {VISIBLE_GPUS: gpus[place]}
        arguments = (*worker.arguments, *option)
        workers.append(replace(worker, arguments=arguments, environment=environment))
    return replace(spec, workers=tuple(workers))


def predecessors(spec: LaunchSpec) -> dict[str, str]:
    """Which worker must answer before another is started, by the other's name.

    What vLLM takes for its cache is what it finds left of its share of a GPU while it starts: what
    others take meanwhile would count as its own. So workers of one GPU start one after another,
    but for those whose cache has a size.
    """
    found: dict[str, str] = {}
    last: dict[str, str] = {}
    for worker in spec.workers:
        gpu = worker.environment.get(VISIBLE_GPUS)
        if gpu is None or CACHE_OPTION in worker.arguments:
            continue
        if gpu in last:
            found[worker.name] = last[gpu]
        last[gpu] = worker.name
    return found


def _copies(worker: WorkerSpec, count: int) -> Iterator[WorkerSpec]:
    if count == 1:
        yield worker
        return
    for number in range(count):
        yield replace(worker, name=f"{worker.name}-{number}")
