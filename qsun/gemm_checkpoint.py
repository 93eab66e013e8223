"""AutoAWQ's GEMM layout on disk: packed layers, and a whole checkpoint rewritten in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qsun.autoawq import pack
from qsun.decode_checkpoint import DecodeCheckpoint, QuantizedLayer
from qsun.errors import PlanError
from qsun.files import write_json
from qsun.scheme import AWQ_BITS, Scheme

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def gemm_tensors(layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """A layer as AutoAWQ's three tensors.

    Raises:
        PlanError: a scale that float16, the only dtype of this layout, cannot hold exactly.
    """
    scales = layer.scales.to(torch.float16)
    inexact = (scales.float() != layer.scales.float()).sum().item()
    if inexact:
        raise PlanError(
            f"{layer.name}: format awq stores scales as float16, and {inexact} of this layer's "
            "do not fit it exactly; use format compressed-tensors"
        )
    return {
        f"{layer.name}.qweight": pack(layer.codes.t() + 8),
        f"{layer.name}.qzeros": pack(layer.zeros.t() + 8),
        f"{layer.name}.scales": scales.t().contiguous(),
    }


def write_gemm(
    others: Mapping[str, torch.Tensor],
    layers: Iterable[QuantizedLayer],
    config: Mapping[str, Any],
    scheme: Scheme,
    full_precision: Sequence[str],
    folder: Path,
) -> None:
    """Write weights and config; `others` are the tensors of no quantized layer."""
    from huggingface_hub import save_torch_state_dict

    state = dict(others)
    for layer in layers:
        state |= gemm_tensors(layer)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    # transformers would read a quantization_config of its own making; this one is AutoAWQ's.
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    plain["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": AWQ_BITS,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(full_precision),
    }
    write_json(folder / "config.json", plain | scheme.code_bits())


def rewrite_as_gemm(source: Path, target: Path) -> None:
    """The same decode module in AutoAWQ's layout; every code, zero and scale keeps its value.

    Raises:
        PlanError: the module is not 4-bit asymmetric, or a scale does not fit float16.
    """
    with DecodeCheckpoint(source) as checkpoint:
        scheme = checkpoint.scheme
        if scheme.bits > AWQ_BITS or scheme.symmetric:
            raise PlanError(
                f"{source} is {scheme}: format awq is asymmetric, of at most {AWQ_BITS} bits"
            )
        ignored = checkpoint.config["quantization_config"].get("ignore") or ["lm_head"]
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        others = dict(checkpoint.other_tensors())
        write_gemm(others, checkpoint.layers(), checkpoint.config, scheme.as_awq(), ignored, target)
