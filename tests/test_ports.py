"""Ports for servers: free, and never one that an outgoing connection may take."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qsun import ports
from qsun.errors import ServingEnvironmentError
from qsun.ports import LOWEST_PORT, OUTGOING_PORTS, free_ports


def test_ports_are_all_different_and_none_is_for_outgoing_connections() -> None:
    found = free_ports(50)
    assert len(set(found)) == 50
    first = int(OUTGOING_PORTS.read_text().split()[0])
    assert all(LOWEST_PORT <= port < first for port in found)


def test_a_port_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        (port,) = free_ports(1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        monkeypatch.setattr(ports, "LOWEST_PORT", port)
        monkeypatch.setattr(ports, "_first_outgoing_port", lambda: port + 1)
        with pytest.raises(ServingEnvironmentError, match=f"of ports {port} to {port}, 0 are free"):
            free_ports(1)


def test_a_system_that_leaves_servers_no_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "OUTGOING_PORTS", everything)
    assert len(free_ports(3)) == 3
