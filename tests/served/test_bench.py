"""The three systems under the same load, on real vLLM workers.

SUN and isolated share their workers: two routers over the same ones, each with its policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qsun.bundle import Bundle
from qsun.records import read_record
from tests.command import run_qsun
from tests.served.conftest import TASKS, exported
from tests.serving import Serving, serving

USERS, ALPHA, SECONDS, OUTPUT = 4, 3.0, 7, 16
LOAD = (
    *("--concurrency", f"{USERS}", "--alpha", f"{ALPHA}", "--tasks", ",".join(TASKS)),
    *("--set", f"seconds={SECONDS}", "--set", "repeats=1", "--set", "prompt_tokens=fixed:48"),
    *("--set", f"output_tokens=fixed:{OUTPUT}", "--set", "warmup=1", "--set", "ttft_s=100"),
    *("--set", "tpot_s=10"),
)


@pytest.fixture(scope="module")
def full_precision(smollm2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of SUN: the base model decodes."""
    return exported(smollm2_base, smollm2_base, tmp_path_factory.mktemp("full-precision"))


@pytest.fixture(scope="module")
def sun(full_precision: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("sun"), full_precision.folder, "--decode", "2") as running:
        yield running


@pytest.fixture(scope="module")
def isolated(
    sun: Serving, full_precision: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Another router over SUN's workers, each decode worker one task's own."""
    folder = tmp_path_factory.mktemp("isolated")
    with router_over(sun, full_precision, folder, policy="isolated") as running:
        yield running


@contextmanager
def router_over(
    sun: Serving, bundle: Bundle, folder: Path, policy: str, without: str = ""
) -> Iterator[Serving]:
    """A router of its own over SUN's workers, one of them left out if named."""
    workers = folder / "workers.json"
    entries = [
        {name: one[name] for name in ("name", "role", "tasks", "url")}
        for one in sun.workers().values()
        if one["name"] != without
    ]
    router = {"host": "127.0.0.1", "port": 1}
    workers.write_text(json.dumps({"schema": 1, "router": router, "workers": entries}))
    options = ("--external", str(workers), "--set", f"policy={policy}")
    with serving(folder, bundle.folder, *options) as running:
        yield running


def bench(here: Serving, out: Path) -> dict[str, Any]:
    """The result of the one load, all of whose requests were answered."""
    here.until(dict.fromkeys(here.workers(), "ready"))
    outcome = run_qsun("bench", here.url, *LOAD, "--out", out)
    assert outcome.exit_code == 0, outcome.stderr
    result = read_record(out / "bench.json", "bench").result
    (run,) = result["points"][0]["runs"]
    assert run["failed"] == 0
    assert run["answered"] == run["sent"]
    assert run["goodput_per_s"] == pytest.approx(run["request_rate_per_s"])
    assert run["answered"] >= USERS
    assert 0 < run["tpot_s"]["p50"] < run["request_s"]["p50"] / OUTPUT
    return result


def largest_share(result: dict[str, Any], of: str) -> float:
    """The part of all tokens that the busiest decode worker, or task, had."""
    (run,) = result["points"][0]["runs"]
    tokens = [one["tokens_per_s"] for one in run[of].values()]
    return float(max(tokens) / sum(tokens))


def test_the_three_systems_take_the_same_load(
    served: Serving, sun: Serving, isolated: Serving, tmp_path: Path
) -> None:
    found = {
        name: bench(one, tmp_path / name)
        for name, one in (("isolated", isolated), ("sun", sun), ("qsun", served))
    }
    assert {name: one["system"] for name, one in found.items()} == {one: one for one in found}
    assert {one["workers"]["decode"] for one in found.values()} == {2}
    assert found["sun"]["decode"] == found["isolated"]["decode"] == "bfloat16"
    assert found["qsun"]["decode"].startswith("W4A16")
    for one in found.values():
        assert largest_share(one, "by_task") > 0.65
    # Isolated, a worker is as busy as its task; shared, the tasks' skew is no skew of the workers.
    assert largest_share(found["isolated"], "by_worker") > 0.65
    for name in ("sun", "qsun"):
        assert largest_share(found[name], "by_worker") < 0.65
    for one in found.values():
        for worker in one["points"][0]["runs"][0]["by_worker"].values():
            assert worker["mean_batch"] > 0.999 or not worker["tokens_per_s"]


def test_the_simulator_comes_near_what_its_curves_were_measured_on(
    sun: Serving, full_precision: Bundle, tmp_path: Path
) -> None:
    curves, out = tmp_path / "latency.json", tmp_path / "load"
    lengths = {"prompt_tokens": "fixed:32", "output_tokens": "fixed:32"}
    with router_over(sun, full_precision, tmp_path, "shared", without="decode-1") as one:
        one.until(dict.fromkeys(one.workers(), "ready"))
        measured = run_qsun(
            *("bench", one.url, "--curves", "--out", str(curves), "--set", "batches=[1]"),
            *("--set", "contexts=[48]", "--set", "prompts=[16,256]", "--set", "steps=16"),
            *("--set", "rounds=1"),
        )
        assert measured.exit_code == 0, measured.stderr
        sets = [word for name, form in lengths.items() for word in ("--set", f"{name}={form}")]
        loaded = run_qsun(
            *("bench", one.url, "--concurrency", "1", "--out", str(out), *sets),
            *("--set", f"seconds={SECONDS}", "--set", "repeats=1", "--set", "warmup=1"),
        )
        assert loaded.exit_code == 0, loaded.stderr
    asked = run_qsun(
        *("simulate", str(curves), "--system", "sun", "--tasks", ",".join(TASKS), "--users", "1"),
        *("--prompt", lengths["prompt_tokens"], "--output", lengths["output_tokens"]),
        *("--decode", "1", "--set", "layout.prefill_workers=1", "--json"),
        *("--set", "layout.shared_prefill=[all]", "--set", f"duration_s={SECONDS}"),
        *("--set", "warm_up_s=1"),
    )
    assert asked.exit_code == 0, asked.stderr
    simulated = json.loads(asked.stdout)["run"]
    (run,) = read_record(out / "bench.json", "bench").result["points"][0]["runs"]
    assert run["failed"] == 0
    for name, part in (("tpot_s", "mean"), ("ttft_s", "mean"), ("request_s", "mean")):
        assert simulated[name][part] == pytest.approx(run[name][part], rel=0.35), name
    assert simulated["tokens_per_s"] == pytest.approx(run["tokens_per_s"], rel=0.35)
