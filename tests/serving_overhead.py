"""What qsun's router costs, beside vllm-router and beside no router, over fake workers.

    python -m tests.serving_overhead RECORD --vllm-router PROGRAM

One run on two cores: the router alone on the first; workers and clients on the second. All three
systems take turns in an order drawn anew for every load and repeat. Paced streams tell the time
that a router adds to an answer's first byte and its processor time at a load that workers could
put on it; streams without a pace how much it relays at most, with events piling up before it.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from qsun.progress import announce
from qsun.records import new_record, package_versions
from tests.builders import tiny_tokenizer
from tests.overhead_clients import Load, Sample, measure
from tests.overhead_setup import (
    DIRECT,
    OTHER_CORE,
    QSUN,
    VLLM_ROUTER,
    Setup,
    random_prompts,
    running,
)

MIB = 2**20
ROUTER_PACKAGES = ("aiohttp", "uvloop", "orjson", "pydantic")
GROWTH = Load(streams=64, tokens=16, chunks_per_s=0.0, requests=1000)
Measured = dict[str, list["Turn"]]


@dataclass(frozen=True)
class Settings:
    """What is measured. The goals are for the qsun router, at `goal_streams` paced streams."""

    paced: tuple[Load, ...] = (
        Load(streams=1, tokens=8, chunks_per_s=200.0, seconds=15.0),
        Load(streams=64, tokens=20, chunks_per_s=20.0, seconds=15.0),
        Load(streams=512, tokens=8, chunks_per_s=2.0, seconds=15.0),
    )
    unpaced: tuple[Load, ...] = (
        Load(streams=1, tokens=128, chunks_per_s=0.0, seconds=5.0),
        Load(streams=64, tokens=128, chunks_per_s=0.0, seconds=5.0),
        Load(streams=512, tokens=128, chunks_per_s=0.0, seconds=5.0),
    )
    growth: Load = GROWTH
    growth_steps: int = 10
    growth_from: int = 2
    repeats: int = 3
    seed: int = 0
    warm_up_s: float = 2.0
    prompt_tokens: int = 256
    goal_streams: int = 64
    goal_p50_ms: float = 2.0
    goal_p99_ms: float = 10.0
    goal_growth: float = 1.02


@dataclass(frozen=True)
class Turn:
    """One system's turn at one load."""

    sample: Sample
    cpu_s: float


def main() -> None:
    """Measure, record, say whether the goals were met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, metavar="RECORD")
    parser.add_argument("--vllm-router", type=Path, required=True, metavar="PROGRAM")
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    arguments = parser.parse_args()
    settings = Settings(repeats=arguments.repeats)
    os.sched_setaffinity(0, OTHER_CORE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        gc.freeze()
        gc.disable()  # a pause here would be taken for a router's
        with running(arguments.vllm_router, folder / "tokenizer", folder) as setup:
            result = measured(setup, settings)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    result["goals"] = goals(result, settings)
    result["versions"] = {
        VLLM_ROUTER: version(arguments.vllm_router),
        **package_versions(ROUTER_PACKAGES),
    }
    new_record("serving-overhead", settings, settings.seed, result).write(arguments.record)
    for goal in result["goals"]:
        print(f"{goal['name']}: {goal['found']:.3f} of {goal['most']:g}")


def measured(setup: Setup, settings: Settings) -> dict[str, Any]:
    """Everything: memory first, of routers that have just started."""
    prompts = random_prompts(
        max(load.streams for load in (*settings.paced, *settings.unpaced, settings.growth)),
        settings.prompt_tokens,
        settings.seed,
    )
    take = taker(setup, settings, prompts)
    memory = {system: growth(setup, settings, system, take) for system in setup.routers}
    turns: list[Measured] = [{} for _ in (*settings.paced, *settings.unpaced)]
    rng = random.Random(settings.seed)
    for repeat in range(settings.repeats):
        for load, found in zip((*settings.paced, *settings.unpaced), turns, strict=True):
            for system in rng.sample((DIRECT, QSUN, VLLM_ROUTER), 3):
                announce(f"repeat {repeat}, {load.streams} streams, {system}")
                found.setdefault(system, []).append(take(system, load))
    loads = len(settings.paced)
    return {
        "paced": [
            paced(load, found) for load, found in zip(settings.paced, turns[:loads], strict=True)
        ],
        "unpaced": [
            unpaced(load, found)
            for load, found in zip(settings.unpaced, turns[loads:], strict=True)
        ],
        "memory": memory,
    }


def taker(
    setup: Setup, settings: Settings, prompts: list[list[int]]
) -> Callable[[str, Load], Turn]:
    """Gives each system its turn, while other routers are halted."""

    def take(system: str, load: Load) -> Turn:
        setup.pace(load.chunks_per_s)
        clients = setup.clients(system, prompts[: load.streams])
        with setup.alone(system):
            before = setup.cpu_s(system)
            sample = uvloop.run(measure(clients, load, settings.warm_up_s, settings.seed))
            return Turn(sample, setup.cpu_s(system) - before)

    return take


def growth(
    setup: Setup, settings: Settings, system: str, take: Callable[[str, Load], Turn]
) -> dict[str, Any]:
    """A router's memory after every so many requests, and its growth past the first of them."""
    resident = []
    for _ in range(settings.growth_steps):
        announce(f"memory, {system}, {settings.growth.requests} requests")
        take(system, settings.growth)
        resident.append(setup.resident_bytes(system) / MIB)
    return {
        "requests": settings.growth.requests * settings.growth_steps,
        "resident_mib": resident,
        "growth": resident[-1] / resident[settings.growth_from - 1],
    }


def paced(load: Load, found: Measured) -> dict[str, Any]:
    """First bytes and processor time at a load that does not fill the router."""
    systems: dict[str, Any] = {}
    for system, turns in found.items():
        every = [first for turn in turns for first in turn.sample.first_byte_s]
        cpu_s = sum(turn.cpu_s for turn in turns)
        systems[system] = {
            "answers": len(every),
            "p50_ms": percentile_ms(every, 0.50),
            "p99_ms": percentile_ms(every, 0.99),
            "p50_ms_by_repeat": [percentile_ms(turn.sample.first_byte_s, 0.50) for turn in turns],
            "p99_ms_by_repeat": [percentile_ms(turn.sample.first_byte_s, 0.99) for turn in turns],
            "cpu_us_a_chunk": 1e6 * cpu_s / sum(turn.sample.chunks for turn in turns),
            "cpu_share": cpu_s / sum(turn.sample.wall_s for turn in turns),
        }
    for system, one in systems.items():
        if system != DIRECT:
            one["added_p50_ms"] = one["p50_ms"] - systems[DIRECT]["p50_ms"]
            one["added_p99_ms"] = one["p99_ms"] - systems[DIRECT]["p99_ms"]
    ratio = systems[QSUN]["cpu_us_a_chunk"] / systems[VLLM_ROUTER]["cpu_us_a_chunk"]
    return {"load": asdict(load), "systems": systems, "cpu_of_vllm_router": ratio}


def unpaced(load: Load, found: Measured) -> dict[str, Any]:
    """Chunks relayed for each second of processor time; without a router, for each on the clock."""
    systems: dict[str, Any] = {}
    for system, turns in found.items():
        by_clock = [turn.sample.chunks / turn.sample.wall_s for turn in turns]
        systems[system] = {"chunks_per_s": median(by_clock), "chunks_per_s_by_repeat": by_clock}
        if system != DIRECT:
            by_cpu = [turn.sample.chunks / turn.cpu_s for turn in turns]
            systems[system]["chunks_per_core_s"] = median(by_cpu)
            systems[system]["chunks_per_core_s_by_repeat"] = by_cpu
    ratio = systems[QSUN]["chunks_per_core_s"] / systems[VLLM_ROUTER]["chunks_per_core_s"]
    return {"load": asdict(load), "systems": systems, "of_vllm_router": ratio}


def goals(result: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Each goal, what was found, and whether it was met."""
    (at,) = (one for one in result["paced"] if one["load"]["streams"] == settings.goal_streams)
    found = at["systems"][QSUN]
    pairs = [
        ("added to the first byte, p50, ms", found["added_p50_ms"], settings.goal_p50_ms),
        ("added to the first byte, p99, ms", found["added_p99_ms"], settings.goal_p99_ms),
        ("memory's growth", result["memory"][QSUN]["growth"], settings.goal_growth),
    ]
    return [
        {"name": name, "found": value, "most": most, "met": value < most}
        for name, value, most in pairs
    ]


def percentile_ms(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are not above."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))]


def version(program: Path) -> str:
    """Of vllm-router, as its own environment says."""
    code = "from importlib.metadata import version; print(version('vllm-router'))"
    python = program.absolute().with_name("python")
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
