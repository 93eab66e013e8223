"""What a run shows: latencies, rates, fairness and the workers' batches, within its steady window.

Latencies are of requests that came within the window; tokens count where they came within it.
Failures count wherever they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from qsun.bench.client import Answer
from qsun.bench.drive import Run
from qsun.bench.settings import BenchConfig
from qsun.bench.steady import steady_from
from qsun.bench.target import Target
from qsun.latency_summary import fairness, interactivity, percentiles

SUMMARIZED = {
    "tokens_per_s": ("tokens_per_s",),
    "tokens_per_s_per_decode_worker": ("tokens_per_s_per_decode_worker",),
    "tokens_per_s_per_worker": ("tokens_per_s_per_worker",),
    "goodput_per_s": ("goodput_per_s",),
    "ttft_p50_s": ("ttft_s", "p50"),
    "ttft_p99_s": ("ttft_s", "p99"),
    "tpot_p50_s": ("tpot_s", "p50"),
    "tpot_p99_s": ("tpot_s", "p99"),
    "interactivity_p50_tokens_per_s": ("interactivity_tokens_per_s", "p50"),
    "fairness": ("fairness",),
}
CONFIDENCE, LEAST_RUNS = 0.95, 3


def measures_of(run: Run, target: Target, settings: BenchConfig) -> dict[str, Any]:
    """One run's figures; seconds, tokens, and what is per second."""
    spans = [(one.sent_s, one.ended_s) for one in run.answers]
    begin_s = steady_from(spans, run.seconds)
    window = (begin_s or 0.0, run.seconds)
    length_s = window[1] - window[0]
    asked = [one for one in run.answers if _within(one.sent_s, window)]
    answered = [one for one in asked if one.failure is None]
    failures = Counter(one.failure for one in run.answers if one.failure is not None)
    tokens_per_s = _tokens(run.answers, window) / length_s
    decode, everybody = target.count("decode"), len(target.workers)
    by_task = {
        task: _of_task([one for one in run.answers if one.request.task == task], window)
        for task in target.tasks
    }
    return {
        "steady": begin_s is not None,
        "window_s": list(window),
        "sent": len(asked),
        "answered": len(answered),
        "failed": sum(failures.values()),
        "failures": dict(failures),
        "request_rate_per_s": len(asked) / length_s,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_decode_worker": tokens_per_s / decode,
        "tokens_per_s_per_worker": tokens_per_s / everybody,
        "goodput_per_s": sum(_is_good(one, settings) for one in answered) / length_s,
        **_latencies(answered),
        "itl_s": percentiles([gap for one in answered for gap in np.diff(one.token_s)]),
        "fairness": fairness(
            [one["interactivity_tokens_per_s"]["mean"] for one in by_task.values() if one["tpot_s"]]
        ),
        "late_s": percentiles([max(0.0, one.sent_s - one.request.at_s) for one in asked])
        if any(one.request.at_s for one in asked)
        else None,
        "by_task": by_task,
        "by_worker": _by_worker(run, window, tokens_per_s),
    }


def summary_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over a point's runs, with Student's 95 % intervals from three runs on.

    Two runs' would be 13 times as wide as they are apart.
    """
    found = {}
    for name, path in SUMMARIZED.items():
        values = [value for run in runs if (value := _at(run, path)) is not None]
        if not values:
            continue
        mean = float(np.mean(values))
        interval = None
        if len(values) >= LEAST_RUNS:
            half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
            interval = [mean - float(half), mean + float(half)]
        found[name] = {"mean": mean, "interval": interval}
    return found


def _latencies(answered: Sequence[Answer]) -> dict[str, Any]:
    tpots = [one.tpot_s for one in answered if one.tpot_s is not None]
    return {
        "ttft_s": percentiles([one.ttft_s for one in answered]),
        "tpot_s": percentiles(tpots),
        "request_s": percentiles([one.ended_s - one.sent_s for one in answered]),
        "interactivity_tokens_per_s": interactivity(tpots),
    }


def _of_task(answers: Sequence[Answer], window: tuple[float, float]) -> dict[str, Any]:
    asked = [one for one in answers if _within(one.sent_s, window)]
    answered = [one for one in asked if one.failure is None]
    return {
        "sent": len(asked),
        "answered": len(answered),
        **_latencies(answered),
        "tokens_per_s": _tokens(answers, window) / (window[1] - window[0]),
    }


def _by_worker(run: Run, window: tuple[float, float], tokens_per_s: float) -> dict[str, Any]:
    """Each decode worker's part of all tokens, and its mean batch: tokens a step of its engine.

    Counters at the window's edges lie on the line between the looks before and after.
    """
    looks: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for at_s, work in run.work:
        for name, one in work.items():
            if one.role == "decode":
                looks[name].append((at_s, one.generated, one.steps))
    done = {}
    for name, seen in sorted(looks.items()):
        at_s, *counters = np.transpose(seen)
        done[name] = [np.ptp(np.interp(window, at_s, counter)) for counter in counters]
    generated = sum(tokens for tokens, _ in done.values())
    return {
        name: {
            "role": "decode",
            "tokens_per_s": tokens_per_s * tokens / generated if generated else 0.0,
            "mean_batch": tokens / steps if steps else 0.0,
        }
        for name, (tokens, steps) in done.items()
    }


def _tokens(answers: Sequence[Answer], window: tuple[float, float]) -> int:
    return sum(_within(at_s, window) for one in answers for at_s in one.token_s)


def _within(at_s: float, window: tuple[float, float]) -> bool:
    return window[0] <= at_s < window[1]


def _is_good(answer: Answer, settings: BenchConfig) -> bool:
    return answer.ttft_s <= settings.ttft_s and (answer.tpot_s or 0.0) <= settings.tpot_s


def _at(run: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = run
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)
