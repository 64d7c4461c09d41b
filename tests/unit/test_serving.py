"""The servers of the benchmarks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.serving import started
from tests.strange_server import stranger
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
#: A benchmark whose server does nothing. It never gets to the end of its block.
BENCHMARK = """
import os, pathlib, sys, time
from benchmarks.serving import started

log = pathlib.Path(sys.argv[1])
server = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
with started("server", server, "http://127.0.0.1:1", log, dict(os.environ)):
    time.sleep(600)
"""


def test_a_server_ends_with_a_benchmark_that_is_killed(tmp_path):
    log, command = tmp_path / "log", [sys.executable, "-c", BENCHMARK, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as benchmark:
        try:
            wait_for(lambda: log.exists() and log.read_text().endswith("\n"))  # it imports torch
            server = psutil.Process(int(log.read_text()))
            assert server.is_running()
        finally:
            benchmark.send_signal(signal.SIGKILL)
    try:
        wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    finally:
        if server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            server.kill()


def test_another_server_that_answers_is_not_taken_for_one_that_ended(tmp_path):
    until = tmp_path / "fifo"
    os.mkfifo(until)
    command = ["sh", "-c", f"echo address already in use; read until < {until}"]

    def it_ends():
        (ours,) = (child for child in psutil.Process().children() if str(until) in " ".join(child.cmdline()))
        until.write_text("now\n")
        wait_for(lambda: ours.status() == psutil.STATUS_ZOMBIE)

    with (
        stranger(it_ends) as (port, asked),
        started("ours", command, f"http://127.0.0.1:{port}", tmp_path / "log", dict(os.environ)) as wait,
        pytest.raises(RuntimeError, match="ours did not start:\naddress already in use"),
    ):
        wait()
    assert asked == ["/health_generate"]
