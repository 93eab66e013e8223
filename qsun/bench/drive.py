"""A run: requests sent when they are due, in an open or a closed loop, and what came of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import aiohttp

from qsun.bench.client import Answer, Client
from qsun.bench.target import Target, Work, work_of
from qsun.errors import ServingEnvironmentError
from qsun.progress import bar
from qsun.workload import Request, Workload, closed_loop, open_loop

LOOK_S = 0.5  # between two looks at the workers' counters
WARMUP_PROMPT, WARMUP_OUTPUT = 32, 8  # tokens

Clock = Callable[[], float]


@dataclass(frozen=True)
class Run:
    """All answers of one run of `seconds`, and the workers' counters by the time of a look."""

    seconds: float
    answers: list[Answer]
    work: list[tuple[float, dict[str, Work]]]


async def drive(
    target: Target, load: Workload | Sequence[Request], seconds: float, seed: int, warmup: int
) -> Run:
    """Put a workload, or a trace's requests, on a router for a while; every answer is awaited.

    Before it, every task is asked `warmup` times, one after another, which is not counted.

    Raises:
        ServingEnvironmentError: a task is not answered before the load begins, or the router does
            not tell its workers' counters any more.
    """
    try:
        return await _drive(target, load, seconds, seed, warmup)
    except aiohttp.ClientError as error:
        raise ServingEnvironmentError(
            f"{target.url} does not answer any more: {error!r}. What is finished stays: once it is "
            "served again, the same command with --resume goes on"
        ) from error


async def _drive(
    target: Target, load: Workload | Sequence[Request], seconds: float, seed: int, warmup: int
) -> Run:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=target.headers,
    ) as session:
        warm = Client(session, target.url, time.perf_counter, seed)
        for task in target.tasks * warmup:
            failure = (await warm.ask(Request(0.0, task, WARMUP_PROMPT, WARMUP_OUTPUT))).failure
            if failure is not None:
                raise ServingEnvironmentError(f"{target.url} does not answer {task}: {failure}")
        start = time.perf_counter()

        def clock() -> float:
            return time.perf_counter() - start

        client = Client(session, target.url, clock, seed)
        async with _looking(session, target.url, clock) as work:
            if isinstance(load, Workload) and load.concurrency is not None:
                requests = closed_loop(load, target.tasks, seed)
                answers = await _closed(client, requests, load.concurrency, seconds, clock)
            else:
                due = (
                    open_loop(load, target.tasks, seconds, seed)
                    if isinstance(load, Workload)
                    else load
                )
                answers = await _open(client, due, clock)
    return Run(seconds, answers, work)


async def _open(client: Client, due: Sequence[Request], clock: Clock) -> list[Answer]:
    """Every request at its time, whatever has become of the earlier ones."""
    with bar("answers", len(due)) as shown:

        async def ask(request: Request) -> Answer:
            answer = await client.ask(request)
            shown.update(1)
            return answer

        async with asyncio.TaskGroup() as group:
            asked = []
            for request in due:
                await asyncio.sleep(max(0.0, request.at_s - clock()))
                asked.append(group.create_task(ask(request)))
    return [task.result() for task in asked]


async def _closed(
    client: Client, requests: Iterator[Request], users: int, seconds: float, clock: Clock
) -> list[Answer]:
    """Each user asks again once answered, for so many seconds."""
    answers: list[Answer] = []
    with bar("answers", 0) as shown:

        async def user() -> None:
            while clock() < seconds:
                answers.append(await client.ask(next(requests)))
                shown.update(1)

        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(user())
    return answers


@asynccontextmanager
async def _looking(
    session: aiohttp.ClientSession, url: str, clock: Clock
) -> AsyncIterator[list[tuple[float, dict[str, Work]]]]:
    """Look at the workers' counters from now on until the block ends, and then once more."""
    found: list[tuple[float, dict[str, Work]]] = []

    async def look() -> None:
        async with session.get(f"{url}/metrics") as response:
            response.raise_for_status()
            found.append((clock(), work_of(await response.text())))

    async def look_on() -> NoReturn:
        while True:
            await look()
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look_on())
    try:
        yield found
    finally:
        looking.cancel()
        (ended,) = await asyncio.gather(looking, return_exceptions=True)
    if not isinstance(ended, asyncio.CancelledError):
        raise ended
    await look()
