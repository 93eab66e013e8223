"""External workers: a file that is wrong is refused, and the pool follows what names resolve to."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qsun.errors import ConfigError
from qsun.serve import external
from qsun.serve.external import External, follow, read_external
from qsun.serve.pool import Address, Pool, State

TASKS = ("math", "tools")
PREFILL = {"name": "prefill", "role": "prefill", "tasks": list(TASKS), "url": "http://p:8000"}
DECODE = {"name": "decode", "role": "decode", "tasks": list(TASKS), "url": "http://d:8000/"}


def written(folder: Path, *workers: dict[str, Any], **changes: Any) -> Path:
    path = folder / "workers.json"
    value = {
        "schema": 1,
        "router": {"host": "0.0.0.0", "port": 8000},
        "workers": list(workers),
        **changes,
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def mistakes(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_external(path, TASKS)
    return str(caught.value)


def test_a_file_says_who_listens_where(tmp_path: Path) -> None:
    found = read_external(written(tmp_path, PREFILL, DECODE), TASKS)
    assert (found.host, found.port) == ("0.0.0.0", 8000)
    assert [one.url for one in found.workers] == ["http://p:8000", "http://d:8000"]
    assert found.workers[0] == Address("prefill", "prefill", frozenset(TASKS), "http://p:8000")


def test_every_mistake_is_named(tmp_path: Path) -> None:
    reader = {**PREFILL, "tasks": ["math", "poems"]}
    message = mistakes(
        written(
            tmp_path,
            reader,
            {**reader, "url": "ftp://p:21"},
            {**reader, "name": "nowhere", "url": "http://"},
            {**reader, "name": "bracket", "url": "http://[::1"},
            {**reader, "name": "port", "url": "http://p:99999"},
        )
    )
    for part in (
        *("no prefill worker for tools", "unknown task poems", "no decode worker"),
        *("two workers are called prefill", "prefill: ftp://p:21 is no http address"),
        *("nowhere: http: is no http address", "bracket: http://[::1 is no http address"),
        "port: http://p:99999 is no http address",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"schema": 2}, "has schema 2; this qsun reads 1"),
        ({"router": {"host": "h"}}, "is not a file of workers"),
        ({"router": {"host": "h", "port": "many"}}, "is not a file of workers"),
        ({"workers": None}, "is not a file of workers"),
        ({"workers": [{"name": "a"}]}, "is not a file of workers"),
        ({"workers": [{**PREFILL, "role": "both"}]}, "role 'both'"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in mistakes(written(tmp_path, PREFILL, DECODE, **changes))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"3", b"\xff\xfe", b"{" * 9])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "workers.json"
    path.write_bytes(text)
    assert "is not a file of workers" in mistakes(path)
    assert "is not a file of workers" in mistakes(tmp_path / "missing.json")


class Names:
    """What host names resolve to, as a cluster's DNS tells it: changed by a test as it goes on."""

    def __init__(self, **hosts: list[str] | Exception) -> None:
        self.hosts = hosts

    def getaddrinfo(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        found = self.hosts[host]
        if isinstance(found, Exception):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]


@asynccontextmanager
async def following(pool: Pool, *entries: Address) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(follow(External("127.0.0.1", 8000, entries), pool))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not met():
            await asyncio.sleep(0.005)


def states(pool: Pool) -> dict[str, str]:
    return {worker.name: worker.state.value for worker in pool}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Two decode workers behind one name, looked up often."""
    made = Names(d=["10.0.0.1", "10.0.0.2"], p=["10.0.1.1"])
    monkeypatch.setattr(external, "RESOLVE_S", 0.01)
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    return made


ENTRY = Address("d", "decode", frozenset(TASKS), "http://d:8000")


def test_a_name_on_this_machine_is_followed() -> None:
    async def run() -> None:
        pool = Pool()
        async with following(pool, Address("d", "decode", frozenset(TASKS), "http://localhost:81")):
            await until(lambda: pool.get("d@127.0.0.1") is not None)
        worker = pool.get("d@127.0.0.1")
        assert worker is not None
        assert worker.address.url == "http://127.0.0.1:81"
        assert worker.address.tasks == set(TASKS)

    asyncio.run(run())


def test_workers_come_and_go_with_their_names(names: Names) -> None:
    async def run() -> None:
        pool = Pool([Address("added", "decode", frozenset(TASKS), "http://10.9.9.9:1")])
        async with following(pool, ENTRY):
            await until(lambda: len(states(pool)) == 3)
            gone = pool.get("d@10.0.0.1")
            assert gone is not None
            names.hosts["d"] = ["10.0.0.2", "10.0.0.3"]
            await until(lambda: gone.state is State.DRAINING)
            await until(lambda: pool.get("d@10.0.0.3") is not None)
            # What an administrator added is no name's, and stays.
            assert states(pool) == {
                "added": "joining",
                "d@10.0.0.1": "draining",
                "d@10.0.0.2": "joining",
                "d@10.0.0.3": "joining",
            }
            # It comes back as a new worker, once the old one has ended what it had begun.
            names.hosts["d"] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
            await asyncio.sleep(0.05)
            assert states(pool)["d@10.0.0.1"] == "draining"
            pool.remove(gone)
            await until(lambda: states(pool).get("d@10.0.0.1") == "joining")

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(-3, "Temporary failure in name resolution"),
        UnicodeError("encoding with 'idna' codec failed"),
    ],
)
def test_a_name_that_fails_to_resolve_costs_no_worker(names: Names, error: Exception) -> None:
    async def run() -> None:
        pool = Pool()
        other = Address("p", "prefill", frozenset(TASKS), "http://p:8000")
        async with following(pool, ENTRY, other) as task:
            await until(lambda: len(states(pool)) == 3)
            names.hosts["d"], names.hosts["p"] = error, ["10.0.1.2"]
            await until(lambda: pool.get("p@10.0.1.2") is not None)
            assert not task.done()
            assert states(pool) == {
                "d@10.0.0.1": "joining",
                "d@10.0.0.2": "joining",
                "p@10.0.1.1": "draining",
                "p@10.0.1.2": "joining",
            }

    asyncio.run(run())


def test_an_address_of_the_newer_kind_has_brackets(names: Names) -> None:
    async def run() -> None:
        pool = Pool()
        names.hosts["d"] = ["fd00::1"]
        async with following(pool, ENTRY):
            await until(lambda: pool.get("d@fd00::1") is not None)
        assert [worker.address.url for worker in pool] == ["http://[fd00::1]:8000"]

    asyncio.run(run())


def test_one_address_twice_is_one_worker(names: Names) -> None:
    async def run() -> None:
        pool = Pool()
        names.hosts["d"] = ["10.0.0.1", "10.0.0.1"]
        async with following(pool, ENTRY):
            await until(lambda: len(states(pool)) == 1)
            await asyncio.sleep(0.05)
            assert list(states(pool)) == ["d@10.0.0.1"]

    asyncio.run(run())
