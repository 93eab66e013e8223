"""Real workers under a script's control, and a router process over them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import httpx
import psutil

from qsun.bundle import Bundle
from qsun.config import ServeConfig
from qsun.environments import find_serving_environment
from qsun.launch_spec import launch_spec
from qsun.ports import free_ports
from qsun.serve.plan import serving_plan
from qsun.vllm_server import ServerCommand, start_server
from qsun.workers import GUARD, worker_commands

FAULTY_GUARD = Path(__file__).with_name("faulty_guard")


@dataclass
class Worker:
    """A real worker under this script's control, at one address through all its lives."""

    name: str
    role: str
    tasks: tuple[str, ...]
    command: ServerCommand
    port: int
    log: IO[str]
    python: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, command: ServerCommand | None = None) -> None:
        self.process = start_server(self.python, command or self.command, self.port, self.log)

    def kill(self) -> None:
        """`kill -9` of the server and of what it has started."""
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        for one in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        for one in [root, *root.children(recursive=True)]:
            one.send_signal(number)

    def used(self) -> float:
        """The share of its KV blocks that are in use."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("vllm:kv_cache_usage_perc")
        )


def start_workers(bundle: Bundle, folder: Path, fault_file: Path) -> dict[str, Worker]:
    """Two prefill workers for all tasks and two decode workers, none of them ready yet.

    What `fault_file` says is done to the caches that decode workers are to fetch.
    """
    plan = serving_plan(launch_spec(bundle.manifest, "cpu"), 2, dict.fromkeys(bundle.prefill, 2))
    python, workers = find_serving_environment().python, {}
    commands, ports = worker_commands(bundle.folder, plan), free_ports(len(plan.workers))
    for spec, command, port in zip(plan.workers, commands, ports, strict=True):
        log = (folder / f"{spec.name}.log").open("w+", encoding="utf-8")
        faulty = {
            "PYTHONPATH": str(FAULTY_GUARD),
            "QSUN_REAL_GUARD": str(GUARD / "qsun_guard.py"),
            "QSUN_FAULT_FILE": str(fault_file),
        }
        environment = dict(command.environment) | (faulty if spec.role == "decode" else {})
        own = replace(command, environment=environment)
        workers[spec.name] = Worker(spec.name, spec.role, spec.tasks, own, port, log, python)
        workers[spec.name].start()
    return workers


def start_router(
    bundle: Bundle, workers: Mapping[str, Worker], folder: Path, limits: ServeConfig
) -> tuple[str, subprocess.Popen[bytes]]:
    """`qsun serve --external` over these workers: its address and its process."""
    (port,) = free_ports(1)
    listed = [
        {"name": one.name, "role": one.role, "tasks": list(one.tasks), "url": one.url}
        for one in workers.values()
    ]
    external = folder / "workers.json"
    router = {"host": "127.0.0.1", "port": port}
    external.write_text(json.dumps({"schema": 1, "router": router, "workers": listed}))
    settings = [
        word
        for name in ("first_token_s", "stall_s", "prefill_s", "queue_s")
        for word in ("--set", f"{name}={getattr(limits, name)}")
    ]
    qsun = Path(sys.executable).with_name("qsun")
    process = subprocess.Popen(
        [str(qsun), "serve", str(bundle.folder), "--external", str(external), *settings],
        stdout=(folder / "router.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    return f"http://127.0.0.1:{port}", process
