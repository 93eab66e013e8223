"""`qsun serve` as a process: it starts workers, starts them again, drains, and ends them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest

from qsun.environments import PYTHON_VARIABLE
from qsun.ports import free_ports
from tests.bundles import build_bundle, write_passed_verdict
from tests.command import run_qsun
from tests.served.conftest import is_alive
from tests.serving import QSUN, Serving, serving

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two tasks, with a verdict that passed."""
    folder = build_bundle(tmp_path_factory.mktemp("bundle") / "bundle")
    write_passed_verdict(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An interpreter for workers that starts fake ones."""
    python = tmp_path_factory.mktemp("fake") / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_SERVER}" "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PYTHON_VARIABLE, str(python))
        yield


@contextmanager
def started(bundle: Path, folder: Path) -> Iterator[Serving]:
    with serving(folder, bundle, "--decode", "2", "--prefill", "math=2") as running:
        running.until(dict.fromkeys(running.workers(), "ready"))
        yield running


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with started(bundle, tmp_path_factory.mktemp("served")) as running:
        yield running


def ask(served: Serving, task: str = "math", new_tokens: int = 4) -> httpx.Response:
    body = {"model": task, "prompt": [1, 2, 3], "max_tokens": new_tokens, "stream": True}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)


def everyone(served: Serving) -> list[psutil.Process]:
    return psutil.Process(served.process.pid).children(recursive=True)


def test_sigterm_lets_answers_end_takes_nothing_new_and_leaves_nobody(
    bundle: Path, tmp_path: Path
) -> None:
    with started(bundle, tmp_path) as served:
        names, workers = set(served.workers()), everyone(served)
        assert names == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        assert {path.stem for path in served.logs.iterdir()} == names
        assert (served.logs / "decode-0.log").read_text() == "listening\n"
        assert len(workers) == len(names)
        answers: list[httpx.Response] = []
        client = Thread(target=lambda: answers.append(ask(served, new_tokens=40)))  # two seconds
        client.start()
        while not any(one["in_flight"] for one in served.workers().values()):
            time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        refused = ask(served)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(f"{served.url}/ready").json()["draining"]
        client.join()
        assert served.process.wait(60) == 0
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert answers[0].text.count("data: {") == 40
        assert [one for one in workers if is_alive(one)] == []


def test_workers_of_one_gpu_start_one_after_another(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER_PACKAGE", "vllm")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with started(bundle, tmp_path) as served:
        names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
        assert sorted(served.workers()) == sorted(names)
        begun = [served.processes(name)[0].create_time() for name in names]
        # A fake server takes longer than this to answer; all at once are a few milliseconds apart.
        assert all(after - one > 0.2 for one, after in pairwise(begun))


@pytest.mark.parametrize("name", ["decode-1", "prefill-0"])
def test_a_killed_worker_is_replaced_while_others_answer(served: Serving, name: str) -> None:
    (first, *_) = served.processes(name)
    first.kill()
    statuses = [ask(served).status_code for _ in range(10)]
    assert statuses == [200] * 10
    served.until({name: "ready"}, timeout_s=30)
    (second, *_) = served.processes(name)
    assert second.pid != first.pid
    assert f"worker {name} ended with code -9; starts again" in served.output.read_text()
    assert {ask(served, task).status_code for task in ("math", "code")} == {200}


def test_a_worker_that_cannot_start_ends_everything(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER_ENDS", "decode")
    (port,) = free_ports(1)
    command = [str(QSUN), "serve", str(bundle), "--port", str(port), "--logs", str(tmp_path / "l")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 8
    assert "worker decode ended with code 1 while starting" in outcome.stderr
    assert "RuntimeError: told to end" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_port_that_is_taken_is_named(bundle: Path, served: Serving) -> None:
    port = served.url.rpartition(":")[2]
    outcome = subprocess.run(
        [str(QSUN), "serve", str(bundle), "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 3
    assert f"cannot listen at 127.0.0.1:{port}" in outcome.stderr


def test_a_dry_run_says_what_would_run(bundle: Path) -> None:
    outcome = run_qsun("serve", bundle, "--decode", "3", "--kv-cache", "1GiB", "--dry-run")
    assert outcome.exit_code == 0
    assert outcome.stdout.count("--kv-cache-memory-bytes 1073741824") == 4
    assert outcome.stdout.count("qsun_guard") == 4
    assert "decode-2: decode, all tasks" in outcome.stdout
    assert outcome.stdout.splitlines()[-1] == "router: 127.0.0.1:8000, without keys"


def test_external_workers_are_routed_to_and_left_alone(
    bundle: Path, served: Serving, tmp_path: Path
) -> None:
    listed = [
        {key: one[key] for key in ("name", "role", "tasks", "url")}
        for one in served.workers().values()
    ]
    (port,) = free_ports(1)
    file = tmp_path / "workers.json"
    router = {"host": "127.0.0.1", "port": port}
    file.write_text(json.dumps({"schema": 1, "router": router, "workers": listed}))
    command = [str(QSUN), "serve", str(bundle), "--external", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == f"code, math at http://127.0.0.1:{port}/v1\n"
    assert psutil.Process(process.pid).children() == []
    body = {"model": "code", "prompt": [1, 2, 3]}
    assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 200
    process.terminate()
    assert process.wait(30) == 0
    assert ask(served).status_code == 200


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--prefill", "mth=2"], 3, "--prefill mth: the tasks are code, math"),
        (["--decode", "0"], 3, "--decode 0: at least 1"),
        (["--prefill", "math"], 2, "give TASK=NUMBER"),
        (["--kv-cache", "much"], 2, "'much' is not a number of bytes with a unit"),
        (["--kv-cache", "0GiB"], 2, "0GiB: a cache of no size"),
        (["--external", "/no/such", "--decode", "2"], 2, "--external starts no workers"),
        (["--external", "/no/such/file"], 3, "is not a file of workers"),
        (["--api-keys", "/no/such/keys"], 3, "cannot be read"),
        (["--set", "policy=fair"], 3, "policy"),
        (["--set", "polcy=shared"], 3, "policy"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    bundle: Path, options: list[str], code: int, named: str
) -> None:
    outcome = run_qsun("serve", bundle, *options)
    assert outcome.exit_code == code, outcome.stderr
    assert named in outcome.stderr


def test_a_bundle_without_a_verdict_is_not_served(tmp_path: Path) -> None:
    folder = build_bundle(tmp_path / "bundle")
    outcome = run_qsun("serve", folder, "--dry-run")
    assert outcome.exit_code == 11
    assert f"was never verified. Run `qsun verify {folder}`" in outcome.stderr
    assert run_qsun("serve", tmp_path / "none").exit_code == 11
