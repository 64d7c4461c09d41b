"""The segment pool: runs of addresses on which the pages of one root-to-leaf path lie in order.

    idle --take--> leased --park--> parked --adopt--> leased
     ^               |                 |
     +--- reclaim -- retired <---------+

A parked segment need not show all of its path yet: what is missing (pages born in decode, the prefix of a request that
still waits) is mapped behind, and what it shows too much unmapped, one page at a time (`begin_tidy`).

A segment is as long as the longest context. Kernels read it as a plain strided tensor, so before a batch may read n
tokens of it, its first ceil(n / page_tokens) pages must be the request's pages, in order (invariant 2): `fit` makes
that so, and is the only thing that maps. A segment that a batch in flight may still read is never changed, only
retired, and unmapped when that batch is done (invariant 3). What is mapped behind the pages in use is stale and
harmless: nobody reads it, and the next `fit` replaces it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sglang_vtensor.pages import PagePool, PageState
from sglang_vtensor.vmm import VirtualMemory, VMMError

#: Idle segments that are not prepared for requests that wait, but kept for those that begin.
SPARE = 2


class SegmentState(enum.Enum):
    IDLE = "idle"
    LEASED = "leased"
    PARKED = "parked"
    RETIRED = "retired"
    PINNED = "pinned"


@dataclass(eq=False)
class Segment:
    """One run of addresses. `pages[i]` is what is mapped at `address + i * page_bytes`."""

    index: int
    address: int
    state: SegmentState = SegmentState.IDLE
    pages: list[int] = field(default_factory=list)
    #: The last epoch whose batch may read the segment; beyond the pool's `completed` it is busy.
    busy_until: int = 0
    #: While parked, what it is parked at. None says to whoever remembers the segment that it is gone.
    owner: object = None
    #: While parked or followed, the pages it is to show, from its start.
    wanted: Sequence[int] = ()
    #: Parked for a request that has not begun, and not by one that is over.
    prepared: bool = False
    #: The mapping worker calls the driver for it at this moment, and nobody else may.
    in_hand: bool = False


class SegmentPool:
    """`num_segments` segments of `max_pages` pages each, in one reservation. Not thread-safe.

    `max_parked` bounds the segments that wait at tree leaves; the oldest is retired for a newer one, or for a request
    that finds no idle one. Those prepared for waiting requests are not counted there: they take idle segments only, of
    which they leave `SPARE`, and go before any that is parked.
    """

    def __init__(self, vmm: VirtualMemory, pages: PagePool, num_segments: int, max_pages: int, max_parked: int) -> None:
        if num_segments < 1 or max_pages < 1:
            raise ValueError(f"{num_segments} segments of {max_pages} pages: both must be at least 1")
        self.vmm = vmm
        self.page_pool = pages
        self.page_bytes = pages.page_bytes
        self.num_segments = num_segments
        self.max_pages = max_pages
        self.max_parked = max_parked
        self.segment_bytes = max_pages * self.page_bytes
        self.base = vmm.reserve(num_segments * self.segment_bytes)
        self.completed = 0
        self.maps = 0
        self.unmaps = 0
        self.maps_behind = 0
        self.adoptions = 0
        self.prepared = 0
        self.fresh = 0
        self.swaps = 0
        self.segments = [Segment(i, self.base + i * self.segment_bytes) for i in range(num_segments)]
        self._idle = list(reversed(self.segments))
        self._parked: OrderedDict[int, Segment] = OrderedDict()  # by index, the longest parked first
        self._waiting: OrderedDict[int, Segment] = OrderedDict()  # parked for requests that have not begun
        self._untidy: dict[int, Segment] = {}  # parked or followed, and not yet as wanted; by index
        self._retired: deque[Segment] = deque()
        self._leased = 0
        self._pinned = 0
        self._reclaiming = 0
        #: Segments in the hands of whoever calls the driver for them without the lock.
        self.in_hand = 0

    @property
    def leased(self) -> int:
        """Segments that requests hold."""
        return self._leased

    @property
    def idle(self) -> int:
        """Segments that nobody has, with nothing mapped."""
        return len(self._idle)

    # Life of a segment.

    def take(self) -> Segment:
        """An idle segment with nothing mapped, leased to the caller. Retires the longest-parked one where none is.

        Raises `VMMError` if every segment is leased, or busy in flight.
        """
        if not self._idle:
            self.reclaim()  # the mapping worker was slower than the requests
        while not self._idle and (self._waiting or self._parked):
            self.drop(next(iter((self._waiting or self._parked).values())))
            self.reclaim()
        if not self._idle:
            raise VMMError(
                "take", f"all {self.num_segments} segments are in use: lower --max-running-requests to fewer than that"
            )
        segment = self._idle.pop()
        segment.state = SegmentState.LEASED
        self._leased += 1
        self.fresh += 1
        return segment

    def follow(self, segment: Segment, pages: Sequence[int]) -> None:
        """A leased segment is to show `pages`, but nobody waits for it: calls no driver, `begin_tidy` finds it. It is
        not to be read before it was fitted."""
        self._expect(segment, SegmentState.LEASED)
        segment.wanted = pages
        self._untidy[segment.index] = segment

    def park(self, segment: Segment, pages: Sequence[int], owner: object) -> None:
        """Leave a leased segment at `owner`, to show `pages` to the turn that continues it. Calls no driver: where the
        segment shows something else, `begin_tidy` finds it."""
        self._expect(segment, SegmentState.LEASED)
        self._unfollow(segment)
        self._leased -= 1
        segment.state = SegmentState.PARKED
        segment.owner = owner
        segment.wanted = pages
        (self._waiting if segment.prepared else self._parked)[segment.index] = segment
        if segment.pages != pages or segment.in_hand:
            self._untidy[segment.index] = segment
        while len(self._parked) > self.max_parked:
            self.drop(next(iter(self._parked.values())))

    def prepare(self, pages: Sequence[int], owner: object) -> Segment | None:
        """An idle segment, parked at `owner` to show `pages`; None where there is none to spare."""
        if len(self._idle) <= SPARE:
            return None
        segment = self.take()
        self.fresh -= 1
        segment.prepared = True
        self.park(segment, pages, owner)
        return segment

    def shorten(self, segment: Segment) -> bool:
        """Of what a parked segment is to show, leave out the last pages that nobody owns. Whether there are any."""
        self._expect(segment, SegmentState.PARKED)
        left = len(segment.wanted)
        while left and self.page_pool.state(segment.wanted[left - 1]) is not PageState.OWNED:
            left -= 1
        if left == len(segment.wanted):
            return False
        segment.wanted = segment.wanted[:left]
        self._untidy[segment.index] = segment
        return True

    def adopt(self, segment: Segment) -> Segment:
        """Lease a parked segment as it is."""
        self._unpark(segment)
        segment.state = SegmentState.LEASED
        self._leased += 1
        if segment.prepared:
            self.prepared += 1
        else:
            self.adoptions += 1
        segment.prepared = False
        return segment

    def release(self, segment: Segment) -> None:
        """The lease ends; what is mapped goes as soon as no batch reads it."""
        self._expect(segment, SegmentState.LEASED)
        self._unfollow(segment)
        self._leased -= 1
        self._retire(segment)

    def drop(self, segment: Segment) -> None:
        """A parked segment is not wanted any more."""
        self._unpark(segment)
        segment.prepared = False
        self._retire(segment)

    def _unpark(self, segment: Segment) -> None:
        self._expect(segment, SegmentState.PARKED)
        del (self._waiting if segment.prepared else self._parked)[segment.index]
        self._unfollow(segment)
        segment.owner = None

    def _unfollow(self, segment: Segment) -> None:
        self._untidy.pop(segment.index, None)
        segment.wanted = ()

    def drop_parked(self) -> int:
        """Drop every parked segment, the prepared ones too. Returns how many."""
        count = len(self._parked) + len(self._waiting)
        for segment in [*self._parked.values(), *self._waiting.values()]:
            self.drop(segment)
        return count

    def pin(self, page: int) -> Segment:
        """A segment that shows one page everywhere, for good: what padding requests of a batch read."""
        segment = self.take()
        self._map_on(segment, [page] * self.max_pages)
        segment.state = SegmentState.PINNED
        self._leased -= 1
        self.fresh -= 1
        self._pinned += 1
        return segment

    def reclaim(self) -> None:
        """Unmap the retired segments that no batch in flight reads any more. Those that the driver does not unmap stay
        retired."""
        failed: set[Segment] = set()
        while (segment := self.begin_reclaim(lambda segment: segment not in failed)) is not None:
            left = len(segment.pages)
            try:
                for left in self.unmap_segment(segment):  # noqa: B007
                    pass
            except VMMError:
                failed.add(segment)  # the mapping worker tries it again, and says so
            finally:
                self.finish_reclaim(segment, left)

    def begin_reclaim(self, due: Callable[[Segment], bool] = lambda segment: True) -> Segment | None:
        """Take in hand a retired segment that no batch reads any more, and that is `due`; None if there is none."""
        for segment in self._retired:
            if not self.is_busy(segment) and not segment.in_hand and due(segment):
                self._retired.remove(segment)
                self._reclaiming += 1
                self.in_hand += 1
                return segment
        return None

    def unmap_segment(self, segment: Segment) -> Iterator[int]:
        """Unmap a segment in hand, the last page first. Yields, after each call of the driver, how many are left."""
        for position in reversed(range(len(segment.pages))):
            self.vmm.unmap(segment.address + position * self.page_bytes, self.page_bytes)
            yield position

    def finish_reclaim(self, segment: Segment, left: int) -> None:
        """Of the segment in hand `left` pages are still mapped: none, and it is idle; or it is tried again."""
        self._reclaiming -= 1
        self.in_hand -= 1
        for page in segment.pages[left:]:
            self.page_pool.count_alias(page, -1)
        self.unmaps += len(segment.pages) - left
        del segment.pages[left:]
        if left:
            self._retired.append(segment)
            return
        segment.state = SegmentState.IDLE
        self._idle.append(segment)

    def exhausted(self) -> bool:
        """No segment is idle, and none can be made so without waiting for a batch or for the worker: `take` fails."""
        return (
            not self._idle
            and all(segment.in_hand for segment in self._parked.values())
            and all(segment.in_hand for segment in self._waiting.values())
            and all(segment.in_hand or self.is_busy(segment) for segment in self._retired)
        )

    def begin_tidy(self, due: Callable[[Segment], bool] = lambda segment: True) -> tuple[Segment, int | None] | None:
        """Take in hand a segment that is not as it is wanted, and `due`, with the page to be mapped behind its last
        one; or with None, if its last page is to be unmapped, and no batch reads it: of a parked one only, as the batch
        that is being made may be going to read a leased one. None if there is nothing to do."""
        for segment in list(self._untidy.values()):
            if not due(segment):
                continue
            shown = self.common(segment, segment.wanted)
            page = None
            if shown < len(segment.pages) and segment.state is SegmentState.PARKED:
                if self.is_busy(segment):
                    continue
            elif (
                shown == len(segment.pages) < len(segment.wanted)
                and self.page_pool.state(segment.wanted[shown]) is PageState.OWNED
            ):
                page = segment.wanted[shown]
                self.page_pool.count_alias(page, +1)  # before the call, so that the page stays while it is made
            else:
                del self._untidy[segment.index]
                continue
            segment.in_hand = True
            self.in_hand += 1
            return segment, page
        return None

    def tidy_segment(self, segment: Segment, page: int | None) -> None:
        """The driver's part of what `begin_tidy` returned."""
        if page is None:
            self.vmm.unmap(segment.address + (len(segment.pages) - 1) * self.page_bytes, self.page_bytes)
        else:
            address = segment.address + len(segment.pages) * self.page_bytes
            self.vmm.map(address, self.page_bytes, self.page_pool.handle(page))

    def finish_tidy(self, segment: Segment, page: int | None, *, done: bool) -> None:
        """The segment is out of hand. If it is not done, its turn comes again."""
        segment.in_hand = False
        self.in_hand -= 1
        if not done:
            if page is not None:
                self.page_pool.count_alias(page, -1)
        elif page is None:
            self.unmaps += 1
            self.page_pool.count_alias(segment.pages.pop(), -1)
        else:
            self.maps += 1
            self.maps_behind += 1
            segment.pages.append(page)

    def is_busy(self, segment: Segment) -> bool:
        return segment.busy_until > self.completed

    # What is mapped in it.

    def fit(self, segment: Segment, pages: Sequence[int]) -> Segment:
        """Make the segment's first `len(pages)` pages be `pages`; all of it, or on failure none.

        Returns the segment, or another one where it is busy and holds something else at those addresses: then it is
        retired and a fresh one is mapped from the start. Raises `ValueError` if the pages are more than it is long.
        """
        self._expect(segment, SegmentState.LEASED)
        if len(pages) > self.max_pages:
            raise ValueError(
                f"{len(pages)} pages do not fit a segment of {self.max_pages}: the context is longer than the model's"
            )
        self._unfollow(segment)
        common = self.common(segment, pages)
        if common == len(pages):
            return segment
        if common < len(segment.pages) and self.is_busy(segment):
            fresh = self.take()
            try:
                self._map_on(fresh, pages)
            except VMMError:
                self.release(fresh)
                raise
            self.release(segment)
            self.swaps += 1
            return fresh
        self.swaps += common < len(segment.pages)
        self._unmap_from(segment, common)  # stale: not worth restoring if the mapping below fails
        self._map_on(segment, pages)
        return segment

    def common(self, segment: Segment, pages: Sequence[int]) -> int:
        """How many leading pages the segment and `pages` have in common."""
        mapped = segment.pages
        short = min(len(mapped), len(pages))
        if mapped[:short] == pages[:short]:
            return short
        return next(i for i in range(short) if mapped[i] != pages[i])

    def _map_on(self, segment: Segment, pages: Sequence[int]) -> None:
        """Map `pages[len(segment.pages):]` behind what is mapped."""
        start = len(segment.pages)
        try:
            for position in range(start, len(pages)):
                page = pages[position]
                self.vmm.map(segment.address + position * self.page_bytes, self.page_bytes, self.page_pool.handle(page))
                self.maps += 1
                segment.pages.append(page)
                self.page_pool.count_alias(page, +1)
        except VMMError:
            self._unmap_from(segment, start)
            raise

    def _unmap_from(self, segment: Segment, keep: int) -> None:
        while len(segment.pages) > keep:
            position = len(segment.pages) - 1
            self.vmm.unmap(segment.address + position * self.page_bytes, self.page_bytes)
            self.unmaps += 1
            self.page_pool.count_alias(segment.pages.pop(), -1)

    def _retire(self, segment: Segment) -> None:
        segment.state = SegmentState.RETIRED
        self._retired.append(segment)

    def _expect(self, segment: Segment, state: SegmentState) -> None:
        if segment.state is not state:
            raise ValueError(f"segment {segment.index} is {segment.state.value}, {state.value} wanted")

    # What there is.

    def counts(self) -> dict[str, int]:
        """Segments by state."""
        return {
            "idle": len(self._idle),
            "leased": self._leased,
            "parked": len(self._parked) + len(self._waiting),
            "retired": len(self._retired) + self._reclaiming,
            "pinned": self._pinned,
        }

    def pending(self) -> bool:
        """Whether segments wait for a batch to end before they can be unmapped or tidied."""
        return bool(self._retired or self._untidy)

    def mappings(self) -> int:
        """Pages mapped in segments; the identity region is not counted."""
        return self.maps - self.unmaps

    def close(self) -> None:
        """Unmap everything and free the addresses. The pool is not to be used after."""
        for segment in self.segments:
            self._unmap_from(segment, 0)
        self.vmm.free(self.base, self.num_segments * self.segment_bytes)

    def check_integrity(self) -> None:
        """Every segment is in one state, and the pages' alias counts are what the segments map."""
        states = [segment.state for segment in self.segments]
        assert self.counts() == {state.value: states.count(state) for state in SegmentState}, self.counts()
        parked = {*self._parked, *self._waiting}
        assert {segment.index for segment in self.segments if segment.owner is not None} <= parked
        assert all(i in parked or self.segments[i].state is SegmentState.LEASED for i in self._untidy)
        assert {segment.index for segment in self.segments if segment.prepared} == set(self._waiting)
        assert len(self._parked) <= self.max_parked
        aliases = [0] * self.page_pool.num_pages
        for segment in self.segments:
            assert segment.state is not SegmentState.IDLE or not segment.pages, segment
            for page in segment.pages:
                aliases[page] += 1
        assert aliases == self.page_pool._aliases
        assert sum(aliases) == self.mappings()
