"""The worker when a call of the driver fails, raises what nobody expects, or does not return."""

from __future__ import annotations

import contextlib
import logging
import threading
from types import SimpleNamespace

import pytest

from sglang_vtensor import worker
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_memory import go_on, make, take
from tests.waiting import SECONDS, wait_for

PAGES = 16


@contextlib.contextmanager
def serving(vmm, **kwargs):
    """A memory whose worker gives back at once what is free, and tries again soon."""
    memory = make(vmm, **({"worker": True, "capacity_pages": PAGES, "idle_seconds": 0.0} | kwargs))
    memory.worker.retry_seconds = 0.02
    try:
        yield memory
    finally:
        memory.close()
        assert vmm.created_bytes == 0


def peak(memory):
    """Requests take every page, and end."""
    with memory.paused():
        frames = take(memory, PAGES)
        assert frames is not None
        memory.complete(memory.launch())
    memory.free(frames)
    memory.complete(memory.launch())


def hooked(vmm, call, hook):
    """What the worker does by `call` goes through `hook` first."""
    original = getattr(vmm, call)

    def called(*args):
        if threading.current_thread().name == "vtensor-worker":
            hook(*args)
        return original(*args)

    setattr(vmm, call, called)
    return original


ERRORS = [VMMError("call", "injected", "INJECTED"), RuntimeError("injected"), SystemExit()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_fails_once_is_tried_again(call, at, error, caplog):
    vmm = FaultyVirtualMemory()
    left = at

    def fails_once(*_):
        nonlocal left
        left -= 1
        if left == 0:
            raise error

    with serving(vmm) as memory:
        hooked(vmm, call, fails_once)
        peak(memory)

        def given_back():
            memory.give_way()
            # A page that is being released is in hand, and no longer counted as backed.
            return left <= 0 and memory.backed == 1 and memory.backing.in_hand == 0

        wait_for(given_back)
        memory.check_integrity()
        stats = memory.stats()
        assert stats["pages_stuck"] == 0
        assert stats["worker_failures"] == 1
        peak(memory)
        wait_for(lambda: memory.backed == 1)
        memory.check_integrity()
    assert any(record.levelno == logging.ERROR and "worker" in record.message for record in caplog.records)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["create", "map", "clear", "wait_cleared"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_page_ahead_that_fails_once_is_made_again(call, error):
    vmm = FaultyVirtualMemory()
    failed = False

    def fails_once(*_):
        nonlocal failed
        if not failed:
            failed = True
            raise error

    with serving(vmm, reserve_pages=3) as memory:
        wait_for(lambda: memory.ready == 3)
        hooked(vmm, call, fails_once)
        frames = take(memory, 3)

        def ready():
            memory.give_way()
            return failed and memory.ready == 3 and not memory.backing.stuck

        wait_for(ready)
        assert not memory.short
        memory.check_integrity()
        assert len(go_on(memory, frames)) == 1


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_page_that_the_driver_does_not_take_back_is_nobodys_and_all_others_are(call):
    vmm = FaultyVirtualMemory()
    original, bad = getattr(vmm, call), None

    def refuses_one(first, *args):
        nonlocal bad
        bad = first if bad is None else bad
        if first == bad:
            raise VMMError(call, "injected", "INJECTED")
        original(first, *args)

    with serving(vmm) as memory:
        frames = take(memory, PAGES)
        setattr(vmm, call, refuses_one)
        memory.free(frames)
        memory.complete(memory.launch())
        wait_for(lambda: memory.backed == 2 and memory.backing.stuck == 1)
        assert memory.in_pages(memory.missing_bytes()) == 1
        assert take(memory, PAGES) is None
        assert len(take(memory, PAGES - 1)) == PAGES - 1
        setattr(vmm, call, original)
        wait_for(lambda: memory.backing.stuck == 0)
        assert len(take(memory, 1)) == 1
        memory.check_integrity()


def test_a_mapping_that_the_driver_never_takes_away_holds_up_nothing_else(caplog):
    vmm = FaultyVirtualMemory()
    original, bad = vmm.unmap, []

    def refuses_some(address, nbytes):
        if address in bad:
            raise VMMError("unmap", "injected", "INJECTED")
        original(address, nbytes)

    with serving(vmm) as memory:
        memory.worker.retry_seconds = 3600.0  # nothing but the bad ones waits for that
        with memory.paused():
            frames = take(memory, PAGES)
            bad = [memory.backing.address(frame) for frame in frames[:3]]
            vmm.unmap = refuses_some
        memory.free(frames)
        memory.allow(0)  # as a server that falls asleep
        memory.complete(memory.launch())
        wait_for(lambda: memory.backed == 4 and memory.backing.stuck == 3)
        memory.check_integrity()
        assert len([record for record in caplog.records if "tries it again" in record.message]) == 1, "said once"
        bad = []
        memory.worker._again_at.clear()  # an hour goes by
        memory.worker.wake()
        wait_for(lambda: memory.backed == 1)
        memory.check_integrity()


@pytest.fixture
def hanging(monkeypatch):
    """A driver whose next call of a kind in the worker does not return before `go` is set. From then on there is
    patience."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.2)
    vmm, begun, go = FaultyVirtualMemory(), threading.Event(), threading.Event()

    def waits(*_):
        begun.set()
        assert go.wait(SECONDS)

    def go_on():
        monkeypatch.setattr(worker, "PATIENCE_SECONDS", SECONDS)
        go.set()

    yield vmm, lambda call: hooked(vmm, call, waits), begun, SimpleNamespace(set=go_on)
    go.set()


def hold_a_page(memory, hang, begun):
    """Of all pages, which are free then, the worker has one in hand, and does not let go of it."""
    frames = take(memory, PAGES)
    hang("release")
    memory.free(frames)
    memory.complete(memory.launch())
    assert begun.wait(SECONDS)


def test_a_capture_does_not_wait_for_the_worker_without_an_end(hanging):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        hold_a_page(memory, hang, begun)
        with pytest.raises(VMMError, match="worker's call has not returned"), memory.paused():
            pytest.fail("it may call the driver meanwhile")
        go.set()
        wait_for(lambda: memory.backing.in_hand == 0)
        with memory.paused():
            memory.check_integrity()


def test_the_scheduling_thread_does_without_a_page_that_the_worker_does_not_let_go_of(hanging, caplog):
    vmm, hang, begun, go = hanging
    with serving(vmm) as memory:
        hold_a_page(memory, hang, begun)
        wait, waited = memory.worker._settled.wait, []
        memory.worker._settled.wait = lambda seconds: waited.append(seconds) or wait(seconds)
        for _ in range(3):
            assert take(memory, PAGES) is None
        assert sum(waited) <= worker.PATIENCE_SECONDS
        assert len(take(memory, PAGES - 1)) == PAGES - 1
        assert caplog.text.count("has not let go of a page") == 1, "said once"
        go.set()
        wait_for(lambda: memory.backing.in_hand == 0)
        assert len(take(memory, 1)) == 1
        memory.check_integrity()


@pytest.mark.parametrize("call", ["create", "map", "clear"])
def test_a_request_goes_on_elsewhere_where_the_worker_does_not_let_go_of_its_frame(hanging, call):
    vmm, hang, begun, go = hanging
    with serving(vmm, reserve_pages=1) as memory:
        wait_for(lambda: memory.ready == 1)
        hang(call)
        frames = take(memory, 2)
        assert begun.wait(SECONDS)
        more = go_on(memory, frames)
        assert len(more) == 1
        assert more[0] != frames[-1] + 1
        memory.free(more)
        go.set()
        wait_for(lambda: memory.backing.in_hand == 0)
        memory.check_integrity()
