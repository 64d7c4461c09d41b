"""Pages, segments and manager against a model that is plainly right: a dict of who owns what.

Every page carries a stamp in real memory, written through the identity region. What a segment is said to show is read
through its own addresses: if an alias is stale, the stamps differ.
"""

from __future__ import annotations

import contextlib
import logging

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
from sglang_vtensor.segments import SegmentState
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory

LOGGER = logging.getLogger("sglang_vtensor.manager")

LAYOUT = KVLayout(1, 1, 64, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)
CAPACITY, CONTEXT_PAGES, RUNNING, PARKED = 24, 6, 4, 3
DEVICE_PAGES = 20  # fewer than the capacity: running out must be an answer


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        LOGGER.setLevel(logging.CRITICAL)  # hundreds of histories fail hundreds of calls, each of which is said
        self.vmm = FaultyVirtualMemory(capacity_bytes=DEVICE_PAGES * LAYOUT.page_bytes)
        self.vmm.fail_calls = self.vmm.CALLS
        self.memory = KVMemory(
            self.vmm,
            LAYOUT,
            capacity_pages=CAPACITY,
            max_tokens=CONTEXT_PAGES * LAYOUT.page_tokens,
            max_running=RUNNING,
            max_parked=PARKED,
            reserve_pages=2,
            idle_seconds=0.0,
            worker=False,
        )
        self.memory.retry_seconds = 0.0
        self.keys, _ = self.memory.identity_views(0)
        self.by_segment, _ = self.memory.segment_views(0)
        self.owned: dict[int, int] = {}  # page -> stamp
        self.stamps = 0
        self.requests: list[dict] = []  # {"pages", "segment"}
        self.parked: list[tuple[object, list[int]]] = []  # (segment, the pages it was parked with)
        self.kept: list[tuple[object, int]] = []  # (tail, the stamp of its page)
        self.flying: list[tuple[int, list[tuple[object, list[int]]]]] = []  # what each launched batch reads

    def stamp(self, pages: list[int]) -> None:
        for page in pages:
            assert page not in self.owned, "a page was handed out twice"
            self.stamps += 1
            self.owned[page] = self.stamps
            self.keys[page * 8] = float(self.stamps)

    def shows(self, segment, pages: list[int]) -> bool:
        stamps = self.by_segment[segment.index, : len(pages) * 8 : 8, 0, 0].tolist()
        return stamps == [float(self.owned[page]) for page in pages]

    def arm(self, fail: int | None) -> None:
        self.vmm.fail_at = fail

    @rule(count=st.integers(1, CONTEXT_PAGES), fail=st.none() | st.integers(1, 6))
    @precondition(lambda self: len(self.requests) < RUNNING)
    def start(self, count: int, fail: int | None) -> None:
        self.arm(fail)
        try:
            pages = self.memory.allocate(count)
        except VMMError:
            pages = None
        self.arm(None)
        if pages is None:
            return
        self.stamp(pages)
        self.requests.append({"pages": pages, "segment": None})

    @rule(data=st.data(), fail=st.none() | st.integers(1, 4))
    @precondition(lambda self: self.requests)
    def grow(self, data, fail: int | None) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if len(request["pages"]) == CONTEXT_PAGES:
            return
        self.arm(fail)
        try:
            pages = self.memory.allocate(1)
        except VMMError:
            pages = None
        self.arm(None)
        if pages:
            self.stamp(pages)
            request["pages"] = request["pages"] + pages

    @rule(data=st.data(), fail=st.none() | st.integers(1, 5))
    @precondition(lambda self: self.requests)
    def launch(self, data, fail: int | None) -> None:
        """A batch of some requests: each leases, adopts, extends or reconciles its segment, then it runs."""
        batch = data.draw(st.lists(st.sampled_from(self.requests), min_size=1, unique_by=id))
        reads = []
        self.arm(fail)
        for request in batch:
            segment = request["segment"]
            if segment is None and self.parked and data.draw(st.booleans()):
                candidate = data.draw(st.sampled_from(self.parked))
                if candidate[0].state is SegmentState.PARKED:
                    segment = candidate[0]
            before = (segment, segment.state if segment else None)
            try:
                request["segment"] = self.memory.lease(segment, request["pages"])
            except VMMError:
                assert before[0] is None or before[0].state is before[1]
                continue
            if before[1] is SegmentState.PARKED:
                self.parked = [entry for entry in self.parked if entry[0] is not segment]
            assert self.shows(request["segment"], request["pages"])
            reads.append((request["segment"], list(request["pages"])))
        self.arm(None)
        self.flying.append((self.memory.launch(), reads))

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def lease_later(self, data) -> None:
        """A batch that does not read it: the worker maps, and may have done so before the next one that does."""
        request = data.draw(st.sampled_from(self.requests))
        segment = request["segment"]
        if segment is None and self.parked and data.draw(st.booleans()):
            candidate = data.draw(st.sampled_from(self.parked))
            if candidate[0].state is SegmentState.PARKED:
                segment = candidate[0]
                self.parked.remove(candidate)
        idle = self.memory.segments.idle
        request["segment"] = self.memory.lease_later(segment, request["pages"])
        assert (request["segment"] is None) == (segment is None and not idle)

    @rule()
    @precondition(lambda self: self.flying)
    def complete(self) -> None:
        """The oldest batch ends. Until here, it could read what it was launched on, by segment and by slot."""
        epoch, reads = self.flying.pop(0)
        for segment, pages in reads:
            for page in pages:
                self.keys[page * 8 : page * 8 + 8].sum()
            assert segment.pages[: len(pages)] == pages, "a segment changed under a running batch"
            self.by_segment[segment.index, : len(pages) * 8].sum()  # faults if anything was unmapped
        self.memory.complete(epoch)

    @rule(data=st.data())
    @precondition(lambda self: len(self.requests) > 1)
    def swap(self, data) -> None:
        """The tree had equal pages: a request's first pages become another's (which gives them to the tree)."""
        one, other = data.draw(st.permutations(self.requests))[:2]
        count = data.draw(st.integers(1, min(len(one["pages"]), len(other["pages"]))))
        theirs = other["pages"][:count]
        mine = one["pages"][:count]
        if set(theirs) & set(one["pages"]):
            return
        one["pages"] = theirs + one["pages"][count:]
        self.give_up([page for page in mine if all(page not in r["pages"] for r in self.requests)])

    def give_up(self, pages: list[int]) -> None:
        self.memory.free(pages)
        for page in pages:
            del self.owned[page]

    @rule(data=st.data(), park=st.booleans())
    @precondition(lambda self: self.requests)
    def finish(self, data, park: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        if request["segment"] is not None:
            if park:
                keep = data.draw(st.integers(1, len(request["pages"])))
                self.memory.park(request["segment"], request["pages"][:keep], object())
                self.parked.append((request["segment"], request["pages"][:keep]))
            else:
                self.memory.release(request["segment"])
        self.give_up([page for page in request["pages"] if all(page not in r["pages"] for r in self.requests)])

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def prepare(self, data) -> None:
        """A request waits that will share the first pages of another."""
        pages = data.draw(st.sampled_from(self.requests))["pages"]
        pages = pages[: data.draw(st.integers(1, len(pages)))]
        segment = self.memory.prepare(pages, object())
        if segment is not None:
            self.parked.append((segment, pages))

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def keep(self, data) -> None:
        """A request ends, and the page it did not fill is kept."""
        request = data.draw(st.sampled_from(self.requests))
        page = request["pages"][-1]
        if any(page in other["pages"] for other in self.requests if other is not request):
            return
        request["pages"] = request["pages"][:-1]
        if not request["pages"]:
            self.requests.remove(request)
            if request["segment"] is not None:
                self.memory.release(request["segment"])
        self.kept.append((self.memory.keep(page, 3), self.owned.pop(page)))

    @rule(data=st.data(), back=st.booleans())
    @precondition(lambda self: self.kept)
    def claim(self, data, back: bool) -> None:
        """Whoever continues it finds it as it was, or not at all."""
        tail, stamp = entry = data.draw(st.sampled_from(self.kept))
        self.kept.remove(entry)
        there = tail.page is not None
        page = self.memory.claim(tail)
        assert (page is not None) == there
        if page is None:
            self.memory.forget(tail)
            return
        assert self.keys[page * 8, 0, 0].item() == stamp
        if back:
            self.memory.unclaim(tail, page)
            self.kept.append(entry)
        elif len(self.requests) < RUNNING:
            self.owned[page] = stamp
            self.requests.append({"pages": [page], "segment": None})
        else:
            self.memory.free([page])

    @rule(fail=st.none() | st.integers(1, 3), turns=st.integers(1, 6))
    def housekeep(self, fail: int | None, turns: int) -> None:
        """The worker's part, in which any call of the driver may fail."""
        self.arm(fail)
        for _ in range(turns):
            self.memory.housekeep()
        self.arm(None)

    @rule(fail=st.none() | st.integers(1, 3))
    def trim(self, fail: int | None) -> None:
        self.arm(fail)
        with contextlib.suppress(VMMError):
            self.memory.trim()
        self.arm(None)

    @rule(limit=st.integers(1, CAPACITY))
    def set_limit(self, limit: int) -> None:
        self.memory.allow(limit)

    @invariant()
    def sums_agree(self) -> None:
        self.memory.check_integrity()
        assert self.memory.pages.owned == len(self.owned)
        assert self.vmm.created_bytes == self.memory.pages.backed * LAYOUT.page_bytes
        counts = self.memory.segments.counts()
        assert counts["leased"] == sum(r["segment"] is not None for r in self.requests)
        assert self.memory.pages.tails == sum(tail.page is not None for tail, _ in self.kept)

    @invariant()
    def no_page_lost_its_bytes(self) -> None:
        for page, stamp in self.owned.items():
            assert self.keys[page * 8, 0, 0].item() == stamp

    def teardown(self) -> None:
        LOGGER.setLevel(logging.NOTSET)
        for tail, _ in self.kept:
            self.memory.forget(tail)
        for request in list(self.requests):
            self.requests.remove(request)
            if request["segment"] is not None:
                self.memory.release(request["segment"])
            self.give_up([page for page in request["pages"] if all(page not in r["pages"] for r in self.requests)])
        self.memory.segments.drop_parked()
        self.memory.complete(self.memory.launch())
        self.memory.reserve_pages = 0
        while self.memory.housekeep():
            pass
        assert self.memory.pages.owned == 0
        assert self.memory.segments.mappings() == 0
        self.memory.close()
        assert self.vmm.created_bytes == 0


MemoryMachine.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestMemory = MemoryMachine.TestCase
