"""Peers: their checkpoints read as what they mean, their runs counted as their own."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.models import load_model
from qsun.rounding import round_layers
from qsun.scheme import Scheme
from tests.builders import tiny_model
from tests.peers.gptq_layout import load_gptq, unpacked
from tests.peers.layers import linear_layers
from tests.peers.request import COST, OWN, Request
from tests.peers.subjects import SUBJECTS

ROOT = Path(__file__).parent.parent
GROUP = 64


def packed(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[rows, codes]` as int32 words, each row one long number with its first code lowest."""
    words = []
    for row in rows.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        content = number.to_bytes(len(row) * bits // 8, "little")
        words.append(torch.frombuffer(bytearray(content), dtype=torch.int32))
    return torch.stack(words)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_read_across_words(bits: int) -> None:
    rng = random.Random(bits)
    codes = torch.tensor([[rng.randrange(2**bits) for _ in range(64)] for _ in range(3)])
    assert torch.equal(unpacked(packed(codes, bits), bits), codes)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "base")
    return tmp_path / "base"


def write_gptq(folder: Path, base: Path, bits: int) -> dict[str, torch.Tensor]:
    """Write random codes in GPTQ's layout for every layer; gives the weights that they mean."""
    model = load_model(base, "bfloat16")
    tensors = {name: value for name, value in model.state_dict().items() if "norm" in name}
    weights = {}
    torch.manual_seed(0)
    for name in linear_layers(model):
        outputs, inputs = model.get_submodule(name).weight.shape
        codes = torch.randint(2**bits, (outputs, inputs))
        zeros = torch.randint(2**bits, (inputs // GROUP, outputs))
        scales = torch.rand(inputs // GROUP, outputs).half() / 8
        order = torch.arange(inputs) // GROUP
        tensors |= {
            f"{name}.qweight": packed(codes, bits).t().contiguous(),
            f"{name}.qzeros": packed(zeros, bits),
            f"{name}.scales": scales,
            f"{name}.g_idx": order.int(),
        }
        shift = codes - zeros.t().repeat_interleave(GROUP, dim=1)
        weights[name] = shift * scales.float().t().repeat_interleave(GROUP, dim=1)
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / OWN)
    return weights


@pytest.mark.parametrize("bits", [3, 4])
def test_a_gptq_checkpoint_means_what_its_package_says(
    base: Path, tmp_path: Path, bits: int
) -> None:
    weights = write_gptq(tmp_path / "made", base, bits)
    model = load_gptq(tmp_path / "made", base, bits)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16())


def test_a_gptq_checkpoint_is_refused_that_is_not_comparable(base: Path, tmp_path: Path) -> None:
    weights = write_gptq(tmp_path / "made", base, 4)
    path = tmp_path / "made" / "model.safetensors"
    tensors, name = load_file(path), next(iter(weights))
    own, norm = tmp_path / "made" / OWN, "model.norm.weight"
    rest = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file({name: weights[name] + 1}, own)
    with pytest.raises(ValueError, match="off what its package reads"):
        load_gptq(tmp_path / "made", base, 4)
    save_file(tensors | {norm: tensors[norm] + 1}, path)
    with pytest.raises(ValueError, match=r"changes model\.norm\.weight"):
        load_gptq(tmp_path / "made", base, 4)
    save_file(rest, path)
    with pytest.raises(ValueError, match="other layers"):
        load_gptq(tmp_path / "made", base, 4)


def test_a_subject_runs_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    Request(str(base), [[1, 2, 3]], 3, GROUP).write(request)
    subject, out = SUBJECTS["round-to-nearest"], tmp_path / "made"
    subject.run(request, out, tmp_path / "log")
    expected = load_model(base, "bfloat16")
    round_layers(expected, linear_layers(expected), Scheme("compressed-tensors", 3, GROUP, False))
    found = subject.load(out, base, 3).state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found[name], weight)
    assert '"search_s"' in (out / COST).read_text(encoding="utf-8")


def test_a_run_that_fails_names_its_log(base: Path, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    Request(str(base / "nowhere"), [[1, 2, 3]], 3, GROUP).write(request)
    with pytest.raises(RuntimeError, match=r"run_rtn ended with code 1: see .*log"):
        SUBJECTS["round-to-nearest"].run(request, tmp_path / "made", tmp_path / "log")


def test_the_memory_of_a_child_is_its_own() -> None:
    held = bytearray(b"1" * 400 * 2**20)
    code = "from tests.peers.request import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert int(told.stdout) < len(held) / 4
