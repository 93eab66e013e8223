"""The subjects of the comparison: what each is run by, in which environment, and how it is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.decode_checkpoint import load_decode
from tests.peers.gptq_layout import load_gptq
from tests.peers.request import COST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
OURS = "qsun"
MIXED = "qsun-mixed"  # bits by layer, their mean as asked


@dataclass(frozen=True)
class Subject:
    """One quantizer: the module that runs it, its environment's folder, None for qsun's own.

    `variables` are for its process. `gptq` says that it writes GPTQ's layout.
    """

    module: str
    environment: str | None = None
    variables: Mapping[str, str] | None = None
    gptq: bool = False

    def missing(self) -> str | None:
        """What is to be done before it can run here, if anything."""
        if Path(self._python()).exists():
            return None
        return f"{self.module}: {self._python()} is missing: make peers"

    def run(self, request: Path, out: Path, log: Path) -> None:
        """Make a checkpoint, in a process of its own.

        Raises:
            RuntimeError: it failed; names its log.
        """
        command = [self._python(), "-P", "-m", f"tests.peers.{self.module}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(self.variables or {})
        with log.open("w", encoding="utf-8") as lines:
            ended = subprocess.run(
                [*command, str(request), str(out)],
                env=environment,
                cwd=out.parent,  # packages leave logs there
                stdout=lines,
                stderr=subprocess.STDOUT,
            )
        if ended.returncode or not (out / COST).exists():
            raise RuntimeError(f"{self.module} ended with code {ended.returncode}: see {log}")

    def load(self, out: Path, base: Path, bits: int) -> PreTrainedModel:
        """What it made, as a dense model."""
        return load_gptq(out, base, bits) if self.gptq else load_decode(out, "bfloat16")

    def _python(self) -> str:
        if self.environment is None:
            return sys.executable
        return str(ROOT / self.environment / "bin" / "python")


SUBJECTS = {
    "round-to-nearest": Subject("run_rtn"),
    "llmcompressor-awq": Subject("run_qsun"),
    "llmcompressor-gptq": Subject("run_llmcompressor_gptq"),
    # On two cores its pool of one worker is asked for two, and it does not start (7.6.0).
    "gptqmodel": Subject(
        "run_gptqmodel", ".venv-gptqmodel", {"GPTQMODEL_CPU_WORKERS": "2"}, gptq=True
    ),
    "auto-round": Subject("run_autoround", ".venv-autoround", gptq=True),
    OURS: Subject("run_qsun"),
    MIXED: Subject("run_qsun"),
}


def options(
    name: str,
    bits: int,
    config: Path,
    calibration: Path,
    prefill: Mapping[str, Path],
    iterations: int,
) -> dict[str, Any]:
    """The settings of one subject's request; `told` is what a record says of them."""
    if name == "auto-round":
        return {"iters": iterations, "enable_torch_compile": False}
    if name not in ("llmcompressor-awq", OURS, MIXED):
        return {}
    modules = ", ".join(f"{{task: {task}, module: {path}}}" for task, path in prefill.items())
    behind = f"quantize.search.prefill=[{modules}]"
    own = {
        "llmcompressor-awq": ["quantize.grid_points=20", "quantize.search={}"],
        OURS: [behind],
        MIXED: [behind, f"quantize.target_bits={bits}"],
    }
    common = [f"quantize.calibration={calibration}", "load_check.mode=skip"]
    return {
        "engine": name.partition("-")[0],
        "config": str(config),
        "settings": [*common, *own[name]],
        "told": {"prefill": sorted(prefill)} if name in (OURS, MIXED) else {"grid_points": 20},
    }
