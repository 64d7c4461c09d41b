"""Servers on one device: who is there, who died, and who gives how much."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from sglang_vtensor import neighbours
from sglang_vtensor.neighbours import Neighbours, NoNeighbours, Record, _shares, allowed
from sglang_vtensor.vmm.cuda import identity_of

OTHER = """
import os, sys
from pathlib import Path
from sglang_vtensor import neighbours
from sglang_vtensor.neighbours import Neighbours, Record
neighbours.LIST_SECONDS = 0.0
there = Neighbours("gpu", Path(sys.argv[1]))
there.tell(Record(backed=int(sys.argv[2]), wanted=7))
print("told as process", os.getpid(), flush=True)
for line in sys.stdin:
    print(sorted(other.backed for other in there.others()), flush=True)
there.close()
"""


def start_other(folder, backed, *, before=()):
    """Another server, in a process of its own, that answers each line with what it sees of the others."""
    command = [*before, sys.executable, "-c", OTHER, str(folder), str(backed)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "LIST_SECONDS", 0.0)
    return tmp_path / "shared"


def test_they_hear_each_other_and_nobody_else(folder):
    one, two, elsewhere = (Neighbours(device, folder) for device in ("gpu", "gpu", "gpu-2"))
    assert one.others() == [Record()]
    two.tell(Record(backed=5, idle=4, cached=3, minimum=2, wanted=1))
    assert one.others() == [Record(5, 4, 3, 2, 1)]
    assert two.others() == [Record()]
    assert elsewhere.others() == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    two.close()
    assert one.others() == []
    one.close()
    elsewhere.close()
    assert list(folder.iterdir()) == []


def test_a_killed_one_leaves_nothing(folder):
    one = Neighbours("gpu", folder)
    other = start_other(folder, 70)
    try:
        assert other.stdout.readline() == f"told as process {other.pid}\n"
        assert one.others() == [Record(backed=70, wanted=7)]
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert one.others() == []
        assert len(list(folder.iterdir())) == 1, "its file is removed"
    finally:
        other.kill()
        one.close()


#: Each container counts its processes from 1.
CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
HAS_NAMESPACES = subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine does not let processes make namespaces")
def test_two_containers_with_one_folder(folder):
    """The same numbers of processes in both: neither takes the other's place, when it comes nor when it goes."""
    here = Neighbours("gpu", folder)
    two = [start_other(folder, backed, before=CONTAINER) for backed in (10, 20)]
    try:
        assert [other.stdout.readline() for other in two] == ["told as process 1\n"] * 2
        here.tell(Record(backed=1))
        assert sorted(other.backed for other in here.others()) == [10, 20]
        for other, sees in zip(two, ([1, 20], [1, 10]), strict=True):
            print("look", file=other.stdin, flush=True)
            assert other.stdout.readline() == f"{sees}\n"
        two[0].stdin.close()
        assert two[0].wait(20) == 0
        assert [other.backed for other in here.others()] == [20]
        print("look", file=two[1].stdin, flush=True)
        assert two[1].stdout.readline() == "[1]\n"
    finally:
        for other in two:
            other.stdin.close()
            other.wait(20)
    assert here.others() == []
    here.close()
    assert list(folder.iterdir()) == []


FULL = """
import os
import sys
from pathlib import Path
from sglang_vtensor import neighbours
from sglang_vtensor.neighbours import Neighbours, NoNeighbours, Record
neighbours.LIST_SECONDS = 0.0
root, when = Path(sys.argv[1]), sys.argv[2]
folder = root / "shared"
folder.mkdir(mode=0o700)
if when != "starting":
    server = Neighbours("gpu", folder)
    os.truncate(server._path, 0) if when == "cut off" else server._path.unlink()
with (root / "rest").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
if when == "cut off":
    server.tell(Record(1))
elif when == "removed":
    assert server.others() == []
else:
    try:
        Neighbours("gpu", folder)
    except NoNeighbours as error:
        print(error)
assert len(list(folder.iterdir())) == (when == "cut off")
(root / "rest").unlink()
if when != "starting":
    server.others()
    server.tell(Record(2))
    (path,) = folder.iterdir()
    assert path.stat().st_size == neighbours._SIZE
"""


@pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine does not let processes make namespaces")
@pytest.mark.parametrize("when", ["starting", "removed", "cut off"])
def test_full_shared_memory_ends_no_server(tmp_path, when):
    """Containers have 64 MiB of it by default."""
    mount = 'mount -t tmpfs -o size=64k none "$0" && exec "$1" -c "$2" "$0" "$3"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    done = subprocess.run(
        [*command, str(tmp_path), sys.executable, FULL, when], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert "No space left on device" in said
    assert ("other servers on this device do not know of this one" in said) == (when == "removed")
    assert ("other servers on this device are told nothing" in said) == (when == "cut off")


def test_a_file_that_is_being_made_is_none_yet_and_of_no_other_version(folder, caplog):
    one = Neighbours("gpu", folder)
    with (folder / f"gpu.{'0' * 32}").open("wb", buffering=0) as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        for size in (0, 8, 56):
            made.truncate(size)
            assert one.others() == []
        made.write(struct.pack("<11q", neighbours.MAGIC, neighbours.VERSION, *range(9)))
        assert one.others() == [Record(1, 2, 3, 4, 5, 6, 7, 8)]
    assert not caplog.records
    one.close()


def test_a_file_that_is_cut_off_tells_nothing_until_its_owner_writes(folder):
    one, two = Neighbours("gpu", folder), Neighbours("gpu", folder)
    two.tell(Record(backed=5))
    assert one.others() == [Record(backed=5)]
    os.truncate(two._path, 0)
    assert one.others() == one.others() == []
    two.tell(Record(backed=6))
    assert one.others() == [Record(backed=6)]
    two.close()
    one.close()


def test_who_has_told_nothing_for_long_wants_nothing_and_gives_nothing(folder, monkeypatch):
    """It is paused, in a call that does not return, or stopped: nobody is to wait for it, or to count on it."""
    now = 1000.0
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now)
    one, other = Neighbours("gpu", folder), Neighbours("gpu", folder)
    hungry = Record(50, cached=10, wanted=20, alone=60, since=7)
    other.tell(hungry)
    assert one.others() == [hungry]
    now += 1.9
    other.tell(hungry)
    assert one.others() == [hungry]
    now += 1.9
    assert one.others() == [hungry]
    now += 0.2
    (stopped,) = one.others()
    assert (stopped.wanted, stopped.alone, stopped.least) == (0, 0, 50), "what it holds it holds"
    taker = Record(10, wanted=20)
    assert allowed(taker, [stopped, taker], 5) == 12, "its half of what they hold and of what is free, and no more"
    assert allowed(stopped, [taker], 5) == 50
    other.tell(hungry)
    assert one.others() == [hungry]
    one.close()
    other.close()


@pytest.mark.parametrize("which", ["the folder", "the file"])
def test_who_can_open_no_more_files_keeps_the_neighbours_that_it_knows(folder, caplog, monkeypatch, which):
    monkeypatch.setattr(neighbours, "STALE_SECONDS", float("inf"))
    one, two = Neighbours("gpu", folder), Neighbours("gpu", folder)
    assert one.others() == [Record()]

    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        if which == "the folder":
            patched.setattr(Path, "iterdir", refuse)
        else:
            patched.setattr(neighbours.os, "open", refuse)
        two.tell(Record(backed=5))
        assert one.others() == one.others() == [Record(backed=5)]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "one warning"
    assert "cannot look for other servers on this device; known ones still count: [Errno 24]" in caplog.text
    two.close()
    assert one.others() == []
    one.close()
    assert list(folder.iterdir()) == []


def test_a_child_that_outlives_its_server_keeps_nothing(folder):
    """A forked child has its parent's descriptors, and `flock` lasts until the last of them is closed."""
    code = """
import os, sys, time
from pathlib import Path
from sglang_vtensor.neighbours import Neighbours
server = Neighbours("gpu", Path(sys.argv[1]))
if os.fork() == 0:
    server.close()  # as at exit: the file is its parent's
    print("forked", flush=True)
    time.sleep(60)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(folder)]
    one = Neighbours("gpu", folder)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as parent:
        try:
            assert parent.stdout.readline() == b"forked\n"
            assert one.others() == [Record()], "the child closes, and the parent is there"
            parent.kill()
            parent.wait()
            os.killpg(parent.pid, 0)  # the child lives
            assert one.others() == []
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
    one.close()
    assert list(folder.iterdir()) == []


def test_a_file_that_somebody_removes_is_made_again(folder, caplog):
    one, two = Neighbours("gpu", folder), Neighbours("gpu", folder)
    one.tell(Record(backed=5, wanted=1))
    for path in folder.iterdir():
        path.unlink()
    one.others()
    assert two.others() == [Record(backed=5, wanted=1)]
    assert one.others() == [Record()]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("no folder")
    assert one.others() == []
    assert one.others() == []
    assert [record.levelname for record in caplog.records] == ["WARNING"], "one warning"
    assert "was removed, and other servers on this device do not know of this one" in caplog.text
    folder.unlink()
    one.others()
    two.others()
    assert one.others() == [Record()]
    assert two.others() == [Record(backed=5, wanted=1)]
    one.close()
    two.close()
    assert list(folder.iterdir()) == []


def test_what_the_dead_left_is_removed_whatever_device_they_were_on(folder):
    other = start_other(folder, 70)
    assert other.stdout.readline().startswith("told")
    living = Neighbours("gpu-3", folder)
    other.kill()
    other.wait()
    assert len(list(folder.iterdir())) == 2
    come = Neighbours("gpu-2", folder)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"gpu-2", "gpu-3"}
    come.close()
    living.close()


def test_of_two_that_find_a_dead_ones_file_one_removes_it(folder):
    """Whoever has its lock: the other one must not remove what may be somebody's by then."""
    one = Neighbours("gpu", folder)
    stale = folder / "gpu.0"
    stale.write_bytes(b"x" * 56)
    with stale.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        one.others()
        assert stale.exists()
    one.others()
    assert not stale.exists()
    one.close()


def test_slices_of_one_gpu_are_told_apart():
    """In MIG mode the driver answers with the slice's UUID; each slice has memory of its own."""
    codes = SimpleNamespace(CUDA_SUCCESS=0)
    uuids = [bytes(range(16)), bytes(range(1, 17))]
    driver = SimpleNamespace(
        CUresult=codes,
        cuDeviceGet=lambda index: (0, index),
        cuDeviceGetUuid=lambda device: (0, SimpleNamespace(bytes=uuids[device])),
    )
    names = [identity_of(driver, index) for index in range(2)]
    assert names == ["cuda-00010203-0405-0607-0809-0a0b0c0d0e0f", "cuda-01020304-0506-0708-090a-0b0c0d0e0f10"]


def test_stale_and_strange_files_are_no_neighbours(folder, caplog):
    one = Neighbours("gpu", folder)
    stale = folder / "gpu.1.0"
    stale.write_bytes(struct.pack("<11q", neighbours.MAGIC, neighbours.VERSION, *range(9)))
    (folder / "gpu.link").symlink_to("/etc/passwd")
    assert one.others() == []
    assert not stale.exists()
    newer = Neighbours("gpu", folder)
    os.pwrite(newer._file, struct.pack("<q", neighbours.VERSION + 1), 8)
    assert one.others() == []
    assert one.others() == []
    assert [r.levelname for r in caplog.records] == ["WARNING"], "one warning"
    assert "in version 3, this one in 2" in caplog.text
    newer.close()
    one.close()


def test_one_that_is_being_made_is_left_alone(folder):
    one = Neighbours("gpu", folder)
    (folder / "gpu.1.0").touch()
    assert one.others() == []
    assert (folder / "gpu.1.0").exists()
    old = time.time() - 100
    os.utime(folder / "gpu.1.0", (old, old))
    assert one.others() == []
    assert not (folder / "gpu.1.0").exists(), "nobody takes a minute for that"
    one.close()


def test_a_folder_that_others_may_enter_is_refused(folder):
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(NoNeighbours, match=r"with mode 755: a folder of user \d+ with mode 700 wanted; remove it"):
        Neighbours("gpu", folder)


def test_a_folder_that_cannot_be_made_is_refused(folder):
    folder.write_text("a file")
    with pytest.raises(NoNeighbours, match="cannot make"):
        Neighbours("gpu", folder)


def test_idle_memory_goes_first_and_in_proportion():
    rich, poor, hungry = Record(100, idle=30, cached=60), Record(50, idle=10, cached=40), Record(20, wanted=20)
    assert allowed(rich, [poor, hungry], 0) == 85
    assert allowed(poor, [rich, hungry], 0) == 45
    assert allowed(hungry, [rich, poor], 0) is None
    assert allowed(hungry, [rich, Record(60, wanted=5)], 0) == 40, "there is enough for both"
    assert allowed(Record(100, idle=20, cached=30, wanted=1), [hungry], 0) == 80, "what is beyond a share is given"
    assert allowed(rich, [poor], 0) is None
    assert allowed(rich, [poor, hungry], 20) == 100, "the device has what is wanted"


def test_what_is_cached_goes_down_to_the_minimum():
    mine, hungry = Record(100, idle=10, cached=70, minimum=40), Record(20, wanted=1000)
    assert allowed(mine, [hungry], 0) == 40
    assert allowed(Record(100, idle=10, cached=30, minimum=40), [hungry], 0) == 60, "what is live stays"


def test_two_that_want_something_do_not_leave_it_to_each_other():
    one, other = Record(5, wanted=8), Record(4, wanted=10)
    assert allowed(one, [other], 61) >= 5 + 8
    assert allowed(other, [one], 61) >= 4 + 10
    assert allowed(one, [other], 9) == allowed(other, [one], 9) == 9, "an equal share, where it is not enough for both"


def test_shares_are_of_those_that_want_something():
    """Who sleeps, or wants little, leaves its share to the others."""
    one, other, asleep, modest = Record(20, wanted=500), Record(10, wanted=500), Record(1), Record(5, wanted=5)
    assert allowed(one, [other, asleep, asleep], 70) == allowed(other, [one, asleep, asleep], 70) == 50
    assert allowed(one, [other, modest], 65) == allowed(other, [one, modest], 65) == 45
    assert allowed(modest, [one, other], 65) == 10


def test_a_request_that_needs_more_than_a_share_comes_first_when_it_has_waited_longest():
    one = Record(35, cached=35, minimum=2, wanted=20, alone=45, since=7)
    other = Record(35, cached=35, minimum=2, wanted=20, alone=45, since=8)
    assert allowed(one, [other], 0) == 45
    assert allowed(other, [one], 0) == 25, "it has its turn next"
    busy = Record(35, cached=5, minimum=2, wanted=20)
    assert allowed(one, [busy], 0) == 45
    assert allowed(busy, [one], 0) == 30, "what it runs comes to its end"
    assert _shares(
        [Record(24, cached=24, wanted=9, alone=90), Record(24, cached=24, wanted=9, alone=33, since=5)], 48
    ) == [15, 33]
    huge = Record(35, cached=35, minimum=2, wanted=40, alone=69, since=1)
    assert allowed(huge, [busy], 0) == allowed(busy, [huge], 0) == 35, "the minimum of the other one is in its way"
    assert allowed(Record(35, cached=35, wanted=40, alone=68, since=1), [busy], 0) == 68


def test_a_server_that_comes_up_has_a_turn_as_a_request_has():
    """It needs more than an equal share, and cannot do with less. Whoever waited before it has its turn first."""
    arriving = Record(wanted=40, alone=40, since=7)
    busy = [Record(47, idle=40, minimum=5, wanted=20, alone=30, since=8), Record(48, idle=40, minimum=5, wanted=20)]
    assert 95 - sum(allowed(one, [other, arriving], 0) for one, other in (busy, busy[::-1])) in (40, 41)
    late = replace(arriving, since=9)
    assert 95 - sum(allowed(one, [other, late], 0) for one, other in (busy, busy[::-1])) < 40
    running = [replace(one, idle=5) for one in busy]
    assert allowed(running[0], [running[1], arriving], 0) == 42, "what runs comes to its end"


amounts = st.integers(0, 1000)


@st.composite
def records(draw):
    live, idle, cached = draw(amounts), draw(amounts), draw(amounts)
    backed, wanted = live + idle + cached, draw(st.sampled_from([0, 0, 5, 300, 5000]))
    alone = draw(st.sampled_from([0, 0, 30, backed, backed + wanted, 2000]))
    wanted = max(wanted, alone - backed)
    return Record(backed, idle, cached, draw(st.integers(0, 500)), wanted, alone, draw(st.integers(0, 3)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(records(), min_size=2, max_size=5), st.integers(0, 500))
def test_what_is_wanted_is_given_and_shared(all_of_them, free):
    """Each computes what it may hold by itself, and together that is what there is."""
    held = {n: allowed(mine, all_of_them[:n] + all_of_them[n + 1 :], free) for n, mine in enumerate(all_of_them)}
    needs = {n: one.backed + one.wanted for n, one in enumerate(all_of_them)}
    takers = [n for n, one in enumerate(all_of_them) if one.wanted]
    givers = [n for n in held if n not in takers]
    if not takers:
        assert set(held.values()) == {None}
        return
    wanted = sum(all_of_them[n].wanted for n in takers)
    possible = sum(all_of_them[n].backed - all_of_them[n].least for n in givers)
    given_up = min(max(0, wanted - free), possible)
    for n in givers:
        assert held[n] >= all_of_them[n].least, "what is live, and the minimum, is not asked for"
        assert held[n] <= all_of_them[n].backed + max(0, free - wanted)
    got = sum(max(0, all_of_them[n].backed - held[n]) for n in givers)
    assert given_up <= got <= given_up + 2 * len(givers), "what is missing, and portions are rounded up"
    if len(takers) == 1:
        assert held[takers[0]] is None, "nobody else wants anything"
        return
    there = free + given_up + sum(all_of_them[n].backed for n in takers)
    least = {n: all_of_them[n].least for n in takers}
    assert all(held[n] >= least[n] for n in takers)
    waiting = sorted((all_of_them[n].since, all_of_them[n].alone, n) for n in takers if all_of_them[n].alone)
    if sum(needs[n] for n in takers) <= there:
        assert all(held[n] >= needs[n] for n in takers)
    elif not waiting:
        assert there - len(takers) < sum(held[n] for n in takers) <= there, "nothing is left over, or promised twice"
        share = max([held[n] for n in takers if held[n] > least[n]], default=0)
        assert all(held[n] >= min(share, needs[n]) for n in takers), "and shares are equal"
    else:
        kept = [min(one.minimum, one.backed) for one in all_of_them]
        most = free + sum(one.backed for one in all_of_them) - sum(kept)
        able = [(since, alone, n) for since, alone, n in waiting if alone <= most + kept[n]]
        if able and able[0][:2] not in [pair[:2] for pair in able[1:]]:
            _, alone, first = able[0]
            assert held[first] >= alone, "whoever of those that can have a turn came first has it"


def test_nobody_begins_while_a_turn_waits_for_what_is_live_elsewhere():
    """A byte that a busy neighbour wants or not makes no difference to who waited longest."""
    large, small = Record(wanted=70, alone=70, since=1), Record(5, wanted=40, alone=10, since=2)
    for wanted in (0, 1):
        busy = Record(50, minimum=5, wanted=wanted)
        assert allowed(large, [small, busy], 45) == 70
        assert allowed(small, [large, busy], 45) == 5
        assert allowed(busy, [large, small], 45) == 50, "what it runs comes to its end"
    served = Record(70, minimum=5, alone=70, since=1)
    others = [Record(10, cached=10, minimum=2, wanted=10) for _ in range(2)]
    assert allowed(others[0], [others[1], served], 10) == 15, "who has what its turn is for holds nobody up"
    rich = Record(60, cached=40, minimum=50, alone=25, since=1)
    assert allowed(rich, [Record(40, wanted=3)], 0) == 57, "nor does it lose what nobody wants"
    greedy = replace(rich, wanted=1)
    assert allowed(greedy, [Record(40, minimum=5, wanted=3)], 0) >= 50, "and never goes below its minimum"
    hung = Record(50, minimum=50)
    assert allowed(small, [large, hung], 45) > 10, "what one that stands still has will never be there"


@pytest.mark.parametrize(("large", "clients", "small"), [(85, 8, 5), (70, 16, 2)])
def test_a_large_request_has_its_turn_beside_busy_servers(large, clients, small):
    """Two servers have many clients, which ask again soon after they are answered; a third one asks for most of 100
    units, one request at a time. An answer takes ten seconds."""
    rng = random.Random(0)
    servers = [Simulated(large, 1, rng), *(Simulated(small, clients, rng) for _ in range(2))]
    run(servers, 300)
    assert servers[0].begun > 5, servers[0].begun
    assert all(server.begun > 100 for server in servers[1:])
    assert max(server.longest for server in servers) < 45


def test_a_large_request_that_runs_holds_nobody_up():
    """Its answer takes a minute, and those of the others five seconds. There is room for all."""
    rng = random.Random(0)
    servers = [Simulated(60, 1, rng, 60), *(Simulated(5, 6, rng, 5) for _ in range(2))]
    run(servers, 300)
    assert servers[0].begun >= 4
    assert all(server.begun > 200 for server in servers[1:]), [server.begun for server in servers]
    assert max(server.longest for server in servers) < 12


def run(servers, seconds):
    """In steps of 25 ms. Each server looks at the others every 50 ms."""
    told: dict[Simulated, Record] = {}
    for step in range(seconds * 40):
        now = step / 40
        for server in servers:
            server.hear(now)
            if step % 2 == 0:
                told[server] = server.record(now)
                others = [told[other] for other in told if other is not server]
                server.obey(now, allowed(told[server], others, 100 - sum(one.backed for one in servers)))
            server.begin(now, 100 - sum(one.backed for one in servers))


class Simulated:
    """A server as `srt.elastic` is one, whose clients need so much each, for answers of about so many seconds. What it
    computed is cached."""

    def __init__(self, need, clients, rng, lasts=10):
        self.need, self.rng, self.lasts = need, rng, lasts
        self.coming = [3 * rng.random() for _ in range(clients)]
        self.waiting, self.ends = [], []
        self.cached = self.begun = self.since = 0
        self.longest = self.calm_at = 0.0
        self.pressure = self.first = None
        self.short = False

    @property
    def backed(self):
        return self.need * len(self.ends) + self.cached

    def hear(self, now):
        for end in [end for end in self.ends if end <= now]:
            self.ends.remove(end)
            self.cached += self.need
            self.coming.append(now + 0.02 * self.rng.uniform(0.5, 1.5))
        self.waiting += [at for at in self.coming if at <= now]
        self.coming = [at for at in self.coming if at > now]

    def record(self, now):
        """It wants what waits, after it found no room or while its neighbours want something. The one request that
        runs, or the next one, has a turn if nothing else runs."""
        if not self.short and self.pressure is None:
            return Record(self.backed, cached=self.cached, minimum=5)
        first = None if len(self.ends) > 1 else [*self.ends, *self.waiting, None][0]
        if first != self.first:
            self.first, self.since = first, int(1e6 * now)
        alone = 0 if first is None else self.need
        wanted = max(0, self.need * len(self.waiting) - self.cached, alone - self.backed)
        return Record(self.backed, 0, self.cached, 5, wanted, alone, self.since)

    def obey(self, now, holds):
        if holds is not None:
            self.pressure, self.calm_at = holds, now + 1.0
        elif now >= self.calm_at:
            self.pressure = None
        if self.pressure is not None:
            self.cached -= min(self.cached, max(0, self.backed - self.pressure))

    def begin(self, now, free):
        while self.waiting:
            most = 100 if self.pressure is None else self.pressure
            fits = self.need <= free + self.cached
            self.short = not fits
            if not fits or self.need * (len(self.ends) + 1) > most:
                break
            free -= self.need - min(self.cached, self.need)
            self.cached -= min(self.cached, self.need)
            self.longest = max(self.longest, now - self.waiting.pop(0))
            self.ends.append(now + self.lasts * self.rng.uniform(0.8, 1.2))
            self.begun += 1
