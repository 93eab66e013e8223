"""How many decode workers a system needs for a workload, so that it holds its SLO.

Pools are searched by doubling and halving: the answer holds, and one worker less was tried and does
not. Isolated tasks have nothing in common, so each is searched alone, with as many decode workers
as it needs; then workers go as long as all requests together hold without them. The router deals
workers to isolated tasks evenly; this is in the isolated system's favour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

from qsun.policy import Policy
from qsun.simulate.cluster import Layout, Load, Run, simulate
from qsun.simulate.config import SimulateConfig
from qsun.simulate.curve_records import Curves
from qsun.simulate.curves import Timing
from qsun.simulate.journey import Journey
from qsun.simulate.measures import allowed_misses, latencies, misses, within
from qsun.simulate.requests import beyond_measured, requests_of
from qsun.simulate.systems import format_of, layout_of, of_one_task
from qsun.simulate.window import Window
from qsun.workload import Request


@dataclass(frozen=True)
class Case:
    """A system at a rate and a skew; the first task's share grows with `alpha` (Zipf's law)."""

    system: str
    rate_per_s: float
    alpha: float


def cases(config: SimulateConfig) -> list[Case]:
    """Every system at every rate and alpha."""
    fleet, workload = config.fleet, config.workload
    assert workload.rate_per_s is not None, "checked before"
    rates, alphas = fleet.rates or (workload.rate_per_s,), fleet.alphas or (workload.alpha,)
    return [
        Case(system, rate, alpha) for rate, alpha, system in product(rates, alphas, fleet.systems)
    ]


def size_fleet(case: Case, config: SimulateConfig, curves: Curves) -> dict[str, Any]:
    """The smallest pool of a case, with its latencies; `decode_workers` none where `most` miss."""
    workload = replace(config.workload, rate_per_s=case.rate_per_s, alpha=case.alpha)
    config = replace(config, workload=workload)
    draws = [requests_of(config, config.seed + one) for one in range(config.fleet.repeats)]
    most_asked = max(draws, key=len)
    decode_format = format_of(case.system, config.layout, curves)
    layout = layout_of(config, curves, case.system, most_asked)
    trials = _Trials(layout, curves.timing(decode_format), config, draws)
    sizes = _isolated(trials) if layout.policy is Policy.ISOLATED else _shared(trials)
    tried = sizes or dict.fromkeys(trials.keys, config.fleet.most)
    found = latencies([one for key, size in tried.items() for one in trials.came(key, size)])
    return {
        "system": case.system,
        "format": decode_format,
        "tasks": len(config.tasks),
        "rate_per_s": case.rate_per_s,
        "alpha": case.alpha,
        "decode_workers": sum(sizes.values()) if sizes else None,
        "decode_workers_by_task": sizes if sizes and layout.policy is Policy.ISOLATED else None,
        "prefill_workers": sum(layout.prefill.values()),
        "tpot_p50_s": (found["tpot_s"] or {}).get("p50"),
        "tpot_p99_s": (found["tpot_s"] or {}).get("p99"),
        "ttft_p99_s": (found["ttft_s"] or {}).get("p99"),
        "requests": trials.requests,
        "missed": dict(zip(("ttft", "tpot"), trials.missed(tried), strict=True)),
        "simulations": trials.done,
        "beyond_measured": beyond_measured(most_asked, curves, decode_format),
    }


class _Trials:
    """Runs of pools by size. A key is a task where each has a pool of its own, else `all`."""

    def __init__(
        self, layout: Layout, timing: Timing, config: SimulateConfig, draws: list[list[Request]]
    ) -> None:
        self.most, self.done = config.fleet.most, 0
        self._layout, self._timing, self._config, self._draws = layout, timing, config, draws
        self._window = Window(config.warm_up_s, config.duration_s, config.settle_s)
        self.requests = sum(self._window.holds(one.at_s) for draw in draws for one in draw)
        self.came: Callable[[str, int], list[Journey]] = cache(self._came)

    @property
    def keys(self) -> tuple[str, ...]:
        """The pools."""
        return self._layout.tasks if self._layout.policy is Policy.ISOLATED else ("all",)

    def missed(self, sizes: dict[str, int]) -> tuple[int, int]:
        """Requests of all pools that miss TTFT, and TPOT."""
        found = [self.missed_of(key, size) for key, size in sizes.items()]
        return sum(late for late, _ in found), sum(slow for _, slow in found)

    def hold(self, sizes: dict[str, int]) -> bool:
        """Whether pools of these sizes together hold the SLO."""
        return max(self.missed(sizes)) <= allowed_misses(self.requests)

    def missed_of(self, key: str, size: int) -> tuple[int, int]:
        """One pool's requests that miss TTFT, and TPOT."""
        return misses(self.came(key, size), self._config.slo)

    def _came(self, key: str, size: int) -> list[Journey]:
        """All repeats' requests of a pool of this size."""
        return [one for run in self._runs(key, size) for one in within(run)]

    def _runs(self, key: str, size: int) -> Iterator[Run]:
        alone = self._layout.policy is Policy.ISOLATED
        layout = (
            of_one_task(self._layout, key, size)
            if alone
            else replace(self._layout, decode_workers=size)
        )
        for draw in self._draws:
            requests = [one for one in draw if one.task == key] if alone else draw
            self.done += 1
            yield simulate(layout, self._timing, Load(requests), self._window)


def _shared(trials: _Trials) -> dict[str, int] | None:
    size = smallest(lambda size: trials.hold({"all": size}), trials.most)
    return None if size is None else {"all": size}


def _isolated(trials: _Trials) -> dict[str, int] | None:
    """Each task's pool as good as `most` workers would make it, then smaller while all hold."""
    sizes = {}
    for task in trials.keys:
        size = smallest(partial(_as_good_as_most, trials, task), trials.most)
        assert size is not None, "the largest pool is as good as itself"
        sizes[task] = size
    if not trials.hold(sizes):
        return None
    while True:
        smaller = [
            sizes | {task: size - 1}
            for task, size in sizes.items()
            if size > 1 and trials.hold(sizes | {task: size - 1})
        ]
        if not smaller:
            return sizes
        sizes = min(smaller, key=lambda one: max(trials.missed(one)))


def _as_good_as_most(trials: _Trials, task: str, size: int) -> bool:
    found, best = trials.missed_of(task, size), trials.missed_of(task, trials.most)
    return found[0] <= best[0] and found[1] <= best[1]


def smallest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest size up to `most` that holds, where one less does not; none where none does."""
    too_small, enough = 0, 1
    while not holds(enough):
        if enough == most:
            return None
        too_small, enough = enough, min(2 * enough, most)
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if holds(middle):
            enough = middle
        else:
            too_small = middle
    return enough
