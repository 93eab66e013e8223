"""Plain runs, and what happens to a cluster: how policies and pool sizings cope with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qsun.latency_summary import percentiles
from qsun.policy import Policy
from qsun.simulate.cluster import Change, Run, simulate
from qsun.simulate.config import SIZED, SimulateConfig
from qsun.simulate.curve_records import Curves
from qsun.simulate.measures import measures_of, within
from qsun.simulate.pool_sizing import sizing_of
from qsun.simulate.requests import beyond_measured, load_of, requests_of, with_spike
from qsun.simulate.systems import format_of, layout_of
from qsun.simulate.window import Window
from qsun.workload import Request

BUCKETS = 36  # of a timeline


@dataclass(frozen=True)
class Episode:
    """One scenario under one policy and one pool sizing."""

    scenario: str
    policy: str
    sizing: str


def episodes(config: SimulateConfig) -> list[Episode]:
    """Every scenario under every policy and pool sizing that it goes with.

    Isolated pools are of fixed size, and so are those that a scenario itself grows or shrinks.
    """
    events = config.events
    return [
        Episode(scenario, policy, sizing)
        for scenario in events.scenarios
        for policy in events.policies
        for sizing in events.sizings
        if sizing == "fixed" or (scenario in SIZED and policy != Policy.ISOLATED.value)
    ]


def plain_run(
    config: SimulateConfig, curves: Curves, requests: Sequence[Request]
) -> dict[str, Any]:
    """The configured system's figures for these requests, or for as many users as configured."""
    system = config.layout.system
    decode_format = format_of(system, config.layout, curves)
    layout = layout_of(config, curves, system, requests)
    load = load_of(config, requests, config.seed)
    window = Window(config.warm_up_s, config.duration_s, config.settle_s)
    run = simulate(layout, curves.timing(decode_format), load, window)
    asked = requests or [one.request for one in run.journeys]
    return {
        "system": system,
        "policy": layout.policy.value,
        "format": decode_format,
        **measures_of([run], config.tasks, config.slo),
        "beyond_measured": beyond_measured(asked, curves, decode_format),
    }


def play(episode: Episode, config: SimulateConfig, curves: Curves) -> dict[str, Any]:
    """One episode's figures, the pool's sizes, and latencies by time of arrival.

    All policies have the format of the configured system, and prefill workers that a spike keeps
    no busier than calm does, so that nothing but the decode pool differs.
    """
    drawn = requests_of(config, config.seed)
    asked = requests_in(episode.scenario, config, drawn)
    decode_format = format_of(config.layout.system, config.layout, curves)
    always = replace(config.events, at_s=0.0, lasts_s=config.duration_s + config.settle_s)
    busiest = requests_in(episode.scenario, replace(config, events=always), drawn)
    layout = layout_of(config, curves, config.layout.system, busiest)
    timing = curves.timing(decode_format)
    run = simulate(
        replace(layout, policy=Policy(episode.policy)),
        timing,
        load_of(config, asked, config.seed),
        Window(config.warm_up_s, config.duration_s, config.settle_s),
        changes_of(episode.scenario, config),
        sizing_of(episode.sizing, config.sizing, config.slo, timing),
    )
    return {
        "scenario": episode.scenario,
        "policy": episode.policy,
        "sizing": episode.sizing,
        "format": decode_format,
        **measures_of([run], config.tasks, config.slo),
        "pool": [{"at_s": at_s, "decode_workers": number} for at_s, number in run.sizes],
        "timeline": timeline(run),
        "beyond_measured": beyond_measured(asked, curves, decode_format),
    }


def requests_in(scenario: str, config: SimulateConfig, drawn: Sequence[Request]) -> list[Request]:
    """Who asks in a scenario: the same requests in each, and more in a spike."""
    if scenario != "spike":
        return list(drawn)
    return with_spike(drawn, config.workload, config.tasks, config.events, config.seed + 1)


def changes_of(scenario: str, config: SimulateConfig) -> list[Change]:
    """What happens to the pool in a scenario."""
    events = config.events
    start_s = {"loss": events.back_s, "growth": config.sizing.start_s}.get(scenario)
    if scenario == "spike":
        return []
    return [Change(events.at_s, scenario, events.workers, start_s)]


def timeline(run: Run) -> list[dict[str, Any]]:
    """Requests by the time at which they came, in even parts of the window."""
    part_s = run.window.length_s / BUCKETS
    found = []
    came = within(run)
    for place in range(BUCKETS):
        begin_s = run.window.begin_s + place * part_s
        mine = [one for one in came if begin_s <= one.began_s < begin_s + part_s]
        ttft = percentiles([one.ttft_s for one in mine if one.ttft_s is not None])
        tpot = percentiles([one.tpot_s for one in mine if one.tpot_s is not None])
        found.append(
            {
                "at_s": begin_s,
                "sent": len(mine),
                "answered": sum(one.answered for one in mine),
                "ttft_p99_s": ttft and ttft["p99"],
                "tpot_p99_s": tpot and tpot["p99"],
            }
        )
    return found
