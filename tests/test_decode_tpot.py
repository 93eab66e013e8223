"""The plan of the TPOT sweeps on GPUs: formats that compressed-tensors knows, and honest floors."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig

from qsun.skeleton import skeleton
from tests.gpu.decode_tpot import FORMATS, Format, shape_config, step_bytes, sweeps, weight_bytes
from tests.gpu.tpot_turns import GPU_BYTES, WORKING_BYTES, Engine, Turns, cache_bytes, run_turns
from tests.processes import PARENT, ends

SHAPE = "llama-3.1-8b"


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_a_format_is_one_of_compressed_tensors(one: Format) -> None:
    quantization = one.quantization()
    if quantization is None:
        assert one.weight_bits == 16
        return
    found = QuantizationConfig(**quantization)
    assert found.format == one.packing
    (scheme,) = found.config_groups.values()
    assert scheme.weights.num_bits == int(one.weight_bits)
    assert (scheme.input_activations is None) == ("W4A16" in one.name)


def test_a_step_reads_every_weight_but_the_embeddings_once() -> None:
    config = shape_config(SHAPE)
    read = skeleton(config).parameters - config["vocab_size"] * config["hidden_size"]
    full = weight_bytes(SHAPE, FORMATS[0])
    assert step_bytes(SHAPE, FORMATS[0], 0, 0) == full
    assert full == pytest.approx(2 * read, rel=1e-4)  # norms aside
    assert step_bytes(SHAPE, FORMATS[0], 4, 1000) - full == 4 * 1000 * 2 * 32 * 8 * 128 * 2
    four = next(one for one in FORMATS if one.label == "W4A16 symmetric, marlin")
    head = 2 * config["vocab_size"] * config["hidden_size"]
    assert step_bytes(SHAPE, four, 0, 0) - head == pytest.approx(
        (full - head) * (4 + 16 / 128) / 16, rel=1e-4
    )


def test_every_sweep_has_a_model_and_a_place_of_its_own(tmp_path: Path) -> None:
    found = list(sweeps([SHAPE, "qwen3-8b-base"], tmp_path, ""))
    assert len({one.name for one in found}) == len(found) == 2 * len(FORMATS)
    for one in found:
        config = json.loads((one.write_model() / "config.json").read_text())
        assert config.get("quantization_config") == one.format.quantization()
        command = one.engine("python", "1", "512").command
        assert command[command.index("--backend") + 1] == one.format.backend
    assert [
        one.shape for one in sweeps([SHAPE, "qwen3-8b-base"], tmp_path, "qwen3-8b-base-fp8")
    ] == ["qwen3-8b-base"]


WORKER = """
import pathlib, sys, time
out, others = pathlib.Path(sys.argv[1]), [pathlib.Path(one) for one in sys.argv[2:-3]]
if out.name == "broken.json":
    sys.exit("out of memory")
time.sleep(0.2)
out.with_suffix(".ready").touch()
while not out.with_suffix(".go").exists():
    time.sleep(0.01)
assert all(one.with_suffix(".ready").exists() for one in others)
out.with_suffix(".begun").write_text(str(time.monotonic()))
time.sleep(0.2)
out.write_text(str(time.monotonic()))
"""


def test_engines_load_together_and_are_timed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine(name: str, others: tuple[str, ...] = ()) -> Engine:
        paths = [str(tmp_path / f"{one}.json") for one in (name, *others)]
        command = [sys.executable, "-c", WORKER, *paths]
        return Engine(name, command, tmp_path / f"{name}.json", tmp_path / f"{name}.log", 1e9)

    engines = [engine("a", ("b",)), engine("b", ("a",)), engine("broken"), engine("c")]
    run_turns(engines, Turns(("0",), 3, 0.9, time.monotonic() + 1000))
    assert [one.name for one in engines if not one.out.exists()] == ["broken"]
    assert "out of memory" in capsys.readouterr().out
    spans = [
        (float(one.file("begun").read_text()), float(one.out.read_text()))
        for one in engines
        if one.out.exists()
    ]
    for (_, ended), (begun, _) in pairwise(spans):
        assert begun >= ended
    before = engines[0].out.stat().st_mtime_ns
    run_turns(engines[:2], Turns(("0",), 3, 0.9, time.monotonic() + 1000))
    assert engines[0].out.stat().st_mtime_ns == before


def test_no_engine_outlives_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu.tpot_turns.LEAST_S", 0.0)
    out, told = tmp_path / "slow.json", tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, str(told)]
    engine = Engine("slow", command, out, tmp_path / "slow.log", 1e9)
    run_turns([engine], Turns(("0",), 1, 0.9, time.monotonic() + 3))
    assert ends(int(told.read_text()))


def test_every_engine_has_a_cache_of_one_size_and_all_fit() -> None:
    engines = [Engine(str(one), [], Path(), Path(), one) for one in (16e9, 4e9, 4e9)]
    each = cache_bytes(engines, 0.9)
    assert each > 30e9
    assert 3 * (each + WORKING_BYTES) + 24e9 <= 0.9 * GPU_BYTES
