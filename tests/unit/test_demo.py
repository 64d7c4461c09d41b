"""What the demo does before its server is up."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sglang_vtensor import demo


def test_a_free_port_is_none_that_a_connection_could_take_until_the_server_is_up():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [demo.free_port() for _ in range(50)]
    assert not any(first <= port <= last for port in ports)
    assert len(set(ports)) > 1


def test_a_port_that_somebody_has_is_not_free(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", demo.free_port()))
        others = [demo.free_port(), taken.getsockname()[1]]
        monkeypatch.setattr(demo.random.SystemRandom, "sample", lambda self, ports, count: others[::-1])
        assert demo.free_port() == others[0]
        others = [taken.getsockname()[1]]
        with pytest.raises(RuntimeError, match="has no free port of 10000 and more outside"):
            demo.free_port()
