"""What the demo does before its server is up."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_vtensor import demo, real_model
from tests.strange_server import stranger


def test_a_free_port_is_none_that_a_connection_could_take_until_the_server_is_up():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [demo.free_port() for _ in range(50)]
    assert not any(first <= port <= last for port in ports)
    assert len(set(ports)) > 1


def test_a_port_that_another_server_is_to_bind_is_not_given_again(monkeypatch):
    monkeypatch.setattr(demo, "range", lambda *_: [30_001, 30_002], raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: "60001 60002")
    assert demo.free_port({30_001}) == 30_002


def test_a_port_that_somebody_has_is_not_free(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", demo.free_port()))
        others = [demo.free_port(), taken.getsockname()[1]]
        monkeypatch.setattr(demo.random.SystemRandom, "sample", lambda self, ports, count: others[::-1])
        assert demo.free_port() == others[0]
        others = [taken.getsockname()[1]]
        with pytest.raises(RuntimeError, match="has no free port of 10000 and more outside"):
            demo.free_port()


def test_a_port_that_a_connection_just_left_is_not_taken():
    """As with the port of a demo that ended a moment ago: the kernel keeps its connections for a minute."""
    with socket.create_server(("127.0.0.1", demo.free_port())) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as asking:
            listening.accept()[0].close()  # who closes first has the port for that minute
            assert asking.recv(1) == b""
    demo.refuse_taken(port)


def test_another_server_that_answers_is_not_taken_for_one_that_ended(tmp_path):
    (tmp_path / "log").write_text("OSError: address already in use")
    status = SimpleNamespace(update=lambda _: None)

    def it_ends():
        process.stdin.close()
        process.wait()

    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process,
        stranger(it_ends) as (port, asked),
        pytest.raises(demo.NotStarted, match="OSError: address already in use"),
    ):
        demo.wait_until_ready(process, f"http://127.0.0.1:{port}", tmp_path / "log", status)
    assert asked == ["/health_generate"]


@pytest.mark.parametrize("left", [None, "model.safetensors"])
def test_a_folder_without_a_model_is_not_taken_for_one(monkeypatch, tmp_path, left):
    """Such as a volume that is mounted there, or what somebody removed a part of."""

    def convert(module, done, **environment):
        if done == "converted":
            made = Path(module[-1])
            made.mkdir()
            (made / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(real_model, "_run", convert)
    folder = real_model.cached()
    folder.mkdir(parents=True)
    if left is None:
        assert (real_model.fetch() / "config.json").exists()
    else:
        (folder / left).touch()
        with pytest.raises(real_model.NotHad, match=r"could not be kept in .*not empty"):
            real_model.fetch()
