"""Kernel advice: the quickest of what was measured, never vLLM's slower choice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from qsun.kernel_advice import DEFAULT, FULL_PRECISION, KernelTime, choose, kernel_advice
from qsun.kernel_advice import TIMES as TIMES_FILE
from qsun.launch_spec import launch_spec
from tests.manifests import KV_LAYOUT, manifest

DOCS = Path(__file__).parents[1] / "docs"
FOUR = "W4A16 asymmetric"
LLAMA = KV_LAYOUT | {"layers": 32, "kv_heads": 8, "head_dim": 128}
MEASURED = {"shape": "large", "accelerator": "A GPU", "vllm": "1.0"}
TIMES = [
    KernelTime(FULL_PRECISION, DEFAULT, {1: 5.0, 8: 5.1, 64: 6.7, 256: 13.9}),
    KernelTime(FOUR, DEFAULT, {1: 4.0, 8: 4.1, 64: 6.6, 256: 13.3}),
    KernelTime(FOUR, "marlin", {1: 3.3, 8: 3.5, 64: 6.8, 256: 20.0}),
    KernelTime("FP8 W8A8", DEFAULT, {1: 3.5, 8: 3.8, 64: 5.2, 256: 9.0}),
]


@pytest.mark.parametrize(
    ("batch", "backend"),
    [(1, "marlin"), (8, "marlin"), (36, "marlin"), (60, DEFAULT), (256, DEFAULT), (500, DEFAULT)],
)
def test_the_quickest_kernel_at_the_expected_batch(batch: int, backend: str) -> None:
    advice = choose(TIMES, FOUR, batch, {})
    assert advice is not None
    assert advice.backend == backend
    assert advice.arguments == (() if backend == DEFAULT else ("--linear-backend", backend))


def test_every_measured_batch_is_advised_on_and_the_quickest_format_named() -> None:
    advice = choose(TIMES, FOUR, 8, {})
    assert advice is not None
    told = {one.batch: (one.backend, one.tpot_s, one.quickest_format) for one in advice.by_batch}
    assert told == {
        1: ("marlin", 3.3, FOUR),
        8: ("marlin", 3.5, FOUR),
        64: (DEFAULT, 6.6, "FP8 W8A8"),
        256: (DEFAULT, 13.3, "FP8 W8A8"),
    }
    assert [one.default_tpot_s for one in advice.by_batch] == [4.0, 4.1, 6.6, 13.3]
    assert [one.full_precision_tpot_s for one in advice.by_batch] == [5.0, 5.1, 6.7, 13.9]


def test_what_is_told_is_of_the_kernel_that_is_taken() -> None:
    told = {batch: choose(TIMES, FOUR, batch, MEASURED) for batch in (8, 500)}
    texts = {batch: one.text for batch, one in told.items() if one is not None}
    assert "marlin, for about 8 answers at once; at 8, TPOT was 0.69 of bfloat16's" in texts[8]
    assert "and 0.85 of vLLM's own choice's; FP8 W8A8 was quicker from 64" in texts[8]
    assert "those that vLLM chooses, for about 500" in texts[500]
    assert "0.96 of bfloat16's; " in texts[500]
    ahead = [*TIMES[:2], KernelTime(FOUR, "marlin", {1: 3.0, 8: 3.0, 64: 6.0, 256: 9.0})]
    beyond = choose(ahead, FOUR, 500, MEASURED)
    assert beyond is not None
    assert "0.96 of bfloat16's (" in beyond.text  # vLLM's own choice's, which is taken


def test_between_measured_batches_times_lie_on_a_line() -> None:
    assert TIMES[0].at(36) == pytest.approx(5.9)
    assert TIMES[0].at(1000) == 13.9


@pytest.mark.parametrize(
    "scheme",
    ["bfloat16", "W3A16 asymmetric, group 64, compressed-tensors", "W8A16 symmetric, group 64"],
)
def test_what_was_not_measured_is_not_advised_on(scheme: str) -> None:
    assert kernel_advice(scheme, LLAMA, 8) is None


@pytest.mark.parametrize(
    "scheme",
    [
        "W4A16 asymmetric, group 64, compressed-tensors",
        "W3A16 asymmetric, group 64, stored in 4 bits, compressed-tensors",
        "W2+3A16 (10, 20 layers) symmetric, group 128, stored in 4 bits, awq",
    ],
)
def test_measured_advice_is_the_quickest_measured_at_every_batch(scheme: str) -> None:
    advice = kernel_advice(scheme, LLAMA, 8)
    assert advice is not None
    assert advice.format == f"W4A16 {'a' if ' asym' in scheme else ''}symmetric"
    assert advice.measured["shape"] == "llama-3.1-8b"
    for one in advice.by_batch:
        assert one.quickest_tpot_s <= one.tpot_s <= one.default_tpot_s


def test_a_shape_on_which_a_kernel_was_not_measured_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shape(name: str, values: int, backends: dict[str, float]) -> dict[str, object]:
        formats = {FULL_PRECISION: {DEFAULT: 5.0}, FOUR: backends}
        times = [
            {"format": one, "backend": backend, "kernels": [], "tpot_s": {"1": tpot_s}}
            for one, found in formats.items()
            for backend, tpot_s in found.items()
        ]
        return {"shape": name, "cache_values_a_token": values, "times": times}

    both, one = {DEFAULT: 4.0, "marlin": 3.0}, {DEFAULT: 4.0}
    shapes = [shape("near", 32768, one), shape("next", 40000, both), shape("far", 9, both)]
    told = {"accelerator": "A GPU", "vllm": "1.0", "shapes": shapes}
    monkeypatch.setattr("qsun.kernel_advice._times", lambda: told)
    advice = kernel_advice("W4A16 asymmetric, group 64", LLAMA, 1)
    assert advice is not None
    assert (advice.measured["shape"], advice.backend) == ("next", "marlin")


def test_what_qsun_chooses_by_is_what_the_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    kernel_times = importlib.import_module("kernel_times")
    assert json.loads(TIMES_FILE.read_text()) == kernel_times.kernel_times()


def test_decode_workers_on_a_gpu_follow_it_and_no_others_do() -> None:
    spec = launch_spec(manifest(decode_batch=1), "gpu")
    assert spec.advice is not None
    for worker in spec.workers:
        assert ("--linear-backend" in worker.arguments) == (worker.role == "decode")
    on_cpu = launch_spec(manifest(decode_batch=1), "cpu")
    assert on_cpu.advice == spec.advice
    assert not any("--linear-backend" in worker.arguments for worker in on_cpu.workers)
    plain = launch_spec(manifest(decode_scheme="bfloat16"), "gpu")
    assert plain.advice is None
    assert not any("--linear-backend" in worker.arguments for worker in plain.workers)
