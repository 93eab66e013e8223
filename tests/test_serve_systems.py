"""The plan of the systems served on a GPU, and what its record says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qsun.checkpoint_files import read_config_file
from qsun.decode_checkpoint import DecodeCheckpoint
from qsun.prefill_module import load_prefill
from qsun.rounding import round_to_nearest
from tests.builders import tiny_model
from tests.gpu.serve_systems import systems_of
from tests.gpu.systems_bundles import TASKS, write_modules, write_rounded
from tests.gpu.systems_figures import ratios_of
from tests.gpu.systems_load import Load, measurements

LOAD = Load((0.0, 3.0), 8, 5.0, 48, 16, (1, 2), (64,), (16,))


def test_every_system_has_every_alpha_before_the_next_and_one_decoder_curves(
    tmp_path: Path,
) -> None:
    systems = systems_of(4, [2, 1])
    assert [one.name for one in systems] == ["isolated-4", "sun-2", "sun-1", "qsun-2", "qsun-1"]
    found = measurements(LOAD, [one for one in systems if one.bundle == "sun"], tmp_path)
    assert [(one.system.name, one.alpha) for one in found] == [
        *((name, alpha) for alpha in LOAD.alphas for name in ("isolated-4", "sun-2", "sun-1")),
        ("sun-1", None),
    ]
    assert len({one.out for one in found}) == len(found)
    assert [one.kept_as for one in found[2:]] == [
        "sun-1-alpha-0.json",
        *("isolated-4-alpha-3.json", "sun-2-alpha-3.json", "sun-1-alpha-3.json"),
        "latency-sun.json",
    ]
    more = measurements(replace(LOAD, users=9), systems[:1], tmp_path)
    assert more[0].out != found[0].out


def test_ratios_are_to_isolated_and_to_sun_of_as_many_decode_workers() -> None:
    speeds = {"isolated-4": 100.0, "sun-1": 200.0, "sun-2": 150.0, "qsun-1": 300.0}
    rows = [
        {
            "system": name,
            "alpha": 3.0,
            "tokens_per_s": speed,
            "interactivity_p50_tokens_per_s": speed,
            "tpot_p50_s": 1 / speed,
            "ttft_p50_s": None,
        }
        for name, speed in speeds.items()
    ]
    found = {(one["system"], one["to"]): one for one in ratios_of(rows)}
    assert {pair: one["tokens_per_s"] for pair, one in found.items()} == {
        ("sun-1", "isolated-4"): 2.0,
        ("sun-2", "isolated-4"): 1.5,
        ("qsun-1", "isolated-4"): 3.0,
        ("qsun-1", "sun-1"): 1.5,
    }
    assert found["qsun-1", "sun-1"]["tpot_p50_s"] == pytest.approx(2 / 3)
    assert "ttft_p50_s" not in found["qsun-1", "sun-1"]


def test_random_modules_are_modules_of_the_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(base)
    write_modules(base, tmp_path / "modules")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        answers = [
            load_prefill(tmp_path / "modules" / task, base, "float32")(tokens).logits
            for task in TASKS
        ]
    assert not any(torch.equal(answers[0], other) for other in answers[1:])


def test_the_decode_module_is_the_model_rounded_to_nearest(tmp_path: Path) -> None:
    base, decode = tmp_path / "base", tmp_path / "decode"
    model = tiny_model(base)
    decode.mkdir()
    write_rounded(base, decode, "cpu")
    assert read_config_file(decode / "config.json")["quantization_config"]["format"]
    from compressed_tensors.quantization import QuantizationArgs

    weights = dict(model.named_parameters())
    with DecodeCheckpoint(decode) as checkpoint:
        args = QuantizationArgs(**checkpoint.scheme.arguments(4))
        layers = list(checkpoint.layers())
        for layer in layers:
            wanted = round_to_nearest(weights[f"{layer.name}.weight"].detach(), args)
            assert torch.equal(layer.weight().to(torch.bfloat16), wanted)
    assert len(layers) == 7 * model.config.num_hidden_layers
