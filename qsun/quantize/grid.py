"""The quantization grid: how a weight is rounded, by compressed-tensors' own arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qsun.decode_checkpoint import QuantizedLayer


def round_to_nearest(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """`weight` `[out, in]` rounded to the nearest code per group, min-max scaled, dequantized."""
    groups = weight.reshape(weight.shape[0], -1, args.group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    rounded: torch.Tensor = fake_quantize(x=weight, scale=scale, zero_point=zero, args=args)
    return rounded


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
