"""The three systems as layouts: who may decode what, in which format, and who reads prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qsun.policy import Policy
from qsun.simulate.cluster import Layout
from qsun.simulate.config import SYSTEMS, LayoutConfig, SimulateConfig, quantized_format
from qsun.simulate.curve_records import Curves
from qsun.simulate.curves import Line
from qsun.simulate.decode_worker import Room
from qsun.workload import Request


def format_of(system: str, layout: LayoutConfig, curves: Curves) -> str:
    """The format that a system decodes in."""
    if system != "qsun":
        return layout.full_precision
    found = quantized_format(layout, curves)
    assert found is not None, "checked before"
    return found


def room_of(layout: LayoutConfig, largest_batch: int) -> Room:
    """A decode worker's room: no more requests than the largest batch that was measured."""
    blocks = None if layout.kv_tokens is None else layout.kv_tokens // layout.block_tokens
    return Room(min(layout.streams, largest_batch), blocks, layout.block_tokens)


def layout_of(
    config: SimulateConfig, curves: Curves, system: str, requests: Sequence[Request]
) -> Layout:
    """A system's layout for these requests, with the pool's size and policy as configured."""
    settings = config.layout
    steps = curves.steps[format_of(system, settings, curves)]
    policy = SYSTEMS[system] if settings.policy is None else Policy(settings.policy)
    groups = prefill_groups(config.tasks, settings.shared_prefill)
    seconds = config.duration_s + config.settle_s
    return Layout(
        policy=policy,
        tasks=config.tasks,
        decode_workers=settings.decode_workers,
        room=room_of(settings, steps.largest_batch),
        prefill={
            group: settings.prefill_workers
            or _prefill_workers(group, requests, curves.prefill_s, settings.prefill_busy, seconds)
            for group in groups
        },
    )


def of_one_task(layout: Layout, task: str, decode_workers: int) -> Layout:
    """One task's part of an isolated layout, with decode workers of its own."""
    prefill = {group: number for group, number in layout.prefill.items() if task in group}
    return replace(layout, tasks=(task,), decode_workers=decode_workers, prefill=prefill)


def prefill_groups(tasks: Sequence[str], shared: Sequence[str]) -> list[tuple[str, ...]]:
    """Tasks that read on the same prefill workers; `all` shares everything."""
    together = tuple(tasks) if "all" in shared else tuple(one for one in tasks if one in shared)
    alone: list[tuple[str, ...]] = [(task,) for task in tasks if task not in together]
    return [together, *alone] if together else alone


def _prefill_workers(
    group: Sequence[str], requests: Sequence[Request], line: Line, busy: float, seconds: float
) -> int:
    """As many as are busy for a share of the time; one where requests are not known before."""
    work_s = sum(line(one.prompt_tokens) for one in requests if one.task in group)
    return max(1, math.ceil(work_s / seconds / busy))
