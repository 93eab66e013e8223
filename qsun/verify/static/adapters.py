"""LoRA adapters as files: do they fit the base model, and does vLLM compute what peft trained?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qsun.errors import IncompatibleError
from qsun.prefill_module import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LORA_NAME,
    PLAIN_STARTS,
    UNDERSTOOD,
    adapter_config,
    adapter_misfits,
    other_ranks,
)
from qsun.verify.static.headers import TensorHeader, read_header
from qsun.verify.steps import enumerated

Shapes = Mapping[str, tuple[int, ...]]

UNDERSTOOD_BY_VLLM = UNDERSTOOD | {"use_rslora"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder; each file is read when first asked for, and once."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `adapter_config.json`; raises `ModelError` where it is none."""
        return adapter_config(self.path)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Its tensors; raises `ModelError` where they cannot be read."""
        return read_header(self.path / ADAPTER_WEIGHTS)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors by name."""
        return {name: tensor.shape for name, tensor in self.headers.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a prefill module's folder holds an adapter, as `load_prefill` decides it."""
    return (folder / ADAPTER_CONFIG).exists()


def compare_adapter(adapter: Adapter, base: Shapes, promised_rank: Any) -> str:
    """How an adapter lies on its base model.

    Raises:
        IncompatibleError: it does not fit, has another rank than promised, or uses what vLLM
            would leave out.
        ModelError: a file that cannot be read, or no LoRA adapter.
    """
    config = adapter.config
    rank = config.get("r")
    if not isinstance(rank, int) or rank != promised_rank:
        raise IncompatibleError(f"rank {rank} in {ADAPTER_CONFIG}, {promised_rank} in the manifest")
    problems = _left_out_by_vllm(config)
    if not problems:
        problems = [f"{misfit}: fits no layer" for misfit in adapter_misfits(adapter.shapes, base)]
    if not problems:
        problems = other_ranks(adapter.shapes, rank) + _missing(adapter, base)
    if problems:
        raise IncompatibleError(enumerated(problems))
    return f"rank {rank}, {len(adapter.shapes) // 2} layers, all of the base model"


def _left_out_by_vllm(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} is {value!r}: vLLM would not compute what was trained"
        for key, value in config.items()
        if key not in UNDERSTOOD_BY_VLLM and value and value != "none"
    ]
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start}: training changed the base model as well")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']}: vLLM leaves an adapter's biases out")
    return problems


def _missing(adapter: Adapter, base: Shapes) -> list[str]:
    """Halves without their other half, and layers that the config names and the file lacks."""
    found = [match for match in map(LORA_NAME.fullmatch, adapter.shapes) if match is not None]
    sides = {(match["layer"], match["side"]) for match in found}
    layers = {layer for layer, _ in sides} | set(_targeted(adapter.config, base))
    return [
        f"{layer}: lora_{side} is missing"
        for layer in sorted(layers)
        for side in ("A", "B")
        if (layer, side) not in sides
    ]


def _targeted(config: Mapping[str, Any], base: Shapes) -> list[str]:
    """The base model's layers that the config names, where it names them plainly."""
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, list) or any(config.get(key) is not None for key in narrowed):
        return []
    return [
        layer
        for name, shape in base.items()
        if name.endswith(".weight") and len(shape) == 2
        for layer in [name.removesuffix(".weight")]
        if any(layer == target or layer.endswith(f".{target}") for target in targets)
    ]
