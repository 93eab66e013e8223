"""Small clusters and curves to simulate, in numbers that can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun.policy import Policy
from qsun.records import Record
from qsun.simulate.cluster import Change, Layout, Load, simulate
from qsun.simulate.config import SizingConfig, SloConfig
from qsun.simulate.curves import Line, StepTimes, Timing
from qsun.simulate.decode_worker import Room
from qsun.simulate.measures import measures_of
from qsun.simulate.pool_sizing import Reactive
from qsun.simulate.window import Window
from qsun.workload import Request, Workload, open_loop

TASKS = ("chat", "code", "math", "tools")
NO_TIME = 1e-9


def timing(
    base_s: float = 0.01, each_s: float = 0.0, prefill_s: float = NO_TIME, hand_off_s: float = 0.0
) -> Timing:
    """Steps of `base_s + each_s * batch`, whatever the context; prompts of one duration."""
    step_s = StepTimes({n: Line((1.0,), (base_s + each_s * n,)) for n in (1, 64)})
    return Timing(step_s, Line((1.0,), (prefill_s,)), hand_off_s)


def layout(
    decode_workers: int = 1,
    streams: int = 8,
    policy: Policy = Policy.SHARED,
    tasks: Sequence[str] = TASKS,
    prefill: int = 1,
    kv: tuple[int, int] | None = None,
) -> Layout:
    """`kv` are blocks, and tokens in each."""
    room = Room(streams) if kv is None else Room(streams, *kv)
    return Layout(policy, tuple(tasks), decode_workers, room, {(task,): prefill for task in tasks})


def request(at_s: float = 0.0, output: int = 10, prompt: int = 20, task: str = "math") -> Request:
    return Request(at_s, task, prompt, output)


TIMES = timing(0.01, 0.001, 0.02, 0.01)
BUSY = Workload(
    rate_per_s=40.0, prompt_tokens="uniform:2:60", output_tokens="uniform:1:40", alpha=1.0
)


def figures(seed: int) -> dict[str, Any]:
    """A cluster with everything in it: a loss, growth, a pool sizing, draws by the policy."""
    requests = open_loop(BUSY, TASKS, 10, seed)
    changes = [Change(3.0, "loss", 1, 2.0), Change(4.0, "growth", 1, 1.0)]
    sizing = Reactive(SizingConfig(look_s=1.0, start_s=1.0))
    run = simulate(
        layout(3, 4, Policy.POWER_OF_TWO), TIMES, Load(requests), Window(1, 9, 5), changes, sizing
    )
    return measures_of([run], TASKS, SloConfig())


def latency_result() -> dict[str, Any]:
    """Curves of two formats: with 8 bits fewer, a step takes 0.6 times as long."""
    return {
        "bundle": None,
        "decode": "two formats, invented",
        "served": {"vllm": "0.0"},
        "tpot": [
            {"format": name, "batch": batch, "context_tokens": context, "tpot_s": times * seconds}
            for name, times in (("bfloat16", 1.0), ("W4A16", 0.6))
            for batch, context, seconds in (
                (1, 128, 0.010),
                (1, 512, 0.011),
                (8, 128, 0.014),
                (8, 512, 0.018),
                (16, 128, 0.020),
                (16, 512, 0.030),
            )
        ],
        "prefill": [
            {"prompt_tokens": 64, "seconds": 0.02},
            {"prompt_tokens": 512, "seconds": 0.06},
        ],
        "hand_off_s": 0.003,
    }


def write_curves(
    path: Path, result: Mapping[str, Any] | None = None, kind: str = "latency"
) -> Path:
    """A latency record."""
    content = latency_result() if result is None else dict(result)
    record = Record(kind=kind, config={}, seed=0, result=content)
    path.write_text(json.dumps(vars(record)))
    return path
