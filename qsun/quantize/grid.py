"""The quantization grid: how a weight is rounded, by compressed-tensors' own arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import quantize

from qsun.decode_checkpoint import QuantizedLayer


def quantized_layer(name: str, module: Any) -> QuantizedLayer:
    """What a linear module that llm-compressor has calibrated will be on disk."""
    args = module.quantization_scheme.weights
    codes = quantize(
        x=module.weight,
        scale=module.weight_scale,
        zero_point=module.weight_zero_point,
        args=args,
        dtype=torch.int8,
    )
    zeros = module.weight_zero_point.to(torch.int8)
    return QuantizedLayer(name, codes.cpu(), zeros.cpu(), module.weight_scale.detach().cpu())
