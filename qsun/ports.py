"""Ports of this machine for servers that are about to start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from qsun.errors import ServingEnvironmentError

OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT, HIGHEST_PORT, LEAST_PORTS = 10_000, 65_535, 100


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different.

    They are below those that this system gives to outgoing connections: one of these could be taken
    before its server listens.

    Raises:
        ServingEnvironmentError: there are not so many.
    """
    found: list[int] = []
    with ExitStack() as stack:
        ports = range(LOWEST_PORT, _first_outgoing_port())
        for port in random.SystemRandom().sample(ports, len(ports)):
            if len(found) == count:
                break
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    if len(found) < count:
        raise ServingEnvironmentError(
            f"of ports {ports.start} to {ports.stop - 1}, {len(found)} are free, not {count}"
        )
    return found


def _first_outgoing_port() -> int:
    """The least port that Linux gives to an outgoing connection, if that leaves some to servers."""
    first = int(OUTGOING_PORTS.read_text(encoding="ascii").split()[0])
    return first if first > LOWEST_PORT + LEAST_PORTS else HIGHEST_PORT
