"""Several routers over the workers of one bundle, each over as many decode workers as it says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qsun.bench.serving import served
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.workers import GUARD
from tests.gpu.systems_bundles import LEFT_OUT
from tests.serving import ADMIN, ADMIN_KEY

LOOK_S = 0.5
SHOWN_LINES, SHOWN_CHARACTERS = 25, 300  # of a worker's log
LISTED = ("name", "role", "tasks", "url")
NEEDED = ("qsun.serve.run", "qsun.serve.launch", "qsun.jobs.bench")
QUESTION = """
from importlib.util import find_spec
print(*(name for name in ("vllm", "nixl") if find_spec(name) is None))
"""


@dataclass(frozen=True)
class System:
    """A router's policy over `decode` decode workers of a bundle."""

    kind: str
    bundle: str
    policy: str
    decode: int

    @property
    def name(self) -> str:
        """Unique, and a file's name."""
        return f"{self.kind}-{self.decode}"


def check_environments() -> ServingEnvironment:
    """Refuse at once what would end a measurement later; the serving environment.

    Raises:
        ImportError: a package that serving or a bench needs is missing here.
        ServingEnvironmentError: there is no vLLM.
        SystemExit: vLLM or NIXL is not to be found as a worker looks for it.
    """
    for name in NEEDED:
        importlib.import_module(name)
    serving = find_serving_environment()
    environment = os.environ | {"PYTHONPATH": str(GUARD), "PYTHONSAFEPATH": "1"}
    command = [str(serving.python), "-c", QUESTION]
    missing = subprocess.check_output(command, env=environment, text=True).strip()
    if missing:
        raise SystemExit(f"{serving.python} lacks {missing} where PYTHONPATH is a worker's")
    return serving


@contextmanager
def routers(
    bundle: Path, systems: list[System], logs: Path, kv_cache: str, end: float
) -> Iterator[dict[str, str]]:
    """Serve a bundle with the decode workers of its largest system; each system's address.

    Raises:
        ServingEnvironmentError: a worker or router did not start.
        TimeoutError: not all workers were ready by `end`, monotonic seconds.
    """
    first, *others = sorted(systems, key=lambda one: -one.decode)
    logs.mkdir(parents=True, exist_ok=True)
    keys = logs / "admin-keys"
    keys.write_text(f"tests {ADMIN_KEY}\n", encoding="utf-8")
    allowed = [word for name in LEFT_OUT for word in ("--allow", name)]
    allowed += ["--admin-keys", str(keys)]
    started = (
        *("--decode", str(first.decode), "--kv-cache", kv_cache, "--logs", str(logs)),
        *("--set", f"start_timeout_s={max(10, int(end - time.monotonic()))}"),
    )
    with ExitStack() as stack:

        def serve(system: System, *options: str) -> str:
            policy = ("--set", f"policy={system.policy}")
            return stack.enter_context(served(bundle, (*options, *policy, *allowed)))

        urls = {first.name: serve(first, *started)}
        workers = when_ready(urls[first.name], end)
        for system in others:
            listed = logs / f"{system.name}.json"
            listed.write_text(json.dumps(_listing(workers, system.decode)), encoding="utf-8")
            urls[system.name] = serve(system, "--external", str(listed))
            when_ready(urls[system.name], end)
        yield urls


def when_ready(url: str, end: float) -> list[dict[str, Any]]:
    """A router's workers, once all of them are ready.

    Raises:
        TimeoutError: not by `end`; names their states.
    """
    while True:
        answer = httpx.get(f"{url}/admin/workers", headers=ADMIN, timeout=30, trust_env=False)
        workers: list[dict[str, Any]] = answer.raise_for_status().json()["workers"]
        states = {one["name"]: one["state"] for one in workers}
        if set(states.values()) == {"ready"}:
            return workers
        if time.monotonic() > end:
            raise TimeoutError(f"{url}: {states}")
        time.sleep(LOOK_S)


def _listing(workers: list[dict[str, Any]], decode: int) -> dict[str, Any]:
    """A workers' file with every prefill worker, and the first decode workers."""
    entries = [{name: one[name] for name in LISTED} for one in workers]
    decoders = sorted(
        (one for one in entries if one["role"] == "decode"), key=lambda one: str(one["name"])
    )
    readers = [one for one in entries if one["role"] == "prefill"]
    router = {"host": "127.0.0.1", "port": 1}
    return {"schema": 1, "router": router, "workers": readers + decoders[:decode]}


def show_logs(logs: Path) -> None:
    """The ends of the workers' logs, for who cannot look at them later."""
    for path in sorted(logs.glob("*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"--- {path.name}")
        print("\n".join(line[:SHOWN_CHARACTERS] for line in lines[-SHOWN_LINES:]), flush=True)
