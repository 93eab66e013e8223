"""What a simulation is asked: which cluster, which requests, and which question about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from qsun.errors import ConfigError, bullet_list, nearest
from qsun.launch_arguments import DECODE_STREAMS
from qsun.policy import Policy
from qsun.simulate.curve_records import Curves
from qsun.workload import Workload, problems_of

FULL_PRECISION = "bfloat16"
SYSTEMS = {
    "isolated": Policy.ISOLATED,
    "sun": Policy.SHARED,
    "qsun": Policy.SHARED,
}
SIZINGS = ("fixed", "reactive", "predictive")
SCENARIOS = ("spike", "loss", "growth", "shrink")
POLICIES = tuple(policy.value for policy in Policy)
NO_LOAD = Workload()
SIZED = ("spike", "loss")  # scenarios that a pool sizing may answer; the others set the size


@dataclass(frozen=True)
class LayoutConfig:
    """The cluster: workers, and what a decode worker takes at once.

    `system`: `isolated` (decode workers for each task, full precision), `sun` (one shared pool) or
    `qsun` (the same, in the format `quantized`, by default the only one in the curves that is not
    `full_precision`). `policy` takes the place of the system's own in a `run`. Each task has
    `prefill_workers`, by default as many as are busy for `prefill_busy` of the time at most;
    those in `shared_prefill` (LoRA modules on one base, or `all`) read on the same ones. A decode
    worker has at most `streams` requests at once (vLLM's `--max-num-seqs`), no more than the
    largest batch that was measured, and `kv_tokens` in blocks of `block_tokens`, or no such limit.
    """

    system: str = field(default="qsun", metadata={"choices": tuple(SYSTEMS)})
    policy: str | None = field(default=None, metadata={"choices": POLICIES})
    full_precision: str = FULL_PRECISION
    quantized: str | None = None
    decode_workers: int = field(default=2, metadata={"minimum": 1, "maximum": 4096})
    prefill_workers: int | None = field(default=None, metadata={"minimum": 1, "maximum": 4096})
    prefill_busy: float = field(default=0.5, metadata={"minimum": 0.01, "maximum": 0.99})
    shared_prefill: tuple[str, ...] = ()
    streams: int = field(default=DECODE_STREAMS, metadata={"minimum": 1})
    kv_tokens: int | None = field(default=None, metadata={"minimum": 1})
    block_tokens: int = field(default=16, metadata={"minimum": 1})


@dataclass(frozen=True)
class SloConfig:
    """What counts as good, seconds: 99 % of a run's requests, or a single one's, within these."""

    ttft_p99_s: float = field(default=1.0, metadata={"minimum": 0.0})
    tpot_p99_s: float = field(default=0.05, metadata={"minimum": 0.0})


@dataclass(frozen=True)
class FleetConfig:
    """The smallest pool that holds the SLO, for `systems` at each of `rates` and `alphas`.

    Rates and alphas are by default the workload's. The same requests are drawn for every system
    and size, with `repeats` seeds; no more than `most` decode workers are tried.
    """

    systems: tuple[str, ...] = field(default=tuple(SYSTEMS), metadata={"choices": tuple(SYSTEMS)})
    rates: tuple[float, ...] = field(default=(), metadata={"minimum": 1e-6})
    alphas: tuple[float, ...] = field(default=(), metadata={"minimum": 0.0, "maximum": 20.0})
    repeats: int = field(default=2, metadata={"minimum": 1})
    most: int = field(default=128, metadata={"minimum": 1, "maximum": 4096})


@dataclass(frozen=True)
class EventsConfig:
    """What happens at `at_s`, and which policies and pool sizings have to cope with it.

    `spike`: the rate of `task`, by default the first one, is `factor` times what it was for
    `lasts_s`. `loss`: `workers` decode workers die, and are back after `back_s`, or never.
    `growth` and `shrink`: as many are added, ready `sizing.start_s` later, or drained.
    """

    scenarios: tuple[str, ...] = field(default=SCENARIOS, metadata={"choices": SCENARIOS})
    policies: tuple[str, ...] = field(default=POLICIES, metadata={"choices": POLICIES})
    sizings: tuple[str, ...] = field(default=SIZINGS, metadata={"choices": SIZINGS})
    at_s: float = field(default=60.0, metadata={"minimum": 0.0})
    lasts_s: float = field(default=60.0, metadata={"minimum": 0.1})
    factor: float = field(default=4.0, metadata={"minimum": 1.0, "maximum": 1000.0})
    task: str | None = None
    workers: int = field(default=1, metadata={"minimum": 1})
    back_s: float | None = field(default=None, metadata={"minimum": 0.0})


@dataclass(frozen=True)
class SizingConfig:
    """How a decode pool changes its size, between `least` and `most`; it looks every `look_s`.

    A new worker is ready after `start_s`. `reactive`: one more above a load share of `high`, one
    less below `low`. `predictive`: by the requests of the last `window_s`, and how many a worker
    takes by the curves within the SLO's TPOT, filled up to `high`.
    """

    look_s: float = field(default=5.0, metadata={"minimum": 0.1})
    start_s: float = field(default=30.0, metadata={"minimum": 0.0})
    high: float = field(default=0.8, metadata={"minimum": 0.01, "maximum": 1.0})
    low: float = field(default=0.3, metadata={"minimum": 0.0, "maximum": 1.0})
    window_s: float = field(default=30.0, metadata={"minimum": 0.1})
    least: int = field(default=1, metadata={"minimum": 1})
    most: int = field(default=64, metadata={"minimum": 1, "maximum": 4096})


@dataclass(frozen=True)
class SimulateConfig:
    """A question to a simulated cluster.

    `ask`: `run` (one workload on one layout), `fleet` or `events`. Figures are of requests that
    come, and of tokens that are made, between `warm_up_s` and `duration_s`; requests go on coming
    until those have ended, `settle_s` longer at most. `trace` takes the place of drawn requests.
    """

    ask: str = field(default="run", metadata={"choices": ("run", "fleet", "events")})
    tasks: tuple[str, ...] = ("task-1", "task-2", "task-3", "task-4")
    workload: Workload = NO_LOAD
    trace: str | None = None
    layout: LayoutConfig = LayoutConfig()
    slo: SloConfig = SloConfig()
    fleet: FleetConfig = FleetConfig()
    events: EventsConfig = EventsConfig()
    sizing: SizingConfig = SizingConfig()
    duration_s: float = field(default=180.0, metadata={"minimum": 0.1})
    warm_up_s: float = field(default=30.0, metadata={"minimum": 0.0})
    settle_s: float = field(default=60.0, metadata={"minimum": 0.0})
    seed: int = field(default=0, metadata={"minimum": 0})


def quantized_format(layout: LayoutConfig, curves: Curves) -> str | None:
    """The format of system `qsun`; none where the curves leave it open."""
    if layout.quantized is not None:
        return layout.quantized
    others = [name for name in curves.steps if name != layout.full_precision]
    return others[0] if len(others) == 1 else None


def check(config: SimulateConfig, curves: Curves) -> None:
    """Refuse what cannot be simulated.

    Raises:
        ConfigError: anything wrong; all is named.
    """
    problems = [
        *(() if config.trace else problems_of(config.workload)),
        *_task_problems(config),
        *_format_problems(config, curves),
        *_time_problems(config),
        *_question_problems(config),
    ]
    if problems:
        raise ConfigError(f"this cannot be simulated:\n{bullet_list(problems, 40)}")


def systems_of(config: SimulateConfig) -> tuple[str, ...]:
    """The systems that a question is about."""
    return config.fleet.systems if config.ask == "fleet" else (config.layout.system,)


def _task_problems(config: SimulateConfig) -> list[str]:
    tasks = config.tasks
    problems = [] if tasks else ["tasks: at least one"]
    problems += [
        f"tasks: {one}, more than once" for one in sorted(set(tasks)) if tasks.count(one) > 1
    ]
    named = [("layout.shared_prefill", one) for one in config.layout.shared_prefill if one != "all"]
    if config.events.task is not None:
        named.append(("events.task", config.events.task))
    return problems + [
        f"{where}: no task {one} ({nearest(one, tasks)})"
        for where, one in named
        if one not in tasks
    ]


def _format_problems(config: SimulateConfig, curves: Curves) -> list[str]:
    layout, problems = config.layout, []
    if "qsun" in systems_of(config):
        quantized = quantized_format(layout, curves)
        if quantized is None:
            known = ", ".join(curves.steps)
            problems.append(
                f"layout.quantized: say which format system qsun has; curves of {known}"
            )
        else:
            problems += [f"layout.quantized: {one}" for one in curves.format_problems(quantized)]
    if set(systems_of(config)) - {"qsun"}:
        wrong = curves.format_problems(layout.full_precision)
        problems += [f"layout.full_precision: {one}" for one in wrong]
    return problems


def _time_problems(config: SimulateConfig) -> list[str]:
    problems = []
    if config.warm_up_s >= config.duration_s:
        problems.append(
            f"warm_up_s: {config.warm_up_s:g} is not before {config.duration_s:g}, the end"
        )
    if config.ask == "events" and config.events.at_s >= config.duration_s:
        problems.append(f"events.at_s: {config.events.at_s:g} is not before {config.duration_s:g}")
    return problems


def _question_problems(config: SimulateConfig) -> list[str]:
    problems = []
    closed = config.trace is None and config.workload.rate_per_s is None
    if config.ask != "run" and (closed or config.trace):
        kind = "a trace" if config.trace else "a closed loop"
        problems.append(f"ask: {config.ask} needs an open loop (workload.rate_per_s), not {kind}")
    for section, names in (
        ("fleet", ("systems",)),
        ("events", ("scenarios", "policies", "sizings")),
    ):
        for name in names:
            if config.ask == section and not getattr(getattr(config, section), name):
                problems.append(f"{section}.{name}: at least one")
    if config.ask != "run" and config.layout.policy is not None:
        problems.append(f"layout.policy: {config.ask} has policies of its own; leave it out")
    if (
        config.ask == "fleet"
        and config.layout.shared_prefill
        and "isolated" in config.fleet.systems
    ):
        problems.append(
            "layout.shared_prefill: isolated tasks share nothing; leave one of them out"
        )
    sizing = config.sizing
    if sizing.least > sizing.most:
        problems.append(f"sizing.least: {sizing.least} is above sizing.most, {sizing.most}")
    if sizing.low >= sizing.high:
        problems.append(f"sizing.low: {sizing.low:g} is not below sizing.high, {sizing.high:g}")
    drained, workers = config.events.workers, config.layout.decode_workers
    if config.ask == "events" and "shrink" in config.events.scenarios and drained >= workers:
        problems.append(f"events.workers: {drained} drained of {workers} leave no decode worker")
    return problems
