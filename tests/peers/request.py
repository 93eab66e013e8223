"""What a peer is asked for, and what its run cost; of packages torch alone, which all have.

A run is `python -m tests.peers.NAME REQUEST OUT`: it reads the request, writes a checkpoint to the
folder OUT and, last, OUT/cost.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

COST = "cost.json"
OWN = "own-weights"  # a file of some layers as the peer itself reads them; no tensor file by name
PROCESS = Path("/proc/self/status")


@dataclass(frozen=True)
class Request:
    """One quantization: a base checkpoint's folder, samples as token lists, bits of each weight.

    `options` are settings of one peer alone.
    """

    base: str
    samples: list[list[int]]
    bits: int
    group_size: int
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the request as JSON."""
        path.write_text(json.dumps(vars(self)), encoding="utf-8")


def read_request(path: Path) -> Request:
    """The request that a file holds."""
    return Request(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Run:
    """One run's clocks and what is to be told of it."""

    started: float = field(default_factory=time.monotonic)
    search_s: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Count the time within as search."""
        began = time.monotonic()
        yield
        self.search_s += time.monotonic() - began

    def cost(self) -> dict[str, Any]:
        """Seconds, the process's highest resident memory in bytes, and what was told.

        `processor_s` sums over cores: it says more than the clock where others share the machine.
        """
        return {
            "wall_s": time.monotonic() - self.started,
            "search_s": self.search_s,
            "processor_s": time.process_time(),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(),
            **self.told,
        }


def gpu() -> str | None:
    """The GPU that a peer is to use, as torch names it; None leaves it on the processor."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else None


def peak_gpu_bytes() -> int | None:
    """The most that torch has held of a GPU in this process; None without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def peak_memory_bytes() -> int:
    """The highest resident memory of this program (Linux).

    `ru_maxrss` would count the parent's memory too, which a child has until it starts its program.
    """
    for line in PROCESS.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{PROCESS} has no VmHWM")


def installed(*packages: str) -> dict[str, str]:
    """The versions of these packages here."""
    return {name: metadata.version(name) for name in packages}


def main(quantize: Callable[[Request, Path, Run], None]) -> None:
    """Run a peer as the command line asks; `cost.json` is written only when all is done."""
    run = Run()
    request, out = read_request(Path(sys.argv[1])), Path(sys.argv[2])
    quantize(request, out, run)
    (out / COST).write_text(json.dumps(run.cost(), indent=1), encoding="utf-8")
