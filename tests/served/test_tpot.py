"""TPOT of a real vLLM server."""

from __future__ import annotations

import time

from qsun.evaluate.tpot import time_streams
from tests.serving import Serving

TOKENS = 24


def test_it_is_the_time_between_the_tokens_of_a_stream(served: Serving) -> None:
    server = served.server("prefill")
    time_streams(server, 1, TOKENS)
    started = time.monotonic()
    (alone,) = time_streams(server, 1, TOKENS)
    took = time.monotonic() - started
    # All of the time but for the prompt's, which is read at once.
    assert 0.5 * took < alone * (TOKENS - 1) < took
    together = time_streams(server, 3, TOKENS)
    assert len(together) == 3
    assert min(together) > 0
