"""The requests of a simulation: drawn from its workload, or its trace's; those of a spike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qsun.simulate.cluster import Load
from qsun.simulate.config import EventsConfig, SimulateConfig
from qsun.simulate.curve_records import Curves
from qsun.workload import Request, Workload, closed_loop, open_loop, read_trace, zipf_shares


def requests_of(config: SimulateConfig, seed: int) -> list[Request]:
    """All that may come, also after the window, in the order in which they do; closed loop: none.

    Raises:
        DataError: a trace that cannot be read; names its lines.
    """
    if config.trace is not None:
        return read_trace(Path(config.trace).expanduser(), config.tasks)
    if config.workload.rate_per_s is None:
        return []
    return open_loop(config.workload, config.tasks, config.duration_s + config.settle_s, seed)


def load_of(config: SimulateConfig, requests: Sequence[Request], seed: int) -> Load:
    """The requests as they come, or as many users as the closed loop has."""
    if requests or config.workload.concurrency is None:
        return Load(requests)
    endless = closed_loop(config.workload, config.tasks, seed)
    return Load(users=config.workload.concurrency, endless=endless)


def with_spike(
    requests: Sequence[Request],
    workload: Workload,
    tasks: Sequence[str],
    events: EventsConfig,
    seed: int,
) -> list[Request]:
    """The same requests, and more of one task's: `factor` times its rate for `lasts_s`."""
    task = events.task or tasks[0]
    assert workload.rate_per_s is not None, "a spike is one of an open loop"
    share = float(zipf_shares(len(tasks), workload.alpha)[list(tasks).index(task)])
    rate = (events.factor - 1) * share * workload.rate_per_s
    if rate <= 0:
        return list(requests)
    more = open_loop(replace(workload, rate_per_s=rate), [task], events.lasts_s, seed)
    shifted = [replace(one, at_s=one.at_s + events.at_s) for one in more]
    return sorted([*requests, *shifted], key=lambda one: one.at_s)


def beyond_measured(
    requests: Sequence[Request], curves: Curves, decode_format: str
) -> dict[str, int]:
    """How many prompts and contexts are longer than any measured, or shorter than all."""
    longest_context = curves.steps[decode_format].longest_tokens
    least, most = curves.prefill_s.at[0], curves.prefill_s.at[-1]
    return {
        "requests": len(requests),
        "prompts_longer": sum(one.prompt_tokens > most for one in requests),
        "prompts_shorter": sum(one.prompt_tokens < least for one in requests),
        "contexts_longer": sum(
            one.prompt_tokens + one.output_tokens > longest_context for one in requests
        ),
    }
