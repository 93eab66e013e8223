"""The outcome of a quantization, whichever engine made it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer: relative output errors and the digest of its codes, zeros, scales.

    `rtn_error` is round-to-nearest without smoothing, `error` is what was written; its codes have
    `bits`, packed in `stored_bits`.
    `numbers` are `diagnosis.LayerNumbers`, None of an engine that does not take them.
    """

    name: str
    bits: int
    stored_bits: int
    group_size: int
    rtn_error: float
    error: float
    sha256: str
    numbers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Quantization:
    """The outcome of a run; perplexities are over the held-out text.

    `stages` are `diagnosis.StageNumbers`, none of an engine that does not take them.
    """

    layers: list[LayerResult]
    smoothing: list[dict[str, Any]]
    perplexity: dict[str, float]
    layer_bytes: int
    layer_bytes_full_precision: int
    checkpoint_bytes: int
    base_bytes: int
    search_s: float
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def size_ratio(self) -> float:
        """Bytes of the quantized layers over the bytes they took at 16 bits."""
        return self.layer_bytes / self.layer_bytes_full_precision

    def summary(self) -> dict[str, Any]:
        """The outcome as plain values, for a record."""
        return asdict(self) | {"size_ratio": self.size_ratio}


def tensor_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
