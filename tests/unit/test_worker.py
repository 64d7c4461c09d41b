"""The mapping worker when a call of the driver fails, raises what nobody expects, or does not return."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import pytest

from sglang_vtensor import manager
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_manager import make
from tests.waiting import wait_for

PAGES = 16


@contextlib.contextmanager
def serving(vmm):
    """A memory whose worker gives back at once what is free, and tries again soon."""
    memory = make(vmm, worker=True, capacity_pages=PAGES, idle_seconds=0.0)
    memory.retry_seconds = 0.02
    try:
        yield memory
    finally:
        memory.close()
        assert vmm.created_bytes == 0


def peak(memory):
    """A request takes every page, reads some of them from a segment, and ends."""
    pages = memory.allocate(PAGES)
    assert pages is not None
    segment = memory.lease(None, pages[:6])
    memory.complete(memory.launch())
    memory.park(segment, pages[:4], "leaf")  # it shows two pages too many

    def tidied():
        memory.give_way()  # as an idle server does
        return not memory.segments.pending() and not memory.segments.in_hand

    wait_for(tidied)
    assert segment.pages == pages[:4]
    memory.drop(segment)
    memory.free(pages)
    memory.complete(memory.launch())


@pytest.mark.parametrize("error", [VMMError("call", "injected", "INJECTED"), RuntimeError("injected"), SystemExit()])
@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_fails_once_is_tried_again(call, at, error, caplog):
    vmm = FaultyVirtualMemory()
    original, left = getattr(vmm, call), at

    def fails_once(*args):
        nonlocal left
        if threading.current_thread().name == "vtensor-mapping":
            left -= 1
            if left == 0:
                raise error
        return original(*args)

    with serving(vmm) as memory:
        setattr(vmm, call, fails_once)
        peak(memory)

        def given_back():
            memory.give_way()
            return left <= 0 and memory.pages.backed == 1

        wait_for(given_back)
        memory.check_integrity()
        assert (memory.pages.moving, memory.pages.stuck, memory.segments.in_hand) == (0, 0, 0)
        assert memory.stats().worker_failures == 1
        peak(memory)
        wait_for(lambda: memory.pages.backed == 1)
        memory.check_integrity()
    assert any(record.levelno == logging.ERROR and "mapping worker" in record.message for record in caplog.records)


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_page_that_the_driver_does_not_take_back_is_nobodys_and_all_others_are(call, caplog):
    vmm = FaultyVirtualMemory()
    original, bad = getattr(vmm, call), None

    def refuses_one(first, *args):
        nonlocal bad
        bad = first if bad is None else bad
        if first == bad:
            raise VMMError(call, "injected", "INJECTED")
        original(first, *args)

    with serving(vmm) as memory:
        pages = memory.allocate(PAGES)
        setattr(vmm, call, refuses_one)
        memory.free(pages)
        memory.complete(memory.launch())
        wait_for(lambda: memory.pages.backed == 2 and memory.pages.stuck == 1)
        assert memory.missing_pages() == 1
        assert memory.allocate(PAGES) is None
        assert len(memory.allocate(PAGES - 1)) == PAGES - 1
        setattr(vmm, call, original)
        wait_for(lambda: memory.pages.stuck == 0)
        assert len(memory.allocate(1)) == 1
        memory.check_integrity()


def test_a_segment_that_the_driver_never_unmaps_holds_up_nothing_else():
    vmm = FaultyVirtualMemory()
    original, bad = vmm.unmap, []

    def refuses_some(address, nbytes):
        if address in bad:
            raise VMMError("unmap", "injected", "INJECTED")
        original(address, nbytes)

    vmm.unmap = refuses_some
    with serving(vmm) as memory:
        memory.retry_seconds = 3600.0  # nothing but the bad ones waits for that
        pages = memory.allocate(PAGES)
        segments = [memory.lease(None, pages[n : n + 1]) for n in range(5)]
        memory.complete(memory.launch())
        bad = [segment.address for segment in segments[:3]]
        for segment in segments:
            memory.release(segment)
        memory.free(pages)
        memory.allow(0)  # as a server that falls asleep
        memory.complete(memory.launch())
        # The padding page, and those that the segments show.
        wait_for(lambda: memory.pages.backed == 4 and memory.segments.counts()["retired"] == 3)
        memory.check_integrity()
        bad = []
        memory._again_at.clear()  # an hour goes by
        memory._wake_worker()
        wait_for(lambda: memory.pages.backed == 1 and not memory.segments.counts()["retired"])
        memory.check_integrity()


def test_a_page_too_many_of_a_parked_segment_goes_although_its_unmapping_fails_once():
    vmm = FaultyVirtualMemory()
    with serving(vmm) as memory:
        pages = memory.allocate(4)
        segment = memory.lease(None, pages)
        memory.complete(memory.launch())
        vmm.fail_calls, vmm.fail_at = ("unmap",), 1
        memory.park(segment, pages[:1], "leaf")
        memory.free(pages[1:])
        memory.complete(memory.launch())
        wait_for(lambda: memory.stats().worker_failures == 1 and memory.pages.backed == 2)
        assert segment.pages == pages[:1]
        memory.check_integrity()


@pytest.fixture
def hanging(monkeypatch):
    """A driver whose next `release`, `map` or `unmap` in the worker does not return before `go` is set."""
    monkeypatch.setattr(manager, "PATIENCE_SECONDS", 0.2)
    vmm, begun, go = FaultyVirtualMemory(), threading.Event(), threading.Event()

    def hang(call):
        original = getattr(vmm, call)

        def hangs(*args):
            if threading.current_thread().name == "vtensor-mapping":
                begun.set()
                assert go.wait(30)
            return original(*args)

        setattr(vmm, call, hangs)

    yield vmm, hang, begun, go
    go.set()


def hold_a_page(memory, hang, begun):
    """Of all pages, which are free then, the worker has one in hand, and does not let go of it."""
    pages = memory.allocate(PAGES)
    hang("release")
    memory.free(pages)
    memory.complete(memory.launch())
    assert begun.wait(10)


def test_a_capture_does_not_wait_for_the_worker_without_an_end(hanging):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        hold_a_page(memory, hang, begun)
        with pytest.raises(VMMError, match="worker's call has not returned"), memory.paused():
            pytest.fail("it may call the driver meanwhile")
        go.set()
        wait_for(lambda: memory.pages.moving == 0)
        with memory.paused():
            memory.check_integrity()


def test_the_scheduling_thread_does_without_a_page_that_the_worker_does_not_let_go_of(hanging, caplog):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        hold_a_page(memory, hang, begun)
        for _ in range(3):
            start = time.monotonic()
            assert memory.allocate(PAGES) is None
            assert time.monotonic() - start < 5
        assert len(memory.allocate(PAGES - 1)) == PAGES - 1
        assert "a call of the driver does not return" in caplog.text
        go.set()
        wait_for(lambda: memory.pages.moving == 0)
        assert len(memory.allocate(1)) == 1
        memory.check_integrity()


def test_a_lease_does_without_a_segment_that_the_worker_does_not_let_go_of(hanging):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        pages = memory.allocate(4)
        hang("map")
        segment = memory.prepare(pages, "waiting")
        assert begun.wait(10)
        other = memory.lease(segment, pages)
        assert other is not segment
        assert memory.shows(other, pages)
        assert segment.owner == "waiting", "it may be adopted later"
        go.set()
        wait_for(lambda: not segment.in_hand)
        assert memory.lease(segment, pages) is segment
        memory.check_integrity()


def test_a_request_does_without_its_own_segment_that_the_worker_does_not_let_go_of(hanging):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        pages = memory.allocate(4)
        hang("map")
        segment = memory.lease_later(None, pages)
        assert begun.wait(10)
        other = memory.lease(segment, pages)
        assert other is not segment
        assert memory.shows(other, pages)
        go.set()
        memory.complete(memory.launch())
        wait_for(lambda: memory.segments.counts()["leased"] == 1 and not memory.segments.pending())
        memory.check_integrity()
