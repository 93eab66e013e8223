"""Load on a router over fake workers: what is asked, and what is measured of the answers."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsun.cli.loads import bench_text
from qsun.records import read_record
from tests.benching import router
from tests.command import run_qsun
from tests.routing import Routed

TOKENS_PER_S, OUTPUT, SECONDS = 50.0, 10, 1.5
SHORT = (
    *("--set", "prompt_tokens=fixed:20", "--set", f"output_tokens=fixed:{OUTPUT}"),
    *("--set", f"seconds={SECONDS:g}", "--set", "repeats=1", "--set", "warmup=1"),
)


@pytest.fixture(scope="module")
def here(tokenizer_folder: Path) -> Iterator[Routed]:
    with router(tokenizer_folder, tokens_per_s=TOKENS_PER_S) as running:
        yield running


def bench(here: Routed, out: Path, *options: str) -> dict[str, Any]:
    """The result of a bench that comes to its end."""
    outcome = run_qsun("bench", here.url, "--out", out, *SHORT, *options)
    assert outcome.exit_code == 0, outcome.stderr
    return read_record(out / "bench.json", "bench").result


def requests_of(out: Path, run: str) -> list[dict[str, Any]]:
    lines = gzip.decompress((out / "requests" / f"{run}.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def test_an_open_loop_keeps_its_schedule_and_finds_the_workers_pace(
    here: Routed, tmp_path: Path
) -> None:
    for worker in here.workers.values():
        worker.seen.clear()
    result = bench(here, tmp_path / "b", "--rate", "20", "--set", "arrivals=constant")
    (point,) = result["points"]
    (run,) = point["runs"]
    made = requests_of(tmp_path / "b", "rate-20-alpha-0-0")
    assert [one["at_s"] for one in made] == pytest.approx([(n + 1) / 20 for n in range(len(made))])
    assert len(made) in (29, 30)
    assert all(0 <= one["sent_s"] - one["at_s"] < 0.1 for one in made)
    assert all(len(one["token_s"]) == OUTPUT for one in made)
    assert run["failed"] == 0
    assert 1 / TOKENS_PER_S <= run["tpot_s"]["p50"] < 1.4 / TOKENS_PER_S
    assert run["interactivity_tokens_per_s"]["p50"] == pytest.approx(
        1 / run["tpot_s"]["p50"], rel=0.01
    )
    assert run["request_s"]["p50"] == pytest.approx(
        run["ttft_s"]["p50"] + (OUTPUT - 1) * run["tpot_s"]["p50"], rel=0.1
    )
    assert run["request_rate_per_s"] == pytest.approx(20, rel=0.1)
    assert point["summary"]["tokens_per_s"]["mean"] == run["tokens_per_s"]
    assert result["slo"] == {"ttft_s": 1.0, "tpot_s": 0.05}
    asked = [one for worker in here.workers.values() for one in worker.seen]
    decoded = [one for one in asked if one["max_tokens"] == OUTPUT]
    assert len(decoded) == len(made)
    assert len({tuple(one["prompt"]) for one in decoded}) == len(made)
    assert all(len(one["prompt"]) == 20 and one["ignore_eos"] for one in decoded)


def test_users_of_a_closed_loop_ask_again_once_answered(here: Routed, tmp_path: Path) -> None:
    result = bench(here, tmp_path / "b", "--concurrency", "6")
    (run,) = result["points"][0]["runs"]
    made = requests_of(tmp_path / "b", "users-6-alpha-0-0")
    for at_s in (0.4, 0.8, 1.2):
        assert sum(one["sent_s"] <= at_s < one["ended_s"] for one in made) == 6
    assert run["steady"]
    batches = [one["mean_batch"] for one in run["by_worker"].values()]
    assert batches == pytest.approx([3, 3], rel=0.2)
    shares = [one["tokens_per_s"] for one in run["by_worker"].values()]
    assert sum(shares) == pytest.approx(run["tokens_per_s"])
    assert run["tokens_per_s_per_decode_worker"] == pytest.approx(run["tokens_per_s"] / 2)
    assert run["tokens_per_s_per_worker"] == pytest.approx(run["tokens_per_s"] / 4)
    begin_s, end_s = run["window_s"]
    assert run["goodput_per_s"] == pytest.approx(run["answered"] / (end_s - begin_s))


def test_what_misses_the_objective_is_not_good(here: Routed, tmp_path: Path) -> None:
    result = bench(here, tmp_path / "b", "--concurrency", "2", "--set", "tpot_s=0.01")
    assert result["points"][0]["runs"][0]["goodput_per_s"] == 0


def test_skew_gives_the_first_of_the_named_tasks_most(here: Routed, tmp_path: Path) -> None:
    bench(here, tmp_path / "b", "--rate", "30", "--alpha", "3", "--tasks", "tools,math")
    asked = Counter(one["task"] for one in requests_of(tmp_path / "b", "rate-30-alpha-3-0"))
    assert asked["tools"] > 3 * asked["math"]


def test_a_trace_is_replayed(here: Routed, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 100 + 40 * n, "task": task, "input_length": 5 + n, "output_length": 2 + n}
        for n, task in enumerate(("math", "tools", "math"))
    ]
    trace.write_text("".join(json.dumps(one) + "\n" for one in lines))
    result = bench(here, tmp_path / "b", "--trace", str(trace))
    made = requests_of(tmp_path / "b", "trace-0")
    assert [(one["task"], one["prompt_tokens"], len(one["token_s"])) for one in made] == [
        ("math", 5, 2),
        ("tools", 6, 3),
        ("math", 7, 4),
    ]
    assert [one["at_s"] for one in made] == pytest.approx([0, 0.04, 0.08])
    assert result["points"][0]["load"]["trace"] == "3 requests of 0 s"


def test_failures_are_counted_by_their_reason(tokenizer_folder: Path, tmp_path: Path) -> None:
    with router(tokenizer_folder, decode=1, tokens_per_s=200.0) as here:
        here.workers["decode-0"].fault = iter_faults({3: "cut", 5: "cut"})
        result = bench(here, tmp_path / "b", "--concurrency", "1")
        made = requests_of(tmp_path / "b", "users-1-alpha-0-0")
        (run,) = result["points"][0]["runs"]
        assert run["failed"] == 2
        assert list(run["failures"]) == ["error event broken_answer"]
        assert sum(one["failure"] is not None for one in made) == 2
        assert "2 requests failed: error event broken_answer" in bench_text(result, tmp_path / "b")


def iter_faults(faults: dict[int, str]) -> Any:
    """Faults by the number of the request, the warm-up's two aside."""
    numbers = iter(range(-2, 10**6))
    return lambda: faults.get(next(numbers))


def test_curves_are_of_one_decode_worker(
    here: Routed, tokenizer_folder: Path, tmp_path: Path
) -> None:
    small = (
        *("--set", "batches=[1,3]", "--set", "contexts=[32]", "--set", "prompts=[8,64]"),
        *("--set", "steps=8", "--set", "rounds=1"),
    )
    several = run_qsun("bench", here.url, "--curves", "--out", tmp_path / "no.json", *small)
    assert several.exit_code == 3
    assert "--decode 1" in several.message
    with router(tokenizer_folder, decode=1, tokens_per_s=TOKENS_PER_S) as one:
        outcome = run_qsun("bench", one.url, "--curves", "--out", tmp_path / "c.json", *small)
    assert outcome.exit_code == 0, outcome.stderr
    result = read_record(tmp_path / "c.json", "latency").result
    assert [(row["batch"], row["context_tokens"]) for row in result["tpot"]] == [(1, 32), (3, 32)]
    for row in result["tpot"]:
        assert row["format"] == "W4"
        assert 1 / TOKENS_PER_S <= row["tpot_s"] < 1.4 / TOKENS_PER_S
    assert [row["prompt_tokens"] for row in result["prefill"]] == [8, 64]
    assert all(0 < row["seconds"] < 0.2 for row in result["prefill"])
    assert 0 <= result["hand_off_s"] < 0.1
