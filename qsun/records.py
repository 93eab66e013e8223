"""Records: versioned JSON results that say what made them."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import resource
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.files import GIB, write_json

SCHEMA = 1
OWN_STATUS = Path("/proc/self/status")
# What people read of a quantization, beside its record.
REPORT, PICTURE = "records/quantization.md", "records/quantization.svg"
RECORDED_PACKAGES = (
    "qsun",
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "safetensors",
    "tokenizers",
    "datasets",
)


@dataclass(frozen=True)
class Record:
    """A result with its provenance. `kind` names the shape of `result`."""

    kind: str
    config: dict[str, Any]
    seed: int
    result: dict[str, Any]
    command: str = ""
    created: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Write the record atomically, its folder made when missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))


def new_record(kind: str, config: Any, seed: int, result: dict[str, Any]) -> Record:
    """A record of `result` stamped with this process's command, versions and hardware."""
    return Record(
        kind=kind,
        config=dataclasses.asdict(config),
        seed=seed,
        result=result,
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        hardware=hardware(),
    )


def read_record(path: Path, kind: str) -> Record:
    """Read a record of the given kind.

    Raises:
        QsunError: unreadable, of another kind, or of a schema this version does not know.
    """
    record = open_record(path)
    if record.schema != SCHEMA or record.kind != kind:
        raise QsunError(
            f"{path} is a {record.kind} of schema {record.schema}, not a {kind} of schema {SCHEMA}"
        )
    return record


def open_record(path: Path) -> Record:
    """Read a record of whatever kind and schema.

    Raises:
        QsunError: unreadable, or no record.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Record(**value)
    except (OSError, ValueError, TypeError) as error:
        raise QsunError(f"{path} is not a qsun record: {error}") from error


def command_line() -> str:
    """The command as typed, with the program's name in place of its path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def package_versions(names: tuple[str, ...] = RECORDED_PACKAGES) -> dict[str, str]:
    """Installed versions of `names`; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What this process runs on: processor, cores, memory, accelerator."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def peak_memory_bytes() -> int:
    """The most memory that this program was resident in so far.

    On Linux `ru_maxrss` will not do: it counts what a parent held when it started this program.
    """
    if OWN_STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", OWN_STATUS.read_text(encoding="utf-8"), re.M)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
