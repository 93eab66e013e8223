"""Every scheme that the config offers: written, and read alike by transformers and by qsun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.scheme import Scheme
from tests.builders import write_config
from tests.command import run_qsun

SCHEMES = [
    (2, False, 64),
    (2, True, 32),
    (3, False, 32),
    (3, True, 64),
    (4, True, 128),
    (8, False, 64),
    (8, True, 32),
]


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
def test_a_scheme_means_the_same_to_transformers(
    bits: int, symmetric: bool, group_size: int, tiny_folder: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        tiny_folder,
        quantize__bits=bits,
        quantize__symmetric=symmetric,
        quantize__group_size=group_size,
    )
    out = tmp_path / "out"
    done = run_qsun("quantize", config, "--out", out)
    assert done.exit_code == 0, done.stderr

    with DecodeCheckpoint(out) as checkpoint:
        assert checkpoint.scheme == Scheme("compressed-tensors", bits, group_size, symmetric)
        for layer in checkpoint.layers():
            assert layer.scales.shape[1] * group_size == layer.codes.shape[1]
            largest = 2 ** (bits - 1)
            assert -largest <= layer.codes.min().item() <= layer.codes.max().item() < largest
            assert symmetric == (not layer.zeros.any())
    tokens = torch.arange(40, 60).unsqueeze(0)
    with torch.no_grad():
        ours = load_dequantized(out)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits
        full = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()(tokens).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, full)
