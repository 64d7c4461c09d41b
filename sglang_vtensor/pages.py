"""The page pool: which physical pages exist, which are free, which are owned, and the identity region they sit in.

    unbacked --back--> free --allocate--> owned
        ^               | ^                 |
        +----- trim ----+ +------ free -----+
        +--- again --- stuck: the driver did not take its memory back

A page has one owner at a time: a request while it is being written, then the tree node that caches it. Sharing needs
no count here, because the tree counts who reads a node (SGLang's lock_ref), and a node gives a page up only when
nobody does.

A page that no node can cache, because it is not full, may be kept when its owner gives it up: it is free, and until it
is forgotten whoever continues its text may claim it with what stands in it (`Tail`). When it is forgotten depends on
what is owned and kept, never on what a driver or the worker did: ranks with one history keep the same ones
(invariant 8).
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_vtensor.vmm import Handle, VirtualMemory, VMMError


class PageState(enum.IntEnum):
    UNBACKED = 0
    FREE = 1
    OWNED = 2
    #: On its way from unbacked to free or back, in the hands of whoever calls the driver for it.
    MOVING = 3
    #: It was to give its memory back, and a call of the driver failed. Nobody gets it before that was tried again.
    STUCK = 4


@dataclass(eq=False)
class Tail:
    """A free page whose bytes are still what its last owner wrote: `tokens` of them, at `kept_at` (`time.monotonic`).
    `page` is None once it was forgotten."""

    page: int | None
    tokens: int = 0
    kept_at: float = 0.0


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
        self._mapped = bytearray(num_pages)  # whether the page's handle is mapped at its place
        self._aliases = [0] * num_pages  # mappings of a page in segments: it cannot be released before they go
        self._freed_at = [0] * num_pages  # the epoch that was the newest when the page was freed
        self._free: deque[int] = deque()  # last freed first handed out: the oldest end is what trim takes
        self._tails: OrderedDict[int, Tail] = OrderedDict()  # by page, the longest kept first; free, but not in `_free`
        #: Tokens in tails.
        self.kept_tokens = 0
        self._stuck: deque[int] = deque()  # the one that was tried last is the last
        self._unbacked = list(range(1, num_pages))  # a heap: low addresses first
        self._owned = 0
        self.moving = 0
        self.create_page(0)
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
    def stuck(self) -> int:
        """Pages whose memory the driver did not take back when it was last asked to."""
        return len(self._stuck)

    @property
    def backed(self) -> int:
        """Pages that hold memory, the padding page included; not those on their way."""
        return 1 + self._owned + self.free_backed + self.stuck

    def available(self) -> int:
        """How many pages `allocate` may hand out before the limit is reached."""
        return max(0, self.limit - self._owned)

    def handle(self, page: int) -> Handle:
        if not self._mapped[page]:
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

    def make_room(self, count: int) -> None:
        """Forget the tails, longest kept first, that `count` more owned pages leave no room for below the limit."""
        self.forget_tails(max(0, self.available() - count))

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, now owned by the caller; None if the limit has no room for all of them beside the tails, if
        the driver gives none (`refusal` says why), or if the last ones are `moving`.

        After None nothing is owned that was not before. Pages that were created on the way stay backed and free.
        """
        if count > self.available() - self.tails:
            return None
        if count > len(self._free):
            with contextlib.suppress(VMMError):
                self.back(count - len(self._free))
        if count > len(self._free):
            return None  # the rest is refused, or in the worker's hands
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

    def keep(self, page: int, epoch: int = 0, tail: Tail | None = None, *, tokens: int = 0) -> Tail:
        """Take an owned page back as `free` does, and remember that its bytes may be wanted: as a new tail of `tokens`
        tokens, or as the one that it was claimed by."""
        self.free([page], epoch)
        self._free.pop()  # it was the last one freed
        tail = tail or Tail(None, tokens, time.monotonic())
        tail.page = page
        self._tails[page] = tail
        self.kept_tokens += tail.tokens
        return tail

    def _drop(self, tail: Tail) -> int:
        """The tail is none any more. Returns the page that it had."""
        page = tail.page
        assert page is not None
        del self._tails[page]
        tail.page = None
        self.kept_tokens -= tail.tokens
        return page

    def claim(self, tail: Tail) -> int | None:
        """The page of a tail, now the caller's, bytes and all; None if it was forgotten, or the limit is reached."""
        if tail.page is None or not self.available():
            return None
        page = self._drop(tail)
        self._state[page] = PageState.OWNED
        self._owned += 1
        return page

    def forget(self, tail: Tail) -> None:
        """Nobody wants the tail any more: its page is free like any other."""
        if tail.page is not None:
            self._free.append(self._drop(tail))

    def forget_tails(self, keep: int = 0) -> None:
        """Forget the longest kept ones until `keep` are left."""
        while len(self._tails) > keep:
            self.forget(next(iter(self._tails.values())))

    def forget_old_tails(self, before: float) -> None:
        """Forget those that were kept before that time, as `time.monotonic` counts."""
        while self._tails and (oldest := next(iter(self._tails.values()))).kept_at < before:
            self.forget(oldest)

    # Physical memory. Each change is begin (take the page in hand), a call of the driver, and finish, so that the
    # driver can be called without the lock that the other two need.

    def back(self, count: int) -> None:
        """Create `count` more pages and map them into the identity region. Raises `VMMError` (`OutOfMemory` where the
        device is full) at the first that fails: those before it are backed and free, that one is as it was. If they
        cannot be cleared, for which is waited once, all of them are as they were."""
        created: list[int] = []
        refusal = None
        while len(created) < count and (page := self.begin_back()) is not None:
            try:
                self._create(page)
                created.append(page)
            except VMMError as error:
                self.finish_back(page, created=False)
                refusal = error
                break
        try:
            if created:
                self.vmm.wait_cleared()
        except VMMError as error:
            refusal = error
            for page in created:
                self._take_down(page)
                self.finish_back(page, created=False)
        else:
            for page in created:
                self.finish_back(page, created=True)
        if refusal is not None:
            self.refusal = refusal
            raise refusal

    def begin_back(self) -> int | None:
        """Take an unbacked page in hand, the lowest; None if there is none."""
        if not self._unbacked:
            return None
        return self._take_in_hand(heapq.heappop(self._unbacked))

    def finish_back(self, page: int, *, created: bool) -> None:
        """The page in hand has memory now, and is free; or it was not created, and is as before (or stuck)."""
        if not created:
            self._let_go(page)
            return
        self.moving -= 1
        self._state[page] = PageState.FREE
        self._free.appendleft(page)
        self.creates += 1
        self.refusal = None

    def _let_go(self, page: int) -> None:
        """The page in hand is to have no memory. If it has some yet, that is tried again later."""
        self.moving -= 1
        if self._handles[page]:
            self._state[page] = PageState.STUCK
            self._stuck.append(page)
        else:
            self._state[page] = PageState.UNBACKED
            heapq.heappush(self._unbacked, page)

    def trim(self, keep: int, completed: int) -> int:
        """Give free pages back to the driver, the longest free first, until `keep` are left. Returns how many. Raises
        `VMMError` at the first that the driver does not take: that page is stuck."""
        released = 0
        while (page := self.begin_trim(keep, completed)) is not None:
            try:
                self.release_page(page)
            finally:
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
                return self._take_in_hand(page)
        return None

    def begin_again(self, due: Callable[[int], bool] = lambda page: True) -> int | None:
        """Take in hand a page that is stuck, and `due`, as `begin_trim` does; None if there is none."""
        for page in self._stuck:
            if due(page):
                self._stuck.remove(page)
                return self._take_in_hand(page)
        return None

    def _take_in_hand(self, page: int) -> int:
        self._state[page] = PageState.MOVING
        self.moving += 1
        return page

    def finish_trim(self, page: int) -> None:
        """The page in hand has no memory any more; or, where `release_page` failed, it is stuck."""
        self._let_go(page)
        self.releases += self._state[page] == PageState.UNBACKED

    def count_alias(self, page: int, change: int) -> None:
        """Note that a segment maps the page (+1) or no longer does (-1)."""
        self._aliases[page] += change
        assert self._aliases[page] >= 0, f"page {page} lost a mapping it never had"

    def create_page(self, page: int) -> None:
        """Create the memory of a page in hand, map it at its place and clear it. On failure nothing is left of it, or
        what the driver does not take back either (`finish_back` sees that)."""
        self._create(page)
        try:
            self.vmm.wait_cleared()
        except VMMError:
            self._take_down(page)
            raise

    def _create(self, page: int) -> None:
        """As `create_page`; its clearing is only begun."""
        self._handles[page] = self.vmm.create(self.page_bytes)
        try:
            self.vmm.map(self.address(page), self.page_bytes, self._handles[page])
            self._mapped[page] = 1
            self.vmm.clear(self.address(page), self.page_bytes)
        except VMMError:
            self._take_down(page)
            raise

    def _take_down(self, page: int) -> None:
        """As `release_page`, behind another failure, which is the one to be told."""
        with contextlib.suppress(VMMError):
            self.release_page(page)

    def release_page(self, page: int) -> None:
        """Unmap a page in hand from its place and release its memory. After a failure, it goes on where that was."""
        # The mapping goes first: a handle released while mapped keeps its memory (invariant 4).
        if self._mapped[page]:
            self.vmm.unmap(self.address(page), self.page_bytes)
            self._mapped[page] = 0
        self.vmm.release(self._handles[page])
        self._handles[page] = Handle(0)

    def close(self) -> None:
        """Unmap and release everything, owned or not. The pool is not to be used after."""
        for page, handle in enumerate(self._handles):
            if handle:
                self.release_page(page)
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
        assert self.kept_tokens == sum(tail.tokens for tail in self._tails.values())
        assert counts[PageState.UNBACKED] == len(self._unbacked) == len(set(self._unbacked))
        assert counts[PageState.MOVING] == self.moving
        assert counts[PageState.STUCK] == len(self._stuck) == len(set(self._stuck))
        assert self._owned + self.tails <= self.limit, (self._owned, self.tails, self.limit)
        settled = [page for page in range(self.num_pages) if self._state[page] != PageState.MOVING]
        for page in settled:
            backed = self._state[page] != PageState.UNBACKED
            assert bool(self._handles[page]) == backed, f"page {page}: {self.state(page).name}, handle {backed}"
            assert backed or not self._aliases[page], f"page {page} is unbacked but mapped in {self._aliases[page]}"
            usable = self._state[page] in (PageState.FREE, PageState.OWNED)
            assert self._mapped[page] or not usable, f"page {page}: {self.state(page).name}, and not mapped"
        handles = [self._handles[page] for page in settled if self._handles[page]]
        assert len(handles) == len(set(handles)) == self.backed
