"""Local workers: vLLM servers that are started, started again when they end, and ended at last."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loguru import logger

from qsun.errors import ServingEnvironmentError
from qsun.launch_spec import LaunchSpec, WorkerSpec
from qsun.ports import free_ports
from qsun.serve.plan import predecessors
from qsun.serve.pool import Address, Pool
from qsun.vllm_server import ServerCommand, last_errors, start_server, stop_servers
from qsun.workers import worker_commands

LONGEST_PAUSE_S = 30.0
LOOK_S = 0.2


@dataclass
class _Process:
    """One worker's process, the port and log that it keeps over its lives."""

    spec: WorkerSpec
    command: ServerCommand
    port: int
    log: IO[str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    @property
    def address(self) -> Address:
        return Address(
            self.spec.name,
            self.spec.role,
            frozenset(self.spec.tasks),
            f"http://127.0.0.1:{self.port}",
        )


class LocalWorkers:
    """The workers of a plan on this machine. Their logs are `LOGS/NAME.log`."""

    def __init__(self, plan: LaunchSpec, bundle: Path, python: Path, logs: Path) -> None:
        self._python = python
        self._predecessors = predecessors(plan)
        logs.mkdir(parents=True, exist_ok=True)
        commands, ports = worker_commands(bundle, plan), free_ports(len(plan.workers))
        self._workers = [
            _Process(spec, command, port, (logs / f"{spec.name}.log").open("w+", encoding="utf-8"))
            for spec, command, port in zip(plan.workers, commands, ports, strict=True)
        ]

    @property
    def addresses(self) -> list[Address]:
        """Where they will listen."""
        return [worker.address for worker in self._workers]

    async def supervise(self, pool: Pool, start_timeout_s: float) -> None:
        """Start all, those of one GPU in turn, and keep them running until cancelled; then end all.

        Raises:
            ServingEnvironmentError: one ended before it was ever ready, or was not in time.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(self._keep(worker, pool, start_timeout_s))
        except* ServingEnvironmentError as errors:
            raise errors.exceptions[0] from None
        finally:
            running = [one.process for one in self._workers if one.process is not None]
            await asyncio.to_thread(stop_servers, running)
            for worker in self._workers:
                worker.log.close()

    async def _keep(self, worker: _Process, pool: Pool, start_timeout_s: float) -> None:
        await self._turn(worker, pool)
        begun = asyncio.get_running_loop().time()
        while True:
            worker.process = start_server(self._python, worker.command, worker.port, worker.log)
            while worker.process.poll() is None:
                entry = pool.get(worker.spec.name)
                waited_s = asyncio.get_running_loop().time() - begun
                if entry and not entry.was_ready and waited_s > start_timeout_s:
                    problem = f"was not ready within {start_timeout_s} s ({entry.problem})"
                    raise self._error(worker, problem)
                await asyncio.sleep(LOOK_S)
            code = worker.process.returncode
            entry = pool.get(worker.spec.name)
            if entry and not entry.was_ready:
                raise self._error(worker, f"ended with code {code} while starting")
            # What it had started must be gone before its ports are taken again.
            await asyncio.to_thread(stop_servers, [worker.process])
            if entry is None:
                return  # drained
            pause_s = min(LONGEST_PAUSE_S, 2.0**worker.restarts)
            worker.restarts += 1
            logger.warning(
                f"worker {worker.spec.name} ended with code {code}; starts again in {pause_s:g} s"
            )
            await asyncio.sleep(pause_s)

    async def _turn(self, worker: _Process, pool: Pool) -> None:
        """Wait until the worker that must answer first does, or is there no more."""
        name = self._predecessors.get(worker.spec.name)
        while name and (before := pool.get(name)) and not before.blocks:
            await asyncio.sleep(LOOK_S)

    def _error(self, worker: _Process, what: str) -> ServingEnvironmentError:
        with suppress(OSError):
            worker.log.flush()
        name, log = worker.spec.name, getattr(worker.log, "name", "")
        return ServingEnvironmentError(
            f"worker {name} {what}; see {log}:\n{last_errors(worker.log)}"
        )
