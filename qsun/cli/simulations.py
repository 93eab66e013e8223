"""Simulations: what `qsun simulate` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qsun.cli.output import table


def simulation_text(result: Mapping[str, Any]) -> str:
    """The answer as a table, and what was taken beyond the measured."""
    texts: dict[str, Callable[[Any], list[str]]] = {
        "run": _run,
        "fleet": _fleet,
        "events": _events,
    }
    lines = texts[result["ask"]](result[result["ask"]])
    return "\n".join([*lines, *(f"WARNING: {note}" for note in result["curves"]["notes"])])


def _run(run: Mapping[str, Any]) -> list[str]:
    rows = [[name, *_latencies(one)] for name, one in run["by_task"].items()]
    rows.append(["all", *_latencies(run)])
    workers = [
        [name, _number(one["tokens_per_s"], 1), _number(one["mean_batch"], 1), ""]
        for name, one in run["by_worker"].items()
    ]
    workers += [
        [name, "", "", f"{one['busy']:.0%}"] for name, one in run["by_prefill_worker"].items()
    ]
    return [
        f"{run['system']}, {run['policy']}, {run['format']}",
        table(["task", "sent", "failed", "open", *_LATENCY_HEADER], rows),
        "",
        table(["worker", "tokens/s", "mean batch", "busy"], workers),
        "",
        f"{run['tokens_per_s']:.1f} tokens/s, {run['tokens_per_s_per_decode_worker']:.1f} for each "
        f"decode worker; goodput {run['goodput_per_s']:.2f} requests/s of "
        f"{run['request_rate_per_s']:.2f}; fairness {_number(run['fairness'], 3)}; "
        f"SLO {'held' if run['slo_held'] else 'MISSED'}",
        *_beyond([run]),
    ]


_LATENCY_HEADER = ("TTFT p50", "p99, s", "TPOT p50", "p99, ms", "tokens/s each")


def _latencies(one: Mapping[str, Any]) -> list[str]:
    ttft, tpot = one["ttft_s"] or {}, one["tpot_s"] or {}
    each = one["interactivity_tokens_per_s"] or {}
    return [
        *(str(one[name]) for name in ("sent", "failed", "unfinished")),
        _number(ttft.get("p50"), 3),
        _number(ttft.get("p99"), 3),
        _number(tpot.get("p50"), 2, 1000),
        _number(tpot.get("p99"), 2, 1000),
        _number(each.get("mean"), 1),
    ]


def _fleet(fleet: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            one["system"],
            str(one["tasks"]),
            f"{one['rate_per_s']:g}",
            f"{one['alpha']:g}",
            "none holds" if one["decode_workers"] is None else str(one["decode_workers"]),
            str(one["prefill_workers"]),
            _number(one["tpot_p50_s"], 2, 1000),
            _number(one["tpot_p99_s"], 2, 1000),
            _number(one["ttft_p99_s"], 3),
        ]
        for one in fleet
    ]
    header = ["system", "tasks", "rate/s", "alpha", "decode", "prefill"]
    header += ["TPOT p50", "p99, ms", "TTFT p99, s"]
    return [table(header, rows), *_beyond(fleet)]


def _events(events: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            f"{one['scenario']}, {one['policy']}, {one['sizing']}",
            _number(one["decode_workers"], 1),
            str(max((size["decode_workers"] for size in one["pool"]), default=0)),
            *_latencies(one)[1:-1],
            _number(one["goodput_per_s"], 2),
        ]
        for one in events
    ]
    header = ["scenario", "mean workers", "most", "failed", "open", *_LATENCY_HEADER[:-1]]
    return [table([*header, "goodput/s"], rows), *_beyond(events)]


def _beyond(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each kind of length that was not measured."""
    said = {
        "prompts_longer": "prompts are longer than any measured; their time is extrapolated",
        "prompts_shorter": "prompts are shorter than any measured; they take the shortest's time",
        "contexts_longer": "requests grow longer than any context measured; TPOT is extrapolated",
    }
    lines = []
    for name, words in said.items():
        worst = max((part["beyond_measured"] for part in parts), key=lambda one: one[name])
        if worst[name]:
            lines.append(f"WARNING: {worst[name]} of {worst['requests']} {words}")
    return lines


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"
