"""Round-to-nearest: the plainest quantization, which every other one is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qsun.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def round_to_nearest(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """`weight` `[out, in]` rounded to the nearest code per group, min-max scaled, dequantized."""
    groups = weight.reshape(weight.shape[0], -1, args.group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    rounded: torch.Tensor = fake_quantize(x=weight, scale=scale, zero_point=zero, args=args)
    return rounded


def round_layers(model: PreTrainedModel, names: Iterable[str], scheme: Scheme) -> None:
    """Replace the weights of the named linear layers by their rounded ones, each to its bits."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in names:
            weight = modules[name].weight
            args = QuantizationArgs(**scheme.arguments(scheme.bits_of(name)))
            weight.data = round_to_nearest(weight, args)
