"""A bench that cannot be made is refused before any load; one that is stopped can go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsun.bench.serving import PROGRAM
from qsun.ports import free_ports
from tests.benching import router
from tests.bundles import build_bundle
from tests.command import run_qsun
from tests.routing import Routed

SHORT = ("--set", "prompt_tokens=fixed:8", "--set", "output_tokens=fixed:4", "--set", "seconds=1")


@pytest.fixture(scope="module")
def here(tokenizer_folder: Path) -> Iterator[Routed]:
    with router(tokenizer_folder, tokens_per_s=100.0) as running:
        yield running


def refused(subject: str | Path, exit_code: int, out: Path, *options: str | Path) -> str:
    """The message of a bench that must not begin."""
    outcome = run_qsun("bench", subject, "--out", out, *options)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert outcome.stdout == ""
    return outcome.message


def test_nobody_at_an_address(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    message = refused(f"http://127.0.0.1:{port}", 8, tmp_path / "b", "--rate", "1")
    assert "no router answers at" in message
    assert "qsun serve" in message
    assert not (tmp_path / "b").exists()


def test_a_worker_is_no_router(here: Routed, tmp_path: Path) -> None:
    refused(here.urls["decode-0"], 8, tmp_path / "b", "--rate", "1")


def test_tasks_that_are_not_served(here: Routed, tmp_path: Path) -> None:
    message = refused(here.url, 3, tmp_path / "b", "--rate", "1", "--tasks", "maths,sql,tools")
    assert "maths is not served (did you mean math?)" in message
    assert "sql is not served" in message
    assert "tools is not served" not in message


def test_loads_that_cannot_be_made_are_all_named(here: Routed, tmp_path: Path) -> None:
    message = refused(
        *(here.url, 3, tmp_path / "b", "--rate", "1", "--set", "arrivals=often"),
        *("--set", "prompt_tokens=fixed:many"),
    )
    assert "arrivals: often" in message
    assert "prompt_tokens: fixed:many" in message
    assert "no load: give --rate" in refused(here.url, 3, tmp_path / "b")
    assert "1064 tokens: 1024 are served" in refused(
        here.url, 3, tmp_path / "b", "--rate", "1", "--set", "prompt_tokens=fixed:1000"
    )
    assert "rates" in refused(here.url, 3, tmp_path / "b", "--rate", "-1")
    assert run_qsun("bench", here.url, "--rate", "x", "--out", tmp_path / "b").exit_code == 2


def test_a_trace_has_no_load_beside_it(here: Routed, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "task": "sql", "input_length": 5, "output_length": 1}\n')
    assert "line 1: task sql" in refused(here.url, 6, tmp_path / "b", "--trace", trace)
    assert "of its own" in refused(here.url, 3, tmp_path / "b", "--trace", trace, "--rate", "1")


def test_an_address_takes_no_layout(here: Routed, tmp_path: Path) -> None:
    message = refused(here.url, 3, tmp_path / "b", "--rate", "1", "--decode", "2")
    assert "served already" in message


def test_a_bundles_mistakes_are_found_before_it_is_served(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle")
    message = refused(bundle, 3, tmp_path / "b", "--rate", "1", "--tasks", "sql")
    assert "has no such tasks" in message
    assert "364 tokens: 256 are served" in refused(
        bundle, 3, tmp_path / "b", "--rate", "1", "--set", "prompt_tokens=fixed:300"
    )
    assert refused(tmp_path / "none", 11, tmp_path / "b", "--rate", "1")
    # It has no verdict: qsun serve says so, and ends.
    assert "ended with code 11" in refused(
        bundle, 8, tmp_path / "b", "--rate", "1", "--set", "prompt_tokens=fixed:8"
    )
    assert not (tmp_path / "b").exists()


def test_an_output_is_never_overwritten(here: Routed, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    assert "never overwrites" in refused(here.url, 7, tmp_path / "b", "--rate", "1")
    assert "no interrupted bench" in refused(
        here.url, 7, tmp_path / "none", "--rate", "1", "--resume"
    )
    assert "exists already" in refused(here.url, 7, tmp_path / "b" / "mine", "--curves")


def test_an_interrupted_bench_says_what_is_missing_and_goes_on(
    here: Routed, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    options = ["--rate", "20,30", *SHORT, "--set", "repeats=2", "--out", str(out)]
    command = [sys.executable, "-c", PROGRAM, "bench", here.url, *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A test suite run in the background passes on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (out / "runs" / "rate-30-alpha-0-0.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "2 runs are missing" in process.communicate()[1]
    assert process.returncode == 130
    record = json.loads((out / "bench.json").read_text())["result"]
    assert not record["complete"]
    assert record["missing"] == ["rate-20-alpha-0-1", "rate-30-alpha-0-1"]
    assert [len(point["runs"]) for point in record["points"]] == [1, 1]
    changed = refused(here.url, 3, out, *options[:-2], "--resume", "--set", "seed=5")
    assert "seed: 0 then, 5 now" in changed
    outcome = run_qsun("bench", here.url, *options, "--resume")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stderr.count(": 1 s") == 2
    after = json.loads((out / "bench.json").read_text())["result"]
    assert after["complete"]
    assert after["points"][0]["runs"][0] == record["points"][0]["runs"][0]
    assert [len(point["runs"]) for point in after["points"]] == [2, 2]


def test_a_router_that_goes_away_is_said_and_what_is_finished_stays(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    with router(tokenizer_folder, ends_after_s=2.5, tokens_per_s=100.0) as here:
        options = ("--set", "repeats=9", "--out", str(out))
        outcome = run_qsun("bench", here.url, "--rate", "20", *SHORT, *options)
    assert outcome.exit_code == 8
    assert "does not answer any more" in outcome.message
    assert "--resume" in outcome.message
    assert (out / "runs" / "rate-20-alpha-0-0.json").exists()
    assert not (out / "bench.json").exists()


def test_a_task_that_is_not_answered_is_said_before_the_load(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    with router(tokenizer_folder, tokens_per_s=100.0) as here:
        for name in ("prefill-0", "prefill-1"):
            here.workers[name].fault = lambda: "500"
        message = refused(here.url, 8, tmp_path / "b", "--rate", "5", *SHORT)
    assert "does not answer math: status 503" in message
    assert list((tmp_path / "b" / "runs").iterdir()) == []
