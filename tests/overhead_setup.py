"""Two routers over the same workers, each router in turn alone on a core of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from qsun.ports import free_ports
from tests.overhead_clients import Client, DirectClient, Load, RoutedClient, measure
from tests.overhead_router import TASK
from tests.routing import VOCABULARY, fake_bundle

QSUN, VLLM_ROUTER, DIRECT = "qsun", "vllm-router", "direct"
ROUTER_CORE, OTHER_CORE = {0}, {1}
DECODE_WORKERS = 3  # qsun gives each 256 requests at most
START_S = 60.0


@dataclass(frozen=True)
class Setup:
    """What runs: ports of the workers, and each router's port and process."""

    prefill: int
    decode: tuple[int, ...]
    routers: dict[str, tuple[int, psutil.Process]]

    def clients(self, system: str, prompts: list[list[int]]) -> list[Client]:
        """Clients of a router, or of the workers themselves, one a prompt."""
        if system != DIRECT:
            port, _ = self.routers[system]
            return [RoutedClient(prompt, TASK, port) for prompt in prompts]
        return [
            DirectClient(prompt, TASK, self.prefill, self.decode[number % len(self.decode)])
            for number, prompt in enumerate(prompts)
        ]

    def pace(self, chunks_per_s: float) -> None:
        """Set how fast the decode workers answer."""
        urllib.request.urlopen(f"http://127.0.0.1:{self.decode[0]}/pace/{chunks_per_s}").close()

    @contextmanager
    def alone(self, system: str) -> Iterator[None]:
        """Halt every other router."""
        others = [process for name, (_, process) in self.routers.items() if name != system]
        for process in others:
            process.suspend()
        try:
            yield
        finally:
            for process in others:
                process.resume()
            time.sleep(0.2)  # for what has piled up

    def cpu_s(self, system: str) -> float:
        """Seconds of processor time that a router has used; 0 where there is none."""
        if system == DIRECT:
            return 0.0
        times = self.routers[system][1].cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self, system: str) -> int:
        """Memory that a router holds."""
        return int(self.routers[system][1].memory_info().rss)


@contextmanager
def running(vllm_router: Path, tokenizer: Path, logs: Path) -> Iterator[Setup]:
    """Start workers and both routers; end them all."""
    digest = fake_bundle(tokenizer).digest
    prefill, qsun, other, metrics, *decode = free_ports(4 + DECODE_WORKERS)
    urls = [f"http://127.0.0.1:{port}" for port in (prefill, *decode)]
    python = [sys.executable, "-m"]
    with ExitStack() as stack:

        def start(name: str, cores: set[int], *command: object) -> psutil.Process:
            words = [str(word) for word in command]
            return stack.enter_context(started(words, cores, logs / f"{name}.log"))

        worker = (*python, "tests.overhead_workers")
        start("prefill", OTHER_CORE, *worker, "prefill", digest, prefill)
        start("decode", OTHER_CORE, *worker, "decode", digest, *decode)
        time.sleep(2)
        router = (*python, "tests.overhead_router", tokenizer, qsun, *urls)
        routers = {QSUN: (qsun, start(QSUN, ROUTER_CORE, *router))}
        options = ["--vllm-pd-disaggregation", "--prefill", urls[0]]
        options += [word for url in urls[1:] for word in ("--decode", url)]
        options += ["--host", "127.0.0.1", "--port", str(other)]
        # What costs it least: no prefix tree, and no line of log a request.
        options += ["--policy", "round_robin", "--log-level", "warning"]
        options += ["--prometheus-port", str(metrics)]
        process = start(VLLM_ROUTER, ROUTER_CORE, vllm_router.absolute(), *options)
        routers[VLLM_ROUTER] = (other, process)
        setup = Setup(prefill, tuple(decode), routers)
        for name in routers:
            until_ready(setup, name)
        yield setup


@contextmanager
def started(command: list[str], cores: set[int], log: Path) -> Iterator[psutil.Process]:
    """A process bound to `cores` from its first instruction on; killed at the end."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    finally:
        os.sched_setaffinity(0, mine)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def until_ready(setup: Setup, system: str) -> None:
    """Wait until a router answers."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        with suppress(OSError, SystemExit, ExceptionGroup):
            clients = setup.clients(system, random_prompts(1, 4, seed=0))
            uvloop.run(measure(clients, Load(1, 1, 0.0, requests=1), 0.0, seed=0))
            return
        time.sleep(0.5)
    raise SystemExit(f"{system} did not answer within {START_S:g} s")


def random_prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Prompts in token ids, all different."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(tokens)] for _ in range(count)]
