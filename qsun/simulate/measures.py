"""What a run shows, in the words of the load generator's record.

Latencies are of requests that came within the window, tokens of steps that ended in it. Several
runs of one layout count as one, with windows of the same length one after another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from qsun.latency_summary import fairness, interactivity, percentiles
from qsun.simulate.cluster import Run
from qsun.simulate.config import SloConfig
from qsun.simulate.decode_worker import DecodeWorker, Stay
from qsun.simulate.journey import Journey

HELD = 0.99  # the share of requests that an SLO's p99 is about


def measures_of(runs: Sequence[Run], tasks: Sequence[str], slo: SloConfig) -> dict[str, Any]:
    """Figures of runs; seconds, tokens, and what is per second."""
    came = [one for run in runs for one in within(run)]
    length_s = sum(run.window.length_s for run in runs)
    by_task = {task: _of_task(task, runs, came, slo) for task in tasks}
    by_worker = _by_worker(runs)
    tokens_per_s = sum(one["tokens_per_s"] for one in by_worker.values())
    decode = sum(run.paid_workers for run in runs) / len(runs)
    prefill = sum(len(run.prefill) for run in runs) / len(runs)
    return {
        "window_s": [runs[0].window.begin_s, runs[0].window.end_s],
        "runs": len(runs),
        **_counts(came),
        "request_rate_per_s": len(came) / length_s,
        "mean_in_system": sum(run.in_system for run in runs) / len(runs),
        "decode_workers": decode,
        "prefill_workers": prefill,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_decode_worker": tokens_per_s / decode if decode else 0.0,
        "tokens_per_s_per_worker": tokens_per_s / (decode + prefill),
        **_latencies(came, length_s, slo),
        "slo_held": holds(came, slo),
        "fairness": fairness(
            [one["interactivity_tokens_per_s"]["mean"] for one in by_task.values() if one["tpot_s"]]
        ),
        "by_task": by_task,
        "by_worker": by_worker,
        "by_prefill_worker": _by_prefill_worker(runs),
    }


def within(run: Run) -> list[Journey]:
    """The requests that came within the window."""
    return [one for one in run.journeys if run.window.holds(one.began_s)]


def misses(came: Iterable[Journey], slo: SloConfig) -> tuple[int, int]:
    """How many requests miss the SLO's TTFT, and its TPOT; what was not answered misses both."""
    late = slow = 0
    for one in came:
        late += not one.answered or (one.ttft_s or 0.0) > slo.ttft_p99_s
        slow += not one.answered or (one.tpot_s or 0.0) > slo.tpot_p99_s
    return late, slow


def allowed_misses(requests: int) -> int:
    """How many of so many requests may miss an SLO that is held."""
    return int(requests * (1 - HELD) + 1e-9)


def holds(came: Sequence[Journey], slo: SloConfig) -> bool:
    """Whether 99 % of the requests are within the SLO's TTFT, and 99 % within its TPOT."""
    return max(misses(came, slo)) <= allowed_misses(len(came))


def latencies(came: Sequence[Journey]) -> dict[str, Any]:
    """Summaries over the answered ones; none where there is nothing to sum up."""
    answered = [one for one in came if one.answered]
    tpots = [one.tpot_s for one in answered if one.tpot_s is not None]
    return {
        "ttft_s": percentiles([one.ttft_s for one in answered if one.ttft_s is not None]),
        "tpot_s": percentiles(tpots),
        "request_s": percentiles([one.request_s for one in answered if one.request_s is not None]),
        "interactivity_tokens_per_s": interactivity(tpots),
    }


def _latencies(came: Sequence[Journey], length_s: float, slo: SloConfig) -> dict[str, Any]:
    good = sum(max(misses([one], slo)) == 0 for one in came)
    waited = [one.admitted_s - one.began_s for one in came if one.admitted_s is not None]
    return {
        **latencies(came),
        "queue_s": percentiles(waited),
        "goodput_per_s": good / length_s,
    }


def _counts(came: Sequence[Journey]) -> dict[str, Any]:
    ended = Counter(one.outcome.value for one in came if one.outcome is not None)
    answered = ended.pop("answered", 0)
    return {
        "sent": len(came),
        "answered": answered,
        "failed": ended.total(),
        "failures": dict(sorted(ended.items())),
        "unfinished": len(came) - answered - ended.total(),
        "attempts": sum(one.attempts for one in came),
    }


def _of_task(
    task: str, runs: Sequence[Run], came: Sequence[Journey], slo: SloConfig
) -> dict[str, Any]:
    mine = [one for one in came if one.request.task == task]
    length_s = sum(run.window.length_s for run in runs)
    tokens = sum(
        _tokens(run, worker, stay)
        for run in runs
        for worker in run.decode
        for stay in worker.stays
        if stay.journey.request.task == task
    )
    return {
        **_counts(mine),
        "tokens_per_s": tokens / length_s,
        **_latencies(mine, length_s, slo),
    }


def _by_worker(runs: Sequence[Run]) -> dict[str, Any]:
    """Each decode worker's tokens, and its mean batch: tokens a step."""
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for run in runs:
        for worker in run.decode:
            begin, end = run.steps[worker]
            steps[worker.name] += end - begin
            tokens[worker.name] += sum(_tokens(run, worker, stay) for stay in worker.stays)
    length_s = sum(run.window.length_s for run in runs)
    return {
        name: {
            "role": "decode",
            "tokens_per_s": tokens[name] / length_s,
            "mean_batch": tokens[name] / steps[name] if steps[name] else 0.0,
        }
        for name in sorted(steps)
    }


def _by_prefill_worker(runs: Sequence[Run]) -> dict[str, Any]:
    """Each prefill worker's share of the time in which it read."""
    busy_s: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        for worker in run.prefill:
            busy_s[worker.name] += worker.busy_s
    length_s = sum(run.window.length_s for run in runs)
    return {name: {"role": "prefill", "busy": busy_s[name] / length_s} for name in sorted(busy_s)}


def _tokens(run: Run, worker: DecodeWorker, stay: Stay) -> int:
    """Tokens of a stay that were made within the window: one for each step of it."""
    if stay.joined_step is None:
        return 0
    begin, end = run.steps[worker]
    left = worker.steps if stay.left_step is None else stay.left_step
    return max(0, min(left, end) - max(stay.joined_step, begin))
