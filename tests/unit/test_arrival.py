"""A server that comes up beside others: what it asks them for, and until when."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from sglang_vtensor import arrival as arrival_module
from sglang_vtensor.arrival import Arrival, weights_bytes
from sglang_vtensor.neighbours import Neighbours, Record, allowed
from sglang_vtensor.srt import arriving
from tests.waiting import wait_for


class Clock:
    """Time that goes on as somebody sleeps. Meanwhile the others act: each of `acts` once."""

    def __init__(self):
        self.now, self.acts = 1000.0, []

    def monotonic(self):
        return self.now

    def monotonic_ns(self):
        return int(self.now * 1e9)

    def sleep(self, seconds):
        self.now += seconds
        for act in self.acts:
            act()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(arrival_module, "time", clock)
    monkeypatch.setattr("sglang_vtensor.neighbours.LIST_SECONDS", 0.0)
    return clock


class Device:
    """Of 100 bytes. Another server holds 90, of which 60 are cached, and gives what it is asked for, a byte at a time;
    the server that comes up has taken `taken`."""

    def __init__(self, folder):
        self.backed, self.cached, self.taken = 90, 60, 0
        self.neighbours = Neighbours("gpu", folder)
        self.seen = []  # what the others told last

    def free(self):
        return 100 - self.backed - self.taken

    def serve(self):
        record = Record(self.backed, cached=self.cached)
        self.neighbours.tell(record)
        self.seen = self.neighbours.others()
        holds = allowed(record, self.seen, self.free())
        if holds is not None and holds < self.backed:
            self.backed -= 1
            self.cached -= 1


@pytest.fixture
def device(tmp_path, clock):
    device = Device(tmp_path / "shared")
    device.serve()
    clock.acts.append(device.serve)
    yield device
    device.neighbours.close()


@pytest.fixture
def arrive(tmp_path, clock, monkeypatch):
    """`arrive(needed, held=..., free=...)`: a server that comes up, and tells of itself as time goes on."""
    monkeypatch.setattr(Arrival, "_keep_telling", lambda arrival: None)

    def arrive(needed, **is_there):
        arrival = Arrival(Neighbours("gpu", tmp_path / "shared"), needed, **is_there)
        clock.acts.insert(0, arrival._tell)
        return arrival

    return arrive


def test_others_give_what_they_have_cached_until_there_is_room(device, arrive, clock):
    arrival = arrive(50, held=lambda: device.taken, free=device.free)
    assert arrival.wait()
    assert 50 <= device.free() <= 52
    assert arrival.others_hold() >= device.backed
    device.taken = 30
    clock.sleep(0.1)
    assert (device.seen[0].wanted, device.seen[0].alone) == (20, 20), "it can do with nothing less"
    clock.sleep(arrival_module.ANSWER_SECONDS - 0.2)
    assert device.seen[0].alone == 20
    clock.sleep(0.2)
    assert (device.seen[0].wanted, device.seen[0].alone) == (20, 0), "it has taken no more for long"
    device.taken = 40
    clock.sleep(0.1)
    assert device.seen[0].alone == 10
    clock.acts.remove(arrival._tell)
    arrival.over()
    clock.sleep(0.1)
    assert not device.seen


def test_it_goes_on_telling_while_it_reads_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(arrival_module, "TELL_SECONDS", 0.01)
    other, taken = Neighbours("gpu", tmp_path / "shared"), [0]
    arrival = Arrival(Neighbours("gpu", tmp_path / "shared"), 50, held=lambda: taken[0], free=lambda: 100)
    taken[0] = 20
    wait_for(lambda: [told.wanted for told in other.others()] == [30])
    arrival.over()
    wait_for(lambda: not other.others())
    other.close()


def test_where_no_more_comes_it_goes_on_and_says_so(device, arrive, caplog):
    arrival = arrive(80, held=lambda: device.taken, free=device.free)
    assert not arrival.wait()
    assert device.free() == 70, "all that was cached"
    assert "need 80 bytes of this device, 70 are free, and the other servers on it give no more" in caplog.text
    arrival.over()


def test_requests_of_the_others_come_to_their_end_first(device, arrive, clock, caplog):
    caplog.set_level("INFO")
    device.cached = 0
    arrival = arrive(50, held=lambda: device.taken, free=device.free)
    end = clock.now + arrival_module.ANSWER_SECONDS - 1
    clock.acts.append(lambda: clock.now >= end and not device.cached and setattr(device, "cached", device.backed))
    assert arrival.wait()
    assert "waiting until requests of other servers on this device end: 50 bytes wanted" in caplog.text
    arrival.over()


def test_alone_on_a_device_it_does_not_wait(tmp_path, caplog):
    """Whatever it is that has the memory: nobody is there to give any."""
    arrival = Arrival(Neighbours("gpu", tmp_path / "shared"), 50, held=lambda: 0, free=lambda: 1 / 0)
    arrival.wait()
    assert not caplog.records
    arrival.over()


def test_the_files_of_one_kind_are_read(tmp_path):
    for name, size in {"a-1.safetensors": 30, "a-2.safetensors": 20, "a.bin": 45, "tokenizer.json": 99}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_bytes(tmp_path) == 50
    assert weights_bytes(tmp_path / "a.bin") == 45
    assert weights_bytes("some/model") == 0
    (tmp_path / "b.safetensors").symlink_to("nowhere")
    assert weights_bytes(tmp_path) == 50, "of a cache that was cleared in part"


def test_who_comes_later_hears_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_vtensor.neighbours.default_folder", lambda: tmp_path / "shared")
    monkeypatch.setenv("VTENSOR_HOST_DEVICE", "gpu")
    settings = SimpleNamespace(tp_size=1, pp_size=1, device="cpu", model_path=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(5000))
    arrival = arriving.arrive(settings, 0)
    other = Neighbours("gpu", tmp_path / "shared")
    (told,) = other.others()
    assert told == Record(wanted=1000, alone=1000, since=told.since)
    arrival.over()
    settings.tp_size = 2
    assert arriving.arrive(settings, 0) is None, "ranks would need to agree"
    monkeypatch.delenv("VTENSOR_HOST_DEVICE")
    settings.tp_size = 1
    assert arriving.arrive(settings, 0) is None, "this device is nobody else's"
    other.close()


def test_of_two_that_come_up_the_later_one_has_what_the_first_one_leaves(arrive, clock, caplog):
    million, loading = 10**6, itertools.count()  # the first one takes a little more at each look
    free = [30 * million]
    first = arrive(22 * million, held=lambda: next(loading), free=lambda: free[0])
    clock.now += 0.001
    second = arrive(22 * million, held=lambda: 0, free=lambda: free[0])
    assert first.wait()
    assert not second.wait()
    assert "22000000 bytes of this device, 30000000 are free, and the other servers on it have waited for these" in (
        caplog.text
    )
    assert not second._record().alone
    free[0] = 45 * million
    assert second.wait(), "there is enough for both"
    first.over()
    second.over()


def test_memory_that_comes_is_waited_for_also_where_there_was_more_before(tmp_path, arrive, clock, monkeypatch):
    monkeypatch.setattr(arrival_module, "ANSWER_SECONDS", 1.0)
    other = Neighbours("gpu", tmp_path / "shared")
    other.tell(Record(60, cached=60))
    looks = itertools.chain([19], (10 + n // 8 for n in itertools.count()))
    arrival = arrive(20, held=lambda: 0, free=lambda: next(looks))
    begun = clock.now
    assert arrival.wait()
    assert clock.now - begun == pytest.approx(8.1), "it came bit by bit"
    monkeypatch.setattr(arrival_module, "MOST_SECONDS", 0.0)
    looks = itertools.chain([19], (10 + n // 8 for n in itertools.count()))
    assert not arrival.wait(), "but not for ever"
    assert not arrival._record().alone, "its turn is over"
    arrival.over()
    other.close()


def test_a_neighbour_that_is_in_a_long_batch_is_waited_for(tmp_path, arrive, clock, monkeypatch):
    monkeypatch.setattr("sglang_vtensor.neighbours.STALE_SECONDS", -1.0)  # what it tells is old at once
    busy = Neighbours("gpu", tmp_path / "shared")
    busy.tell(Record(60, cached=60))
    end = clock.now + arrival_module.ANSWER_SECONDS - 1
    arrival = arrive(22, held=lambda: 0, free=lambda: 30 if clock.now >= end else 5)
    assert arrival.wait()
    arrival.over()
    busy.close()


def test_who_reads_weights_may_be_silent_longer(tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_vtensor.neighbours.STALE_SECONDS", float("inf"))
    arriving, serving, other = (Neighbours("gpu", tmp_path / "shared") for _ in range(3))
    arriving.tell(Record(wanted=22, alone=22, since=1))
    serving.tell(Record(50, wanted=9))
    assert sorted(one.wanted for one in other.others()) == [9, 22]
    monkeypatch.setattr("sglang_vtensor.neighbours.STALE_SECONDS", -1.0)  # what they told is old
    assert sorted(one.wanted for one in other.others()) == [0, 22]
    for one in (arriving, serving, other):
        one.close()
