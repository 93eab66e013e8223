"""What a vLLM worker has counted so far: where its prompt tokens came from, and what failed.

As vLLM 0.32 counts: after a hand-off all n prompt tokens are `transferred` and none is `computed`,
although the engine then computes the last one again to have something to predict from. A prompt
that it read by itself is `computed` whole.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, fields

from qsun.errors import ServingEnvironmentError
from qsun.vllm_server import VllmServer

SAMPLE = re.compile(r"^vllm:(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)", re.MULTILINE)
SOURCE = re.compile(r'source="(\w+)"')
PROMPT_TOKENS = "prompt_tokens_by_source_total"
SETTLE_S = 5.0


@dataclass(frozen=True)
class WorkerCounts:
    """Totals since the worker started; the difference of two tells what happened in between.

    `computed`, `cached` and `transferred` are prompt tokens: computed here, found in the worker's
    own prefix cache, and come from another worker. `transfers` and the bytes are of what this
    worker fetched; `expired` counts what others did not fetch from it in time. In each of `steps`
    the engine gives every request that it works on its next token, or reads prompts.
    """

    computed: int
    cached: int
    transferred: int
    generated: int
    transfers: int
    transferred_bytes: int
    failed_transfers: int
    expired: int
    preemptions: int
    steps: int

    def __sub__(self, earlier: WorkerCounts) -> WorkerCounts:
        before, after = asdict(earlier), asdict(self)
        return WorkerCounts(**{name: after[name] - before[name] for name in after})

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all sources."""
        return self.computed + self.cached + self.transferred


# In vLLM's words. Those of NIXL appear with the connector alone: without it they are 0.
_NAMES = {
    "computed": f"{PROMPT_TOKENS}:local_compute",
    "cached": f"{PROMPT_TOKENS}:local_cache_hit",
    "transferred": f"{PROMPT_TOKENS}:external_kv_transfer",
    "generated": "generation_tokens_total",
    "transfers": "nixl_bytes_transferred_count",
    "transferred_bytes": "nixl_bytes_transferred_sum",
    "failed_transfers": "nixl_num_failed_transfers_total",
    "expired": "nixl_num_kv_expired_reqs_total",
    "preemptions": "num_preemptions_total",
    "steps": "iteration_tokens_total_count",
}


def worker_counts(metrics: str) -> WorkerCounts:
    """Read a worker's `/metrics`; what several engines counted is added up.

    Raises:
        ServingEnvironmentError: a counter that every vLLM should have is missing.
    """
    totals: dict[str, float] = {}
    for found in SAMPLE.finditer(metrics):
        source = SOURCE.search(found["labels"] or "")
        name = f"{found['name']}:{source[1]}" if source else found["name"]
        totals[name] = totals.get(name, 0.0) + float(found["value"])
    missing = [
        name for name in _NAMES.values() if name not in totals and not name.startswith("nixl_")
    ]
    if missing:
        raise ServingEnvironmentError(f"this vLLM does not count {', '.join(missing)}")
    return WorkerCounts(
        **{field.name: int(totals.get(_NAMES[field.name], 0)) for field in fields(WorkerCounts)}
    )


def counts_of(worker: VllmServer) -> WorkerCounts:
    """What a worker has counted up to now."""
    return worker_counts(worker.metrics())


def counts_since(worker: VllmServer, before: WorkerCounts, prompt_tokens: int) -> WorkerCounts:
    """What a worker counted for requests of so many prompt tokens that it has just answered.

    vLLM counts after it answers: this waits a moment until as many have been counted.
    """
    deadline = time.monotonic() + SETTLE_S
    found = counts_of(worker) - before
    while found.prompt_tokens < prompt_tokens and time.monotonic() < deadline:
        time.sleep(0.02)
        found = counts_of(worker) - before
    return found
