"""TPOT of the decode module as vLLM loads it, beside the base model's, measured in one run.

Time per output token: the time from a stream's first token to its last, by the tokens between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.config import EvaluateConfig
from qsun.environments import ServingEnvironment
from qsun.scheme import scheme_of
from qsun.vllm_server import VllmServer, serve

START_TIMEOUT_S = 600
ROUNDS = 3
FIRST_TOKEN = 100  # any that is no special one


def measure_tpot(
    decode: Path, base: Path, serving: ServingEnvironment, settings: EvaluateConfig
) -> dict[str, Any]:
    """Seconds per output token of both by streams at once, and the decode module's share.

    Raises:
        ServingEnvironmentError: vLLM did not start.
    """
    scheme = scheme_of(read_config_file(decode / "config.json"))
    stored = () if scheme is None else scheme.stored_sizes
    if not set(stored) <= set(serving.kernel_bits):
        kernels = " and ".join(map(str, serving.kernel_bits))
        has = " and ".join(map(str, stored))
        reason = f"vLLM here has kernels for {kernels} bits, the decode module has {has}"
        return {"measured": False, "reason": reason}
    found = {
        name: _of_folder(folder, serving, settings)
        for name, folder in (("base", base), ("decode", decode))
    }
    return {
        "measured": True,
        "prompt_tokens": settings.tpot_tokens,
        "output_tokens": settings.tpot_tokens,
        "rounds": ROUNDS,
        "vllm": serving.versions,
        "by_streams": [
            {
                "streams": streams,
                "base_s": found["base"][streams],
                "decode_s": found["decode"][streams],
                "ratio": found["decode"][streams] / found["base"][streams],
            }
            for streams in settings.tpot_streams
        ],
    }


def _of_folder(
    folder: Path, serving: ServingEnvironment, settings: EvaluateConfig
) -> dict[int, float]:
    """The median TPOT over all streams of all rounds but the first, which warms up."""
    tokens = settings.tpot_tokens
    room = 2 * tokens + 16
    with serve(serving.python, folder, room, START_TIMEOUT_S) as server:
        found = {}
        for streams in settings.tpot_streams:
            rounds = [
                time_streams(server, streams, settings.tpot_tokens) for _ in range(ROUNDS + 1)
            ]
            found[streams] = median(seconds for one in rounds[1:] for seconds in one)
    return found


def time_streams(server: VllmServer, streams: int, tokens: int) -> Sequence[float]:
    """Seconds per output token of each of some streams at once, after prompts as long."""

    def stream(number: int) -> float:
        prompt = [FIRST_TOKEN + number, *range(FIRST_TOKEN, FIRST_TOKEN + tokens - 1)]
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        times = [time.monotonic() for _ in server.stream(body)]
        return (times[-1] - times[0]) / (tokens - 1)

    with ThreadPoolExecutor(streams) as threads:
        return list(threads.map(stream, range(streams)))
