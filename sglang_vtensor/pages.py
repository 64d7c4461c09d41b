"""The page pool: which physical pages exist, which are free, which are owned, and the identity region they sit in.

    unbacked --back--> free --allocate--> owned
        ^               | ^                 |
        +----- trim ----+ +------ free -----+

A page has one owner at a time: a request while it is being written, then the tree node that caches it. Sharing needs
no count here, because the tree counts who reads a node (SGLang's lock_ref), and a node gives a page up only when
nobody does.

A page that no node can cache, because it is not full, may be kept when its owner gives it up: it is free, and handed
out after all others, and until then whoever continues its text may claim it with what stands in it (`Tail`).
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_vtensor.vmm import Handle, VirtualMemory, VMMError


class PageState(enum.IntEnum):
    UNBACKED = 0
    FREE = 1
    OWNED = 2
    #: On its way from unbacked to free or back, in the hands of whoever calls the driver for it.
    MOVING = 3


@dataclass(eq=False)
class Tail:
    """A free page whose bytes are still what its last owner wrote. `page` is None once it was handed out."""

    page: int | None


class PagePool:
    """`num_pages` pages of `page_bytes`, and the identity region: page i, while backed, is mapped at
    `base + i * page_bytes`.

    Page 0 is always backed and never handed out: SGLang writes padding to slot 0 (invariant 5). Not thread-safe.
    """

    def __init__(self, vmm: VirtualMemory, page_bytes: int, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages holds nothing beside the padding page: give at least 2")
        self.vmm = vmm
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.limit = num_pages - 1
        self.base = vmm.reserve(num_pages * page_bytes)
        self.creates = 0
        self.releases = 0
        #: Why the driver gave no page when it was last asked for one; None since it gave one again.
        self.refusal: VMMError | None = None
        self._state = bytearray(num_pages)
        self._handles: list[Handle] = [Handle(0)] * num_pages
        self._aliases = [0] * num_pages  # mappings of a page in segments: it cannot be released before they go
        self._freed_at = [0] * num_pages  # the epoch that was the newest when the page was freed
        self._free: deque[int] = deque()  # last freed first handed out: the oldest end is what trim takes
        self._tails: OrderedDict[int, Tail] = OrderedDict()  # by page, the longest kept first; free, but not in `_free`
        #: Whether tails are handed out when the driver refuses. Ranks that must stay alike turn it off.
        self.tails_when_refused = True
        self._unbacked = list(range(1, num_pages))  # a heap: low addresses first
        self._owned = 0
        self.moving = 0
        self._handles[0] = self.create_page(0)
        self._state[0] = PageState.OWNED

    # What there is.

    @property
    def owned(self) -> int:
        """Pages that requests and nodes own; the padding page is not among them."""
        return self._owned

    @property
    def free_backed(self) -> int:
        return len(self._free) + len(self._tails)

    @property
    def ready(self) -> int:
        """Free pages that hold nothing anybody wants."""
        return len(self._free)

    @property
    def tails(self) -> int:
        return len(self._tails)

    @property
    def backed(self) -> int:
        """Pages that hold memory, the padding page included; not those on their way."""
        return 1 + self._owned + self.free_backed

    def available(self) -> int:
        """How many pages `allocate` may hand out before the limit is reached."""
        return max(0, self.limit - self._owned)

    def handle(self, page: int) -> Handle:
        if not self._handles[page]:
            raise VMMError("map", f"page {page} is {PageState(self._state[page]).name}, not backed")
        return self._handles[page]

    def address(self, page: int) -> int:
        return self.base + page * self.page_bytes

    def state(self, page: int) -> PageState:
        return PageState(self._state[page])

    def unused_pages(self) -> list[int]:
        """Every page that is not owned, ascending."""
        return [page for page in range(1, self.num_pages) if self._state[page] != PageState.OWNED]

    # Hand out and take back.

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, now owned by the caller; None if the limit has no room for all of them, if the driver gives
        none (`refusal` says why), or if the last ones are `moving`.

        Tails go last, the longest kept first. After None nothing is owned that was not before, and nothing forgotten.
        Pages that were created on the way stay backed and free.
        """
        if count > self.available():
            return None
        if count > len(self._free):
            try:
                self.back(count - len(self._free))
            except VMMError:
                if not self.tails_when_refused:
                    return None
        if count > self.free_backed:
            return None  # the rest is refused, or in the worker's hands
        while count > len(self._free):
            self.forget(next(iter(self._tails.values())))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._state[page] = PageState.OWNED
        self._owned += count
        return pages

    def free(self, pages: Sequence[int], epoch: int = 0) -> None:
        """Take owned pages back. Batches up to `epoch` may still read them; they stay backed until those are done."""
        for page in pages:
            if not 0 < page < self.num_pages or self._state[page] != PageState.OWNED:
                raise ValueError(f"page {page} is not owned, so it cannot be freed: it was freed before, or never was")
            self._state[page] = PageState.FREE
            self._freed_at[page] = epoch
        self._free.extend(pages)
        self._owned -= len(pages)

    # Tails.

    def keep(self, page: int, epoch: int = 0, tail: Tail | None = None) -> Tail:
        """Take an owned page back as `free` does, and remember that its bytes may be wanted: as a new tail, or as the
        one that it was claimed by."""
        self.free([page], epoch)
        self._free.pop()  # it was the last one freed
        tail = tail or Tail(None)
        tail.page = page
        self._tails[page] = tail
        return tail

    def claim(self, tail: Tail) -> int | None:
        """The page of a tail, now the caller's, bytes and all; None if it was handed out, or the limit is reached."""
        page = tail.page
        if page is None or not self.available():
            return None
        del self._tails[page]
        tail.page = None
        self._state[page] = PageState.OWNED
        self._owned += 1
        return page

    def forget(self, tail: Tail) -> None:
        """Nobody wants the tail any more: its page is free like any other."""
        if tail.page is not None:
            del self._tails[tail.page]
            self._free.append(tail.page)
            tail.page = None

    def forget_tails(self, keep: int = 0) -> None:
        """Forget the longest kept ones until `keep` are left."""
        while len(self._tails) > keep:
            self.forget(next(iter(self._tails.values())))

    # Physical memory. Each change is begin (take the page in hand), a call of the driver, and finish, so that the
    # driver can be called without the lock that the other two need.

    def back(self, count: int) -> None:
        """Create `count` more pages and map them into the identity region. Raises `VMMError` (`OutOfMemory` where the
        device is full) at the first that fails: those before it are backed and free, that one is as it was. If they
        cannot be cleared, for which is waited once, all of them are as they were."""
        created: list[tuple[int, Handle]] = []
        refusal = None
        while len(created) < count and (page := self.begin_back()) is not None:
            try:
                created.append((page, self._create(page)))
            except VMMError as error:
                self.finish_back(page, None)
                refusal = error
                break
        try:
            if created:
                self.vmm.wait_cleared()
        except VMMError as error:
            refusal = error
            for page, handle in created:
                self._destroy(page, handle)
                self.finish_back(page, None)
        else:
            for page, handle in created:
                self.finish_back(page, handle)
        if refusal is not None:
            self.refusal = refusal
            raise refusal

    def begin_back(self) -> int | None:
        """Take an unbacked page in hand, the lowest; None if there is none."""
        if not self._unbacked:
            return None
        page = heapq.heappop(self._unbacked)
        self._state[page] = PageState.MOVING
        self.moving += 1
        return page

    def finish_back(self, page: int, handle: Handle | None) -> None:
        """The page in hand has memory now, and is free; or has none (`handle` is None), and is as before."""
        self.moving -= 1
        if handle is None:
            self._state[page] = PageState.UNBACKED
            heapq.heappush(self._unbacked, page)
            return
        self._handles[page] = handle
        self._state[page] = PageState.FREE
        self._free.appendleft(page)
        self.creates += 1
        self.refusal = None

    def trim(self, keep: int, completed: int) -> int:
        """Give free pages back to the driver, the longest free first, until `keep` are left. Returns how many."""
        released = 0
        while (page := self.begin_trim(keep, completed)) is not None:
            self.release_page(page)
            self.finish_trim(page)
            released += 1
        return released

    def begin_trim(self, keep: int, completed: int) -> int | None:
        """Take in hand the longest-free page that may go; None if `keep` or fewer are free, or none may.

        A page stays while a segment still maps it, or a batch later than `completed` may still read it.
        """
        if len(self._free) <= keep:
            return None
        for page in self._free:
            if not self._aliases[page] and self._freed_at[page] <= completed:
                self._free.remove(page)
                self._state[page] = PageState.MOVING
                self.moving += 1
                return page
        return None

    def finish_trim(self, page: int) -> None:
        """The page in hand has no memory any more."""
        self.moving -= 1
        self._handles[page] = Handle(0)
        self._state[page] = PageState.UNBACKED
        heapq.heappush(self._unbacked, page)
        self.releases += 1

    def count_alias(self, page: int, change: int) -> None:
        """Note that a segment maps the page (+1) or no longer does (-1)."""
        self._aliases[page] += change
        assert self._aliases[page] >= 0, f"page {page} lost a mapping it never had"

    def create_page(self, page: int) -> Handle:
        """Create the memory of a page in hand, map it at its place and clear it. On failure nothing is left of it."""
        handle = self._create(page)
        try:
            self.vmm.wait_cleared()
        except VMMError:
            self._destroy(page, handle)
            raise
        return handle

    def _create(self, page: int) -> Handle:
        """As `create_page`; its clearing is only begun."""
        handle = self.vmm.create(self.page_bytes)
        try:
            self.vmm.map(self.address(page), self.page_bytes, handle)
        except VMMError:
            self.vmm.release(handle)
            raise
        try:
            self.vmm.clear(self.address(page), self.page_bytes)
        except VMMError:
            self._destroy(page, handle)
            raise
        return handle

    def _destroy(self, page: int, handle: Handle) -> None:
        # The mapping goes first: a handle released while mapped keeps its memory (invariant 4).
        self.vmm.unmap(self.address(page), self.page_bytes)
        self.vmm.release(handle)

    def release_page(self, page: int) -> None:
        """Unmap a page in hand from its place and release its memory."""
        self._destroy(page, self._handles[page])

    def close(self) -> None:
        """Unmap and release everything, owned or not. The pool is not to be used after."""
        for page, handle in enumerate(self._handles):
            if handle:
                self.vmm.unmap(self.address(page), self.page_bytes)
                self.vmm.release(handle)
                self._handles[page] = Handle(0)
        self.vmm.free(self.base, self.num_pages * self.page_bytes)

    def check_integrity(self) -> None:
        """Invariants 1 and 4, as far as the pool alone can see."""
        counts = {state: self._state.count(state) for state in PageState}
        assert counts[PageState.OWNED] == self._owned + 1, (counts, self._owned)
        assert counts[PageState.FREE] == len({*self._free, *self._tails}) == self.free_backed, (
            counts,
            self.free_backed,
        )
        assert all(tail.page == page for page, tail in self._tails.items())
        assert counts[PageState.UNBACKED] == len(self._unbacked) == len(set(self._unbacked))
        assert counts[PageState.MOVING] == self.moving
        settled = [page for page in range(self.num_pages) if self._state[page] != PageState.MOVING]
        for page in settled:
            backed = self._state[page] != PageState.UNBACKED
            assert bool(self._handles[page]) == backed, f"page {page}: {self.state(page).name}, handle {backed}"
            assert backed or not self._aliases[page], f"page {page} is unbacked but mapped in {self._aliases[page]}"
        handles = [self._handles[page] for page in settled if self._handles[page]]
        assert len(handles) == len(set(handles)) == self.backed
