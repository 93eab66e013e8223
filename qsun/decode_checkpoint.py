"""Quantized decode modules on disk, both formats: layer by layer, or as a dense model.

A layer is read as what it means, signed codes with a zero and a scale per group, so that the same
module has the same digests whether it was written by compressed-tensors or in AutoAWQ's layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from qsun.autoawq import unpack
from qsun.checkpoint_files import Tensors, check_checkpoint, read_config_file
from qsun.errors import ModelError
from qsun.models import load_model
from qsun.scheme import AWQ_BITS, scheme_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer: weight = (codes - zeros) * scales, group by group along the inputs.

    `codes` int8 `[out, in]`, signed; `zeros` int8 and `scales` float, both `[out, in / group]`.
    """

    name: str
    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def weight(self, device: torch.device | None = None) -> torch.Tensor:
        """The exact weight, float32 `[out, in]`, where the codes are or on `device`."""
        out_features, groups = self.scales.shape
        parts = (self.codes, self.zeros, self.scales)
        codes, zeros, scales = (part.to(device or part.device).float() for part in parts)
        weight = codes.reshape(out_features, groups, -1) - zeros.unsqueeze(-1)
        return (weight * scales.unsqueeze(-1)).reshape(out_features, -1)

    def digest(self) -> str:
        """SHA-256 over codes, zeros and scales."""
        state = hashlib.sha256()
        for tensor in (self.codes, self.zeros, self.scales.float()):
            state.update(tensor.contiguous().numpy().data)
        return state.hexdigest()


class DecodeCheckpoint:
    """A quantized decode module's folder, opened for reading.

    Raises:
        ModelError: damaged, unsafe, or not quantized.
    """

    def __init__(self, folder: Path) -> None:
        check_checkpoint(folder)
        self.folder = folder
        self.config = read_config_file(folder / "config.json")
        scheme = scheme_of(self.config)
        if scheme is None:
            raise ModelError(f"{folder} is not quantized: its config.json declares no scheme")
        self.scheme = scheme
        self._tensors = Tensors(folder)
        self._code_suffix = ".qweight" if scheme.format == "awq" else ".weight_packed"

    def __enter__(self) -> DecodeCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors.__exit__(*error)

    def layer_names(self) -> list[str]:
        """Names of the quantized linear layers."""
        return [
            name.removesuffix(self._code_suffix)
            for name in self._tensors.names()
            if name.endswith(self._code_suffix)
        ]

    def layers(self) -> Iterator[QuantizedLayer]:
        """Every quantized layer, one in memory at a time."""
        for name in self.layer_names():
            yield self.layer(name)

    def layer(self, name: str) -> QuantizedLayer:
        """One quantized layer."""
        return self._gemm_layer(name) if self.scheme.format == "awq" else self._layer(name)

    def _gemm_layer(self, name: str) -> QuantizedLayer:
        middle = 2 ** (AWQ_BITS - 1)
        codes = unpack(self._tensors[f"{name}.qweight"]).t() - middle
        zeros = unpack(self._tensors[f"{name}.qzeros"]).t() - middle
        scales = self._tensors[f"{name}.scales"].t()
        return QuantizedLayer(name, codes.contiguous(), zeros.contiguous(), scales.contiguous())

    def _layer(self, name: str) -> QuantizedLayer:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape = torch.Size(self._tensors[f"{name}.weight_shape"].tolist())
        bits = self.scheme.stored_of(name)
        codes = unpack_from_int32(self._tensors[f"{name}.weight_packed"], bits, shape)
        scales = self._tensors[f"{name}.weight_scale"]
        zeros = torch.zeros(scales.shape, dtype=torch.int8)
        if not self.scheme.symmetric:
            packed = self._tensors[f"{name}.weight_zero_point"]
            zeros = unpack_from_int32(packed, bits, scales.shape, packed_dim=0)
        return QuantizedLayer(name, codes, zeros, scales)

    def other_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that belongs to no quantized layer."""
        for name in self._other_names():
            yield name, self._tensors[name]

    def _other_names(self) -> list[str]:
        quantized = tuple(f"{name}." for name in self.layer_names())
        biases = {f"{name}bias" for name in quantized}
        names = self._tensors.names()
        return [name for name in names if name in biases or not name.startswith(quantized)]

    def names(self) -> list[str]:
        """The tensors of the dense model that this is a module of, by name."""
        return sorted([*self._other_names(), *(f"{name}.weight" for name in self.layer_names())])

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor of the dense model; a quantized layer's weight as its codes mean it."""
        layer = name.removesuffix(".weight")
        quantized = f"{layer}{self._code_suffix}" in self._tensors
        return self.layer(layer).weight() if quantized else self._tensors[name]

    def layer_bytes(self) -> int:
        """Bytes on disk of all quantized layers, their scales and zeros included."""
        others = sum(tensor.nbytes for _, tensor in self.other_tensors())
        return sum(self._tensors[name].nbytes for name in self._tensors.names()) - others


def weights_digest(folder: Path) -> str:
    """SHA-256 over the quantized layers' names and digests: the same in either format."""
    with DecodeCheckpoint(folder) as checkpoint:
        digests = {layer.name: layer.digest() for layer in checkpoint.layers()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_decode(folder: Path, dtype: str) -> PreTrainedModel:
    """A decode module, quantized or not, as a dense and frozen model of `dtype`."""
    if scheme_of(read_config_file(folder / "config.json")) is None:
        return load_model(folder, dtype)
    return load_dequantized(folder, dtype)


def load_dequantized(folder: Path, dtype: str | None = None) -> PreTrainedModel:
    """The module as a dense, frozen model, computing what its codes mean; as `dtype`, or its own.

    What is of another dtype than its own was rounded to its own first.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with DecodeCheckpoint(folder) as checkpoint:
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        own = getattr(torch, str(checkpoint.config.get("dtype", "bfloat16")))
        state = {name: tensor.to(own) for name, tensor in checkpoint.other_tensors()}
        for layer in checkpoint.layers():
            state[f"{layer.name}.weight"] = layer.weight().to(own)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=getattr(torch, dtype) if dtype else own
        )
    return cast("PreTrainedModel", model.eval().requires_grad_(False))
