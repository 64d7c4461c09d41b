"""One budget for two sides: what one has free goes for the other, by age; and what admission counts with windows."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
import torch

from sglang_vtensor import patches
from sglang_vtensor.handout import Ask
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.srt.admission import Windows, alone, longest
from sglang_vtensor.srt.kv_pool import _shares
from sglang_vtensor.srt.options import Refused
from sglang_vtensor.srt.runtime import RequestFrames, Runtime
from sglang_vtensor.srt.sides import Sides
from sglang_vtensor.srt.window_side import pages_within
from sglang_vtensor.vmm import OutOfMemory, VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_memory import LAYOUT, WINDOW, done, make, take

#: Pages of the first side have half of the bytes of those of the second one.
SIDES = [LAYOUT, WINDOW]


def test_what_one_side_lets_go_has_room_for_frames_of_others():
    """Eight pages of each side are 24 of the first one. 12 frames with windows of two pages each leave as many bytes as
    two frames take on both."""
    memory = make(sides=SIDES, capacity_pages=8, most_frames=24)
    frames = take(memory, 8)
    assert take(memory, 1) is None, "the budget is spent"
    memory.let_go(1, frames[:7])
    done(memory)
    assert memory.room() == 4
    more = take(memory, 4)
    assert [backing.used for backing in memory.backings] == [12, 5]
    memory.let_go(1, more)
    done(memory)
    assert memory.room() == (24 - 12 - 2) // 3
    memory.check_integrity()


def test_pages_in_flight_do_not_go_for_others():
    memory = make(sides=SIDES, capacity_pages=4, most_frames=12)
    frames = take(memory, 4)
    memory.launch()
    memory.let_go(1, frames[:3], memory.launched)
    assert memory.room() == 2, "that is what owners leave"
    assert memory.budget.flying == 3 * WINDOW.page_bytes
    assert take(memory, 2) is None, "and a batch in flight reads it yet"
    assert not memory.short, "the driver was not asked"
    memory.complete(memory.launched)
    assert take(memory, 2) is not None
    memory.check_integrity()


def test_the_page_that_was_free_the_longest_goes_first():
    memory = make(sides=SIDES, capacity_pages=6, most_frames=18)
    frames = take(memory, 6)
    memory.let_go(1, frames[:2])
    memory.complete(memory.launch())
    memory.free(frames[4:])  # of each side two, which are younger
    memory.complete(memory.launch())
    first, windows = memory.backings
    assert (first.free, windows.free) == (2, 4)
    (frame,) = take(memory, 1)
    assert first.has_page(frame)
    assert [windows.has_page(old) for old in frames[:2]] == [True, True], "nothing had to go: it has a page of each"
    assert take(memory, 2) is not None
    assert [windows.has_page(old) for old in frames[:2]] == [False, False], "the oldest went for a frame of both"
    assert (first.free, windows.free) == (0, 0)
    memory.check_integrity()


def test_a_bound_on_a_side_holds_whatever_the_budget_has():
    memory = make(sides=SIDES, capacity_pages=8, most_frames=24, most_pages={1: 3})
    frames = take(memory, 3)
    assert memory.room() == 0
    assert take(memory, 1) is None
    memory.let_go(1, frames[:1])
    done(memory)
    assert take(memory, 1) is not None
    assert memory.backings[1].held == 3
    memory.check_integrity()


def test_on_a_full_device_one_side_has_what_the_other_gives_back():
    vmm = FaultyVirtualMemory(capacity_bytes=5 * (LAYOUT.page_bytes + WINDOW.page_bytes))
    memory = make(vmm, SIDES, most_frames=40)
    frames = take(memory, 4)
    memory.let_go(1, frames[:3])
    memory.complete(memory.launch())
    assert take(memory, 2) is not None, "three free pages of windows are two frames on both sides"
    assert memory.short
    assert isinstance(memory.backings[0].refusal or memory.backings[1].refusal, OutOfMemory)
    memory.check_integrity()


def test_a_context_and_its_window_fill_the_bytes():
    assert longest(120, 10, 10, 2) == 10
    assert longest(39, 10, 10, 2) == 1, "shorter than the window, it takes both sides"
    assert longest(40, 10, 10, 2) == 2
    assert longest(100, 10, 30, 2) == 4
    for nbytes in range(1, 300):
        n = longest(nbytes, 7, 11, 3)
        assert n * 7 + min(n, 3) * 11 <= nbytes < (n + 1) * 7 + min(n + 1, 3) * 11


def test_pages_within_is_the_most_that_there_are():
    for reach, tokens, page in ((40, 1, 16), (5, 8, 4), (127, 1, 128), (350, 8192, 256)):
        seen = {-(-(start + tokens) // page) - max(0, start - reach) // page for start in range(3 * (reach + page))}
        assert max(seen) <= pages_within(reach, tokens, page) <= max(seen) + 1


def test_a_ratio_becomes_a_bound_in_pages():
    layout = KVLayout(1, 1, 64, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)
    sides = Sides([layout, layout], [(0, 0), (1, 0)], [None, 8])
    assert _shares(sides, 100, None, 16, 0.5) == (None, {}), "without windows there is nothing to bound"
    frames, most = _shares(sides, 100, 8, 16, None)
    assert (frames, most) == (200 - pages_within(8, 1, 8), {})
    assert _shares(sides, 100, 8, 16, 0.25)[1] == {1: int(200 / 1.25 * 0.25)}
    assert _shares(sides, 100, 8, 16, 1.0)[1] == {1: 100}
    with pytest.raises(Refused, match=r"--swa-full-tokens-ratio 0\.01 bounds the memory of windows to 1 pages of 8"):
        _shares(sides, 100, 8, 16, 0.01)


def windowed(capacity_pages: int = 32, chunk: int | None = 16) -> Runtime:
    memory = make(sides=[LAYOUT, LAYOUT], capacity_pages=capacity_pages, most_frames=2 * capacity_pages)
    return Runtime(memory, 8, patches.load().requests, reach=8, chunk=chunk)


def test_a_request_is_charged_for_its_chunk_or_for_its_window():
    windows = Windows(windowed())
    assert windows.wanted(0, 64, 100, None) == 8, "all of the prompt at once"
    assert windows.wanted(0, 64, 100, 16) == 3, "a window while it decodes is more than a chunk"
    assert windows.wanted(64, 64, 100, 32) == 5, "a chunk of four pages, and one before it"
    assert windows.wanted(0, 5, 2, 16) == 1, "no more than it has tokens for"
    assert windows.charge(4) == 4 * 8
    assert windows.charge(-1) == 0
    assert windows.promised == 4


def test_what_is_available_is_what_no_request_needs():
    runtime = windowed()
    memory, windows = runtime.memory, Windows(runtime)
    assert windows.available(0) == 64 * 8, "in tokens of the first side"
    frames = take(memory, 6)
    runtime.requests[1] = RequestFrames(frames, 0, 0)
    assert windows.available(0) == (64 - 12) * 8
    assert runtime.window is not None
    runtime.window.slide(runtime.requests[1], 48)
    memory.complete(memory.launch())
    assert windows.available(0) == (64 - 6 - 1) * 8
    memory.allow(16)
    assert windows.available(0) == (32 - 7) * 8
    memory.allow(32)
    memory.launch()
    memory.let_go(1, frames[5:], memory.launched)
    assert windows.available(0) == (64 - 6 - 1) * 8, "what a batch in flight reads is not there yet"


def test_who_is_alone_is_admitted():
    """With as many tokens as `alone` says a request passes, whatever chunks it comes in."""
    for chunk in (8, 16, 40, None):
        runtime = windowed(chunk=chunk)
        tokens = alone(runtime)
        for prefix in range(0, tokens, 8):
            windows = Windows(runtime)
            pages = windows.wanted(prefix, tokens - prefix, 0, chunk)
            locked = prefix // 8 * 8  # of the tree, which the request has matched
            assert tokens - prefix + 8 + windows.as_tokens(pages) < windows.available(0) - locked


def test_running_requests_grow_to_a_window():
    runtime = windowed()
    frames = take(runtime.memory, 1)
    runtime.requests[1] = RequestFrames(frames, 0, 0)
    req = SimpleNamespace(kv=SimpleNamespace(holds_kv=True, req_pool_idx=1, kv_allocated_len=5))
    assert Windows(runtime).growth([(req, 2.0)]) == 0, "its page has room"
    assert Windows(runtime).growth([(req, 10.0)]) == 8
    assert Windows(runtime).growth([(req, 1000.0)]) == 2 * 8, "a window of 8 tokens is in three pages at most"
    req.kv.holds_kv = False
    assert Windows(runtime).growth([(req, 1000.0)]) == 0
    assert runtime.memory.allocate([Ask(None, 1)]) is not None


# The worker beside who reads.


class Watched(dict):
    """Notes how many pages a side says are used while another step changes what it has."""

    def __init__(self, backing, pages):
        super().__init__(pages)
        self.backing, self.seen = backing, []

    def pop(self, *args):
        self.seen.append(self.backing.used)
        return super().pop(*args)

    def __setitem__(self, frame, page):
        super().__setitem__(frame, page)
        self.seen.append(self.backing.used)


def test_what_is_used_does_not_change_while_the_worker_changes_what_is_free():
    """It is read without the lock; on one of several ranks another number would part them."""
    memory = make(reserve_pages=4, idle_seconds=0.0)
    take(memory, 3)
    memory.complete(memory.launch())
    backing = memory.backing
    backing._pages = Watched(backing, backing._pages)
    while memory.housekeep():
        pass
    memory.reserve_pages = 0
    time.sleep(0.001)
    while memory.housekeep():
        pass
    assert len(backing._pages.seen) >= 8
    assert set(backing._pages.seen) == {3}


@pytest.mark.parametrize("seed", range(100))
def test_the_worker_creates_nothing_beyond_a_lowered_limit(seed):
    rng = random.Random(seed)
    capacity = rng.randint(4, 16)
    sides = rng.choice([[LAYOUT, WINDOW], [WINDOW, LAYOUT]])
    numbers = {"capacity_pages": capacity, "most_frames": 3 * capacity, "reserve_pages": rng.randint(1, capacity)}
    memory = make(sides=sides, idle_seconds=1e9, **numbers)
    memory.allow(rng.randint(2, capacity))
    owned = []
    for _ in range(30):
        what = rng.random()
        if what < 0.3 and (frames := take(memory, rng.randint(1, 3))):
            owned.append([frames, 0])
        elif what < 0.5 and owned:
            some = rng.choice(owned)
            upto = rng.randint(some[1], len(some[0]) - 1)
            memory.let_go(1, some[0][some[1] : upto])
            some[1] = upto
        elif what < 0.6 and owned:
            memory.free(owned.pop(rng.randrange(len(owned)))[0])
        elif what < 0.7:
            memory.complete(memory.launch())
        else:
            before = memory.over_bytes()
            memory.housekeep()
            assert memory.over_bytes() <= before
    for _ in range(200):
        if not memory.housekeep():
            break
    else:
        raise AssertionError("the worker creates and gives back without end")
    memory.close()


def test_a_page_that_is_stuck_counts_before_the_next_one_is_created():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, [LAYOUT, WINDOW], capacity_pages=8, most_frames=30, most_pages={1: 3})
    frames = take(memory, 3)
    memory.let_go(1, frames[:1])
    memory.complete(memory.launch())
    memory.backings[1].trim(0)
    memory.free(frames[:1])
    memory.complete(memory.launch())
    windows, first = memory.backings[1], []
    original, release = vmm.map, vmm.release

    def no_room_to_map(address, nbytes, handle):
        if not first and windows.base <= address < windows.base + windows.nbytes:
            first.append(handle)
            raise OutOfMemory("map", "injected", "INJECTED")
        return original(address, nbytes, handle)

    def not_taken_back(handle):
        if handle in first:
            raise VMMError("release", "injected", "INJECTED")
        return release(handle)

    vmm.map, vmm.release = no_room_to_map, not_taken_back
    take(memory, 1)
    assert windows.held <= 3
    memory.check_integrity()
    del vmm.map, vmm.release
