"""The arguments and the environment of each vLLM worker of a bundle, model by model."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qsun.bundle import Manifest, PrefillModule
from qsun.files import GIB
from qsun.kv_layout import DTYPE_BYTES
from qsun.vllm_server import COMMON_ENVIRONMENT, CPU_ENVIRONMENT

Accelerator = Literal["cpu", "gpu"]
Role = Literal["prefill", "decode"]

# What the models that no client may ask for are called on their workers.
DECODE_NAME = "decode"
BASE_NAME = "no-task"
SIDE_CHANNEL_PORT = 5600
CPU_BLOCK_TOKENS = 128
GUARD_MODULE = "qsun_guard"
LEASE_S = 30
"""How long a prompt's cache is kept for the decode worker that is to fetch it."""
DECODE_STREAMS = 256
"""Requests that a decode worker answers at once: one more would wait there, its lease running."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank takes no others


def worker_label(task: str) -> str:
    """A task's name as a host name takes it: lower case, no dots or underscores."""
    return re.sub(r"[._]", "-", task.lower())


@dataclass(frozen=True)
class Model:
    """A checkpoint that gets a worker; `arguments` are its own alone."""

    worker: str
    role: Role
    tasks: tuple[str, ...]
    folder: str
    served_name: str
    arguments: tuple[str, ...] = ()


def models(manifest: Manifest) -> Iterator[Model]:
    """A bundle's: one for all LoRA tasks, one for each full P, one for D."""
    base, adapters = manifest.base_path, [one for one in manifest.prefill if one.module == "lora"]
    if base is not None and adapters:
        tasks = tuple(module.task for module in adapters)
        options = _lora_arguments(base, adapters)
        yield Model("prefill", "prefill", tasks, base, BASE_NAME, options)
    for module in manifest.prefill:
        if module.module == "full":
            worker = f"prefill-{worker_label(module.task)}"
            yield Model(worker, "prefill", (module.task,), module.path, module.task)
    tasks = tuple(module.task for module in manifest.prefill)
    yield Model("decode", "decode", tasks, manifest.decode_path, DECODE_NAME)


def arguments(manifest: Manifest, accelerator: Accelerator, model: Model) -> Iterator[str]:
    """VLLM's arguments for a model, but for host, port and those that are its own alone."""
    yield from ("--model", "./", "--served-model-name", model.served_name)
    yield from ("--tokenizer", posixpath.relpath(manifest.tokenizer_path, model.folder))
    yield from ("--max-model-len", str(manifest.max_tokens))
    yield from ("--dtype", str(manifest.kv_layout["dtype"]))
    yield from ("--kv-cache-dtype", manifest.kv_cache_dtype)
    yield from ("--kv-transfer-config", json.dumps(_kv_transfer(accelerator, model)))
    # A prompt may hold an earlier response. D has that one's keys and values in its own cache, but
    # a prompt's have to come from P.
    yield f"--{'no-' if model.role == 'decode' else ''}enable-prefix-caching"
    yield from ("--seed", "0", "--no-trust-remote-code", "--no-enable-log-requests")
    if model.role == "decode":
        yield from ("--max-num-seqs", str(DECODE_STREAMS))
    if accelerator == "cpu":
        yield from ("--block-size", str(CPU_BLOCK_TOKENS), "--enforce-eager")


def _kv_transfer(accelerator: Accelerator, model: Model) -> dict[str, Any]:
    return {
        "kv_connector": "NixlConnector",
        # The guard: vLLM's connector under its own name, with refusals. See guard/qsun_guard.py.
        "kv_connector_module_path": GUARD_MODULE,
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu" if accelerator == "cpu" else "cuda",
        # The other policy lets D compute the prompt: the wrong model, with status 200.
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "enforce_handshake_compat": True,
            "kv_lease_duration": LEASE_S,
            "qsun_bundle": posixpath.relpath(".", model.folder),
            "qsun_role": model.role,
        },
    }


def _lora_arguments(folder: str, adapters: Sequence[PrefillModule]) -> tuple[str, ...]:
    rank = max(module.rank or 0 for module in adapters)
    return (
        "--enable-lora",
        *("--max-lora-rank", str(next(allowed for allowed in LORA_RANKS if allowed >= rank))),
        *("--max-loras", str(len(adapters)), "--lora-modules"),
        *(f"{module.task}={posixpath.relpath(module.path, folder)}" for module in adapters),
    )


def environment(manifest: Manifest, accelerator: Accelerator, side_channel: int) -> dict[str, str]:
    """What a worker's environment adds; `side_channel` is the port of its NIXL hand-shakes."""
    found = COMMON_ENVIRONMENT | {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
    }
    if accelerator == "gpu":
        del found["TORCHDYNAMO_DISABLE"]
        return found | {"UCX_TLS": "all"}
    found |= CPU_ENVIRONMENT
    found["UCX_TLS"] = "tcp,sm,self,cma"
    found["VLLM_CPU_KVCACHE_SPACE"] = str(_cpu_cache_gib(manifest))
    # Bound to cores, several workers of one host would all take the same ones.
    found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return found


def _cpu_cache_gib(manifest: Manifest) -> int:
    """Whole GiB that hold the longest request; with less, vLLM does not start."""
    layout = manifest.kv_layout
    per_token = 2 * layout["layers"] * layout["kv_heads"] * layout["head_dim"]
    return 1 + int(manifest.max_tokens * per_token * DTYPE_BYTES[layout["dtype"]] // GIB)
