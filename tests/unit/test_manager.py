import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import zmq

from sglang_vtensor import manager
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
from sglang_vtensor.segments import SegmentState
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.waiting import wait_for

LAYOUT = KVLayout(2, 1, 32, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)


def make(vmm=None, **kwargs):
    defaults = {"capacity_pages": 16, "max_tokens": 64, "max_running": 4, "worker": False}
    return KVMemory(vmm or FaultyVirtualMemory(), LAYOUT, **(defaults | kwargs))


def test_what_is_written_by_slot_is_read_by_segment():
    memory = make()
    pages = memory.allocate(3)
    segment = memory.lease(None, pages[::-1])
    for layer in range(2):
        k, v = memory.identity_views(layer)
        ks, vs = memory.segment_views(layer)
        assert ks.shape == (memory.segments.num_segments, 64, 1, 32)
        for position, page in enumerate(pages[::-1]):
            k[page * 8 + 5] = layer + 10 * position
            v[page * 8 + 5] = layer + 10 * position + 1
            assert (ks[segment.index, position * 8 + 5] == layer + 10 * position).all()
            assert (vs[segment.index, position * 8 + 5] == layer + 10 * position + 1).all()
    memory.check_integrity()


def test_a_released_segment_stays_mapped_until_its_batch_is_done():
    memory = make()
    segment = memory.lease(None, memory.allocate(2))
    epoch = memory.launch()
    memory.release(segment)
    assert not memory.housekeep()
    assert memory.segments.mappings() == 2
    memory.complete(epoch)
    assert memory.housekeep()
    assert memory.segments.mappings() == 0
    memory.check_integrity()


def test_a_freed_page_stays_backed_until_the_batch_being_made_is_done():
    memory = make(reserve_pages=0)
    memory.free(memory.allocate(2))
    assert memory.trim() == 0
    memory.complete(memory.launch())
    assert memory.trim() == 2


@pytest.mark.parametrize("how", ["keep", "unclaim", "free_all"])
def test_a_page_that_goes_another_way_stays_backed_as_long(how):
    memory = make(reserve_pages=0)
    (page,) = memory.allocate(1)
    if how == "free_all":
        memory.free_all()
    else:
        tail = memory.keep(page, 3)
        if how == "unclaim":
            memory.complete(memory.launch())
            memory.unclaim(tail, memory.claim(tail))
        memory.forget(tail)
    assert memory.trim() == 0, "the batch being made may read it"
    memory.complete(memory.launch())
    assert memory.trim() == 1


def test_a_segment_that_is_about_to_lose_a_page_shows_nothing():
    memory = make()
    pages = memory.allocate(3)
    segment = memory.lease(None, pages)
    memory.complete(memory.launch())
    memory.park(segment, pages[:2], "leaf")
    in_hand = memory.segments.begin_tidy()
    assert memory.lease_later(segment, pages) is segment
    assert not memory.shows(segment, pages), "the worker unmaps the last one"
    memory.segments.tidy_segment(*in_hand)
    memory.segments.finish_tidy(*in_hand, done=True)
    assert not memory.shows(segment, pages)
    assert memory.lease(segment, pages) is segment
    assert memory.shows(segment, pages)


def test_a_lower_limit_forgets_the_longest_kept_pages():
    memory = make()
    tails = [memory.keep(page, 3) for page in memory.allocate(4)]
    memory.allocate(2)
    assert memory.allow(4) == 0
    assert [tail.page is None for tail in tails] == [True, True, False, False]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_failed_lease_changes_nothing(at):
    vmm = FaultyVirtualMemory()
    memory = make(vmm)
    pages = memory.allocate(6)
    parked = memory.lease(None, pages[:2])
    memory.complete(memory.launch())
    memory.park(parked, pages[:2], "leaf")
    before = memory.segments.counts()
    for segment in (None, parked):
        vmm.fail_calls, vmm.fail_at = ("map",), at
        with pytest.raises(VMMError, match="INJECTED"):
            memory.lease(segment, pages)
        memory.housekeep()
        assert parked.owner == "leaf"
        counts = memory.segments.counts()
        assert (counts["leased"], counts["parked"]) == (0, 1)
        memory.check_integrity()
    assert memory.segments.counts() | {"retired": 0} == before | {"idle": before["idle"]} | {"retired": 0}
    assert memory.lease(parked, pages) is parked


def test_the_worker_keeps_pages_ready_and_gives_idle_ones_back():
    memory = make(worker=True, reserve_pages=3, idle_seconds=0.05)
    try:
        wait_for(lambda: memory.pages.free_backed == 3)
        pages = memory.allocate(8)
        assert memory.pages.backed >= 9
        memory.free(pages)
        memory.complete(memory.launch())
        wait_for(lambda: memory.pages.free_backed == 3)
        memory.check_integrity()
    finally:
        memory.close()
    assert memory.vmm.created_bytes == 0


def test_what_requests_have_left_in_their_pages_is_part_of_the_reserve():
    memory = make(reserve_pages=3, max_running=8, idle_seconds=0.0)
    while memory.housekeep():
        pass
    assert memory.pages.ready == 3
    memory.allocate(4)
    memory.unfilled_tokens = LAYOUT.page_tokens + 1
    while memory.housekeep():
        pass
    assert memory.pages.ready == 2, "four pages of which a little more than one is empty"
    kept = [memory.keep(page, 3) for page in memory.allocate(2)]
    memory.complete(memory.launch())
    while memory.housekeep():
        pass
    assert (memory.pages.ready, memory.pages.tails) == (1, 2), "two kept pages have one page left"
    memory.unfilled_tokens = 0
    for tail in kept:
        memory.forget(tail)
    memory.complete(memory.launch())
    while memory.housekeep():
        pass
    assert memory.pages.ready == 3


def test_the_worker_survives_a_full_device(caplog):
    vmm = FaultyVirtualMemory(capacity_bytes=4 * LAYOUT.page_bytes)
    memory = make(vmm, worker=True, reserve_pages=8)
    try:
        wait_for(lambda: memory.pages.free_backed == 3)
        assert memory.allocate(4) is None
        assert len(memory.allocate(3)) == 3
        memory.check_integrity()
    finally:
        memory.close()


LEFT_RUNNING = """
import atexit, logging, time

atexit.register(time.sleep, 1.5)  # runs last: a worker that ran on would meet what the others have torn down
logging.basicConfig()

from tests.unit.test_manager import FaultyVirtualMemory, make

class Slow(FaultyVirtualMemory):
    def release(self, handle):
        time.sleep(0.05)
        super().release(handle)

memory = make(Slow(), worker=True, idle_seconds=0)
memory.free(memory.allocate(16))
memory.complete(memory.launch())
"""


def test_the_worker_ends_before_the_process_takes_the_memory_down():
    ended = subprocess.run([sys.executable, "-c", LEFT_RUNNING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_last_page_is_waited_for_in_the_workers_hands():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, worker=False, reserve_pages=16)
    memory.allocate(15)
    begun, go = threading.Event(), threading.Event()
    clear = vmm.clear

    def slow(*args):
        begun.set()
        assert go.wait(10)
        clear(*args)

    vmm.clear = slow
    worker = threading.Thread(target=memory.housekeep)
    worker.start()
    assert begun.wait(10)
    got = []
    taker = threading.Thread(target=lambda: got.append(memory.allocate(1)))
    taker.start()
    taker.join(0.1)
    assert taker.is_alive(), "the page was handed out before it was there"
    go.set()
    for thread in (worker, taker):
        thread.join(10)
    assert len(got[0]) == 1
    memory.check_integrity()


def test_a_lease_waits_for_a_segment_in_the_workers_hands():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, worker=False)
    pages = memory.allocate(3)
    segment = memory.prepare(pages[:2], "waiting")
    begun, go = threading.Event(), threading.Event()
    map_ = vmm.map

    def slow(*args):
        begun.set()
        assert go.wait(10)
        map_(*args)

    vmm.map = slow
    worker = threading.Thread(target=memory.housekeep)
    worker.start()
    assert begun.wait(10)
    got = []
    taker = threading.Thread(target=lambda: got.append(memory.lease(segment, pages, shared=2)))
    taker.start()
    taker.join(0.1)
    assert taker.is_alive(), "two threads mapped one segment"
    go.set()
    for thread in (worker, taker):
        thread.join(10)
    assert got == [segment]
    assert segment.pages == pages
    stats = memory.stats()
    assert (stats.maps, stats.maps_behind, stats.prefix_maps, stats.prepared_segments) == (3, 1, 1, 1)
    memory.check_integrity()


def test_the_turn_that_continues_maps_nothing_of_its_prefix():
    memory = make(worker=True)
    try:
        pages = memory.allocate(5)
        segment = memory.lease(None, pages[:2])
        memory.complete(memory.launch())
        memory.park(segment, pages[:4], "leaf")  # two pages were born in decode
        wait_for(lambda: segment.pages == pages[:4])
        assert memory.lease(segment, pages, shared=4) is segment
        stats = memory.stats()
        assert (stats.prefix_maps_on_continue, stats.adoptions, stats.maps_behind) == (0, 1, 2)
    finally:
        memory.close()


def test_the_worker_unmaps_behind_the_scheduler():
    memory = make(worker=True)
    try:
        segment = memory.lease(None, memory.allocate(4))
        memory.complete(memory.launch())
        memory.release(segment)
        wait_for(lambda: segment.state is SegmentState.IDLE)
        assert memory.stats().unmaps == 4
    finally:
        memory.close()


def test_a_thread_that_polls_gives_way_to_the_worker():
    """What an idle server's event loop does: it asks a socket, and others get the interpreter for moments only."""
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind("inproc://polled")
    memory = make(capacity_pages=400, max_tokens=160, worker=True, idle_seconds=0.0)
    try:
        pages = [memory.allocate(20) for _ in range(20)]
        for part in pages:
            memory.release(memory.lease(None, part))
            memory.free(part)
            memory.complete(memory.launch())
        for _ in range(1500):
            with pytest.raises(zmq.Again):
                socket.recv(zmq.NOBLOCK)
            sum(n for n in range(10_000))
            memory.complete(memory.launch())
            memory.give_way()
            if memory.pages.backed == 1:
                break
        assert memory.pages.backed == 1, "only the padding page"
        memory.check_integrity()
    finally:
        memory.close()
        socket.close()


def test_the_worker_rests_while_a_graph_is_captured():
    memory = make(worker=True, reserve_pages=4)
    try:
        wait_for(lambda: memory.pages.ready == 4)
        with memory.paused():
            memory.allocate(4)
            time.sleep(0.1)
            assert memory.pages.ready == 0
        wait_for(lambda: memory.pages.ready == 4)
    finally:
        memory.close()


def test_the_clock_counts_everything_once(monkeypatch):
    """Calls within calls, what holds no lock, and naps."""
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now, sleep=passes)
    memory = make(vmm := FaultyVirtualMemory())
    before = memory.stats().scheduling_seconds
    monkeypatch.setattr(manager, "time", clock)
    create = vmm.create
    vmm.create = lambda nbytes: passes(3.0) or create(nbytes)
    with memory.clock:
        passes(10.0)
        memory.allocate(2)
        with memory.clock:
            passes(1.0)
    assert memory.stats().scheduling_seconds - before == pytest.approx(17.0)
    passes(100.0)
    memory._thread, memory._due_at = threading.current_thread(), 0.0
    memory.give_way()
    assert memory.stats().scheduling_seconds - before == pytest.approx(17.0 + manager.GIVE_WAY_SECONDS)
    memory._thread = None


def test_nobody_waits_for_a_worker_that_has_nothing_to_do(monkeypatch):
    memory = make(worker=True)
    try:
        wait_for(lambda: not memory._working)
        slept = []
        clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=time.perf_counter, sleep=slept.append)
        monkeypatch.setattr(manager, "time", clock)
        memory.give_way()
        assert not slept
        memory._due_at = 0.0
        memory.give_way()
        assert slept == [manager.GIVE_WAY_SECONDS]
    finally:
        monkeypatch.undo()
        memory.close()
    without = make()
    without._due_at = 0.0
    without.give_way()


def test_free_all_forgets_everything():
    memory = make()
    pages = memory.allocate(9)
    memory.lease(None, pages[:3])
    memory.park(memory.lease(None, pages[3:5]), pages[3:5], "leaf")
    memory.free_all()
    memory.complete(memory.launch())
    while memory.housekeep():
        pass
    stats = memory.stats()
    assert (stats.pages_owned, stats.segment_mappings, stats.segments_leased, stats.segments_parked) == (0, 0, 0, 0)
    memory.check_integrity()


def test_impossible_sizes_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"room for 0 pages of 8 tokens.*--mem-fraction-static"):
        make(capacity_pages=0)
    with pytest.raises(ValueError, match=r"32 TiB of addresses, or 2\^31 tokens: lower --max-running-requests to \d+"):
        make(max_tokens=1 << 40)


def test_statistics_are_plain_numbers():
    stats = make().stats().as_dict()
    assert all(isinstance(value, int | float) for value in stats.values()), stats
    assert stats["pages_capacity"] == 16


def test_the_allowance_gives_back_what_is_free_and_lets_what_runs_grow():
    memory = make(reserve_pages=4)
    pages = memory.allocate(6)
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 11  # 6 owned, 4 in reserve, and the padding page
    assert memory.owes() == 0
    assert memory.allow(5) == 1
    assert memory.owes() == 4, "what is free; one that is owned is too many besides"
    while memory.housekeep():
        pass
    assert memory.owes() == 0
    assert memory.stats().pages_backed == 7
    assert memory.allocate(1) is None
    assert memory.missing_pages() == 11
    assert memory.room() == -1
    more = memory.allocate(2, growing=True)
    assert len(more) == 2
    memory.free(pages + more)
    memory.complete(memory.launch())
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 6
    assert memory.allow(0) == 0
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 1, "only the padding page"
    assert memory.allow(16) == 0
    assert len(memory.allocate(16)) == 16
    memory.check_integrity()


def test_what_is_idle_goes_back_when_somebody_else_needs_the_device(monkeypatch):
    monkeypatch.setattr(manager, "LOOK_SECONDS", 0.0)
    memory = make(reserve_pages=4)
    pages = memory.allocate(6)
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 11
    memory.vmm.low = lambda: True
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 7, "the reserve goes back, what is owned stays"
    memory.free(pages[:3])
    memory.complete(memory.launch())
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 4
    memory.vmm.low = lambda: False
    while memory.housekeep():
        pass
    memory.housekeep()
    while memory.housekeep():
        pass
    assert memory.stats().pages_backed == 8, "and comes back"


def moving_limits(memory):
    """What a server does while its limit goes down, to nothing, and up again; each step as often as it takes.

    Two requests share pages and write to their own; one ends and is parked, evicted, and another takes its place.
    """

    def insist(step, *args, **kwargs):
        for _ in range(3):
            try:
                result = step(*args, **kwargs)
            except VMMError:
                continue
            if result is not None:
                return result
        raise AssertionError(f"{step.__name__} failed three times")

    def tidy_up():
        failures = 0
        while True:
            try:
                if not memory.housekeep():
                    return
            except VMMError:
                failures += 1
                assert failures < 3

    def write(pages, value):
        for page in pages:
            memory.identity_views(1)[0][page * 8 : page * 8 + 8] = value + page

    def read(segment, pages, value):
        shown = memory.segment_views(1)[0][segment.index]
        for position, page in enumerate(pages):
            assert (shown[position * 8 : position * 8 + 8] == value + page).all()

    def done():
        memory.complete(memory.launch())
        tidy_up()
        memory.check_integrity()

    shared = insist(memory.allocate, 3)
    write(shared, 0)
    owns, segments = [], []
    for _ in range(2):
        owns.append(insist(memory.allocate, 3))
        write(owns[-1], 0)
        segments.append(insist(memory.lease, None, shared + owns[-1], shared=3))
    done()
    leaf = object()
    memory.park(segments[0], shared + owns[0], leaf)
    assert memory.allow(4) == 5
    done()
    memory.drop(segments[0])  # evicted
    memory.free(owns[0])
    done()
    grown = insist(memory.allocate, 1, growing=True)
    write(grown, 0)
    owns[1] += grown
    segments[1] = insist(memory.lease, segments[1], shared + owns[1])
    read(segments[1], shared + owns[1], 0)
    memory.allow(0)
    done()
    assert memory.allocate(1) is None
    memory.release(segments[1])
    memory.free(shared + owns[1])
    done()
    done()
    assert memory.pages.backed == 1, "asleep, it holds the padding page"
    memory.allow(16)
    pages = insist(memory.allocate, 10)
    write(pages, 100)
    segment = insist(memory.lease, None, pages[:7])
    read(segment, pages[:7], 100)
    memory.release(segment)
    memory.free(pages)
    done()


def test_a_failure_at_every_call_of_the_driver_while_the_limit_moves():
    counted = FaultyVirtualMemory()
    memory = make(counted, reserve_pages=2, idle_seconds=0)
    moving_limits(memory)
    memory.close()
    for call in FaultyVirtualMemory.CALLS:
        assert counted.seen[call] > 5
        for at in range(1, counted.seen[call] + 1):
            vmm = FaultyVirtualMemory()
            memory = make(vmm, reserve_pages=2, idle_seconds=0)
            memory.retry_seconds = 0.0
            vmm.fail_calls, vmm.fail_at = (call,), at
            moving_limits(memory)
            vmm.fail_at = None
            memory.close()
            assert vmm.created_bytes == 0, (call, at)
