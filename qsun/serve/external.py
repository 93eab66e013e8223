"""Workers that run elsewhere, from a file that names them; a host name may stand for several."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loguru import logger

from qsun.errors import ConfigError, bullet_list
from qsun.serve.pool import Address, Pool, State

SCHEMA = 1
RESOLVE_S = 5.0


@dataclass(frozen=True)
class External:
    """What `serving/workers.json` says: where the router listens, and where workers are."""

    host: str
    port: int
    workers: tuple[Address, ...]


def read_external(path: Path, tasks: Sequence[str]) -> External:
    """Read a workers' file.

    Raises:
        ConfigError: it cannot be read, or does not serve `tasks`; names every worker that is wrong.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {value['schema']}; this qsun reads {SCHEMA}")
        host, port = str(value["router"]["host"]), int(value["router"]["port"])
        entries = [_address(entry) for entry in value["workers"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a file of workers: {error!r}") from error
    read = {task for one in entries if one.role == "prefill" for task in one.tasks}
    wrong = [f"no prefill worker for {task}" for task in sorted(set(tasks) - read)]
    wrong += [f"unknown task {task}" for task in sorted(read - set(tasks))]
    wrong += [] if any(one.role == "decode" for one in entries) else ["no decode worker"]
    names = [one.name for one in entries]
    wrong += [
        f"two workers are called {name}" for name in sorted(set(names)) if names.count(name) > 1
    ]
    wrong += [
        f"{one.name}: {one.url} is no http address" for one in entries if not _is_http(one.url)
    ]
    if wrong:
        raise ConfigError(f"{path}:\n{bullet_list(wrong)}")
    return External(host, port, tuple(entries))


async def follow(external: External, pool: Pool) -> None:
    """Keep the pool as the names resolve, until cancelled: pods come and go."""
    while True:
        wanted: dict[str, Address] = {}
        for entry in external.workers:
            try:
                wanted |= {one.name: one for one in await _resolved(entry)}
            except (OSError, UnicodeError) as error:  # UnicodeError: no name that could resolve
                logger.warning(f"{entry.name}: {entry.url} does not resolve: {error}")
                # Names that do not resolve just now say nothing of the workers behind them.
                of_entry = f"{entry.name}@"
                wanted |= {one.name: one.address for one in pool if one.name.startswith(of_entry)}
        for worker in pool:
            # Those that an administrator added have no `@` in their names.
            if worker.name not in wanted and "@" in worker.name:
                pool.mark(worker, State.DRAINING, "its name does not resolve to it any more")
        for name, address in wanted.items():
            if pool.get(name) is None and name not in pool.retired:
                pool.add(address)
        await asyncio.sleep(RESOLVE_S)


async def _resolved(entry: Address) -> list[Address]:
    parts = urlsplit(entry.url)
    host, port = parts.hostname or "", parts.port or 80
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = sorted({str(one[4][0]) for one in found})
    return [
        Address(
            f"{entry.name}@{one}",
            entry.role,
            entry.tasks,
            f"{parts.scheme}://{_url_host(one)}:{port}",
        )
        for one in hosts
    ]


def _url_host(host: str) -> str:
    return f"[{host}]" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else host


def _address(entry: dict[str, Any]) -> Address:
    if entry["role"] not in ("prefill", "decode"):
        raise ValueError(f"role {entry['role']!r}")
    return Address(
        str(entry["name"]), entry["role"], frozenset(entry["tasks"]), str(entry["url"]).rstrip("/")
    )


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is none
        return False
