"""`qsun serve` as a user runs it: a process of its own with real vLLM workers behind it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from qsun.ports import free_ports
from qsun.vllm_server import VllmServer

ADMIN_KEY = "only-for-the-tests-of-qsun"
QSUN = Path(sys.executable).with_name("qsun")
READY_S = 300.0


@dataclass
class Serving:
    """A running `qsun serve`: its address, its process, and where its workers' logs lie."""

    url: str
    process: subprocess.Popen[str]
    logs: Path
    output: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=ADMIN, timeout=30)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the router knows of its workers, by name."""
        return {one["name"]: one for one in self.get("/admin/workers").json()["workers"]}

    def server(self, name: str) -> VllmServer:
        """A worker, to be asked past the router."""
        found = self.workers()[name]
        model = "decode" if found["role"] == "decode" else "no-task"
        log = (self.logs / f"{name}.log").open(encoding="utf-8", errors="replace")
        return VllmServer(found["url"], model, log, f"worker {name}")

    def processes(self, name: str) -> list[psutil.Process]:
        """A worker's processes, its server first."""
        port = self.workers()[name]["url"].rpartition(":")[2]
        for child in psutil.Process(self.process.pid).children():
            if port in child.cmdline():
                return [child, *child.children(recursive=True)]
        return []

    def until(self, states: dict[str, str], timeout_s: float = READY_S) -> None:
        """Wait until workers have these states."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = {name: one["state"] for name, one in self.workers().items()}
            if all(found.get(name) == state for name, state in states.items()):
                return
            assert time.monotonic() < deadline, f"{found} instead of {states}"
            time.sleep(0.2)

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@contextmanager
def serving(folder: Path, bundle: Path, *options: str) -> Iterator[Serving]:
    """Start `qsun serve BUNDLE OPTIONS`, wait until it says that all tasks are served; end it."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, logs, output = folder / "admin-keys", folder / "logs", folder / "output.txt"
    keys.write_text(f"tests {ADMIN_KEY}\n", encoding="utf-8")
    (port,) = free_ports(1)
    command: Sequence[str] = (
        *(str(QSUN), "serve", str(bundle), "--port", str(port), "--admin-keys", str(keys)),
        *(() if "--external" in options else ("--logs", str(logs))),
        *options,
    )
    with output.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, text=True)
    try:
        deadline = time.monotonic() + READY_S
        while f" at http://127.0.0.1:{port}/v1" not in output.read_text(encoding="utf-8"):
            assert process.poll() is None, output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield Serving(f"http://127.0.0.1:{port}", process, logs, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
