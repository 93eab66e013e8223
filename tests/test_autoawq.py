"""AutoAWQ's layout: our packing, undone by us and by compressed-tensors' own reader."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert import AutoAWQConverter

from qsun.autoawq import pack, unpack
from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import PlanError
from qsun.gemm_checkpoint import gemm_tensors

GROUP = 32


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, shape, generator=generator, dtype=torch.int8)


def random_layer(out_features: int = 48, in_features: int = 64) -> QuantizedLayer:
    groups = (out_features, in_features // GROUP)
    return QuantizedLayer(
        "model.layers.0.mlp.up_proj",
        codes=random_codes(out_features, in_features) - 8,
        zeros=random_codes(*groups, seed=1) - 8,
        scales=torch.rand(groups, generator=torch.Generator().manual_seed(2)).half(),
    )


def test_packing_is_undone_by_unpacking() -> None:
    codes = random_codes(64, 48)
    words = pack(codes)
    assert words.shape == (64, 6)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words), codes)


def test_channels_lie_in_autoawqs_order() -> None:
    # Hexadecimal digits from the highest: channels 7 5 3 1 6 4 2 0.
    assert pack(torch.arange(8, dtype=torch.int8).unsqueeze(0)).item() == 0x75316420


def test_a_full_word_is_a_negative_number() -> None:
    words = pack(torch.full((1, 8), 15, dtype=torch.int8))
    assert words.item() == -1
    assert unpack(words).tolist() == [[15] * 8]


def test_a_word_cannot_be_half_full() -> None:
    with pytest.raises(ValueError, match="12 output channels do not fill whole 32-bit words"):
        pack(random_codes(4, 12))


def test_compressed_tensors_reads_the_same_layer() -> None:
    layer = random_layer()
    found = AutoAWQConverter(group_size=GROUP).process(gemm_tensors(layer))
    shape = torch.Size(found[f"{layer.name}.weight_shape"].tolist())
    assert shape == layer.codes.shape
    codes = unpack_from_int32(found[f"{layer.name}.weight_packed"], 4, shape)
    assert torch.equal(codes, layer.codes)
    packed_zeros = found[f"{layer.name}.weight_zero_point"]
    zeros = unpack_from_int32(packed_zeros, 4, layer.zeros.shape, packed_dim=0)
    assert torch.equal(zeros, layer.zeros)
    assert torch.equal(found[f"{layer.name}.weight_scale"], layer.scales)


def test_a_weight_is_codes_less_zeros_times_scales() -> None:
    layer = random_layer()
    row, column = 5, 40
    group = column // GROUP
    exact = (layer.codes[row, column] - layer.zeros[row, group]) * layer.scales[row, group].float()
    assert layer.weight()[row, column] == exact


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    layer = random_layer()
    wide = QuantizedLayer(layer.name, layer.codes, layer.zeros, layer.scales.float() * 1e-7)
    with pytest.raises(PlanError, match="up_proj: format awq stores scales as float16"):
        gemm_tensors(wide)
