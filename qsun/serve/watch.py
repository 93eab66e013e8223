"""The watch: lets workers join once a hand-off went through them, and notes when they are lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing

import aiohttp

from qsun.config import ServeConfig
from qsun.errors import ServingEnvironmentError
from qsun.serve.asked import Asked
from qsun.serve.hops import HopError, Hops
from qsun.serve.metrics import ALARMS, WORK
from qsun.serve.pool import Pool, State, Worker
from qsun.worker_counts import worker_counts

CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(?P<labels>.*)\}", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
USED = re.compile(r"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)", re.MULTILINE)
LOOK_TIMEOUT_S = 5.0


class Watch:
    """Looks at every worker again and again. `probes` has a short prompt for each task."""

    def __init__(
        self,
        pool: Pool,
        hops: Hops,
        session: aiohttp.ClientSession,
        probes: Mapping[str, Asked],
        limits: ServeConfig,
    ) -> None:
        self._pool, self._hops, self._session = pool, hops, session
        self._probes, self._limits = probes, limits
        self._looking: dict[str, asyncio.Task[None]] = {}
        pool.changed.append(lambda _: self.start())

    def start(self) -> None:
        """Look at the workers that are not looked at yet."""
        present = {worker.name: worker for worker in self._pool}
        for name in self._looking.keys() - present.keys():
            self._looking.pop(name).cancel()
        for name, worker in present.items():
            if name not in self._looking:
                self._looking[name] = asyncio.create_task(self._look(worker))

    async def stop(self) -> None:
        """Look no more."""
        tasks = list(self._looking.values())
        self._looking.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, worker: Worker) -> None:
        missed = 0
        while True:
            if worker.state is State.DRAINING and not worker.in_flight:
                self._pool.remove(worker)
                return
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    await self._read(worker)
                missed = 0
            except (aiohttp.ClientError, OSError, ValueError, ServingEnvironmentError) as error:
                # ValueError: a name that can be nobody's.
                missed += 1
                refused = isinstance(error, aiohttp.ClientConnectorError)
                if worker.ready and (refused or missed >= self._limits.lost_looks):
                    what = str(error) or type(error).__name__
                    self._pool.mark(worker, State.DOWN, what)
            else:
                if worker.state in (State.JOINING, State.DOWN):
                    await self._join(worker)
            await asyncio.sleep(self._limits.look_s)

    async def _read(self, worker: Worker) -> None:
        """Its counters, and what its KV cache holds."""
        async with self._session.get(f"{worker.address.url}/metrics") as response:
            response.raise_for_status()
            text = await response.text()
        found = CACHE_INFO.search(text)
        if found is None:
            raise ServingEnvironmentError("its metrics do not tell its cache's size")
        labels = dict(LABEL.findall(found["labels"]))
        try:
            blocks, block_tokens = int(labels["num_gpu_blocks"]), int(labels["block_size"])
        except (KeyError, ValueError) as error:
            raise ServingEnvironmentError(f"its cache's size cannot be read: {labels}") from error
        # vLLM keeps one block to itself.
        worker.blocks, worker.block_tokens = blocks - 1, block_tokens
        used = USED.search(text)
        worker.used = float(used[1]) if used else 0.0
        counts = vars(worker_counts(text))
        worker.counts = {name: float(counts[name]) for name in (*ALARMS, *WORK)}

    async def _join(self, worker: Worker) -> None:
        """A real hand-off: a prefill worker's of each of its tasks, any task's for a decoder."""
        for other in self._pool:
            # NIXL would convert; but what the bundle's launch spec starts is alike.
            if other.ready and other.block_tokens != worker.block_tokens:
                found = f"its KV blocks hold {worker.block_tokens} tokens"
                problem = f"{found}, those of {other.name} {other.block_tokens}"
                self._pool.mark(worker, State.DOWN, problem)
                return
        try:
            if worker.address.role == "prefill":
                for task in sorted(worker.address.tasks):
                    await self._read_prompt(worker, task)
            elif not await self._answers(worker):
                return
        except HopError as error:
            self._pool.mark(worker, State.DOWN, str(error))
        else:
            self._pool.mark(worker, State.READY)

    async def _read_prompt(self, worker: Worker, task: str) -> None:
        asked = self._probes[task]
        parameters = await self._hops.prefill(worker, asked)
        for decoder in self._pool.decode()[:1]:
            await self._hops.release(decoder, asked, parameters)

    async def _answers(self, worker: Worker) -> bool:
        """Whether an answer came; False where nobody could read a prompt for it."""
        for task, asked in self._probes.items():
            for reader in self._pool.prefill(task):
                try:
                    parameters = await self._hops.prefill(reader, asked)
                except HopError:
                    continue
                async with aclosing(self._hops.decode(worker, asked, parameters)) as pieces:
                    async for _ in pieces:
                        pass
                return True
        self._pool.mark(worker, worker.state, "waits for a prefill worker to be tried with")
        return False
