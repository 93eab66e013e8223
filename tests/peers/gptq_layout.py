"""Checkpoints in GPTQ's layout as dense models; zeros as stored, none less by one.

`qweight` holds codes along the inputs, `qzeros` along the outputs, each a stream of bits in 32-bit
words, lowest bits first, also where a code lies across two words (3 bits).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors import safe_open

from qsun.checkpoint_files import Tensors
from qsun.models import load_model
from tests.peers.layers import linear_layers
from tests.peers.request import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODES = ".qweight"
SIDES = (CODES, ".qzeros", ".scales", ".g_idx")
# Of a weight: scales may be float16 in one reading and float32 in the other.
ROUNDING = 2**-7


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of int32 `[rows, words]` as int64 `[rows, codes]`."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(stream), -1, bits).astype(np.int64)
    return torch.from_numpy(codes @ (1 << np.arange(bits)))


def weight(tensors: Tensors, name: str, bits: int) -> torch.Tensor:
    """A layer's weight, float32 `[out, in]`."""
    codes = unpacked(tensors[f"{name}{CODES}"].t(), bits)
    zeros = unpacked(tensors[f"{name}.qzeros"], bits)
    group, scales = tensors[f"{name}.g_idx"].long(), tensors[f"{name}.scales"].float()
    return (codes - zeros[group].t()) * scales[group].t()


def load_gptq(folder: Path, base: Path, bits: int) -> PreTrainedModel:
    """The base model with the checkpoint's layers in place of its own, dense, bfloat16.

    Raises:
        ValueError: it does not quantize just what every peer does, changes other tensors, or its
            package reads its codes otherwise.
    """
    model = load_model(base, "bfloat16")
    state = model.state_dict()
    with Tensors(folder) as tensors:
        layers = [name.removesuffix(CODES) for name in tensors.names() if name.endswith(CODES)]
        if sorted(layers) != sorted(linear_layers(model)):
            raise ValueError(f"{folder} quantizes other layers than the blocks' linear ones")
        weights = {name: weight(tensors, name, bits) for name in layers}
        changed = [
            name
            for name in tensors.names()
            if not name.endswith(SIDES) and not torch.equal(tensors[name].bfloat16(), state[name])
        ]
    if changed:
        raise ValueError(f"{folder} changes {', '.join(changed)}")
    _compare(folder, weights)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, values in weights.items():
            modules[name].weight.copy_(values)
    return cast("PreTrainedModel", model)


def _compare(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Compare with what the package that wrote the codes makes of them."""
    with safe_open(folder / OWN, framework="pt") as own:
        for name in own.keys():  # noqa: SIM118, it is no dict
            theirs, ours = own.get_tensor(name).float(), weights[name]
            apart = float((theirs - ours).abs().max() / ours.abs().max())
            if not apart < ROUNDING:
                raise ValueError(f"{folder}: {name} is {apart:.3f} off what its package reads")
