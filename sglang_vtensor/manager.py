"""The manager: the two pools behind one lock, the mapping worker, and what is told of them.

Everything that maps or unmaps goes through here. The scheduling thread calls it before each batch for exactly what that
batch needs. The mapping worker does the rest: pages created ahead of need, parked segments made to show their whole
path, retired ones unmapped, idle pages given back. It takes one page or segment in hand at a time and calls the driver
without the lock; the scheduling thread waits for it only where it needs just that page or segment.

Time is counted in epochs, one for each launched batch. What a batch may read carries its epoch, and is not unmapped
before `complete` has been told of it: nothing here waits for a device.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from sglang_vtensor.layout import KVLayout
from sglang_vtensor.pages import PagePool, Tail
from sglang_vtensor.segments import Segment, SegmentPool, SegmentState
from sglang_vtensor.vmm import VirtualMemory, VMMError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: After the driver refused, it is left alone for this long.
RETRY_SECONDS = 1.0
#: Whether the device is short for others is asked so often, by the worker.
LOOK_SECONDS = 1.0
#: Minimum time between two warnings of one kind: beside another process the driver may refuse many times a second.
WARN_SECONDS = 60.0
#: So long the scheduling thread waits, at most, for what the worker has in hand: a call of the driver takes
#: microseconds.
PATIENCE_SECONDS = 10.0
#: How long a thread with nothing to do leaves the interpreter to the worker at a time: what a request that arrives just
#: then waits.
GIVE_WAY_SECONDS = 0.001
#: Addresses that all segments together may take; reserving 64 TiB was seen to succeed, a process has 128.
SEGMENT_ADDRESS_BYTES = 32 << 40
#: Kernels count the tokens of all segments in 32 bits.
SEGMENT_TOKENS = 1 << 31


@dataclass(frozen=True)
class Stats:
    """A snapshot. Counts are pages or segments, `_bytes` and `_seconds` say so; counters grow from the start."""

    page_tokens: int
    page_bytes: int
    waste: float
    pages_capacity: int
    pages_limit: int
    pages_backed: int
    pages_free: int
    pages_kept: int
    kept_tokens: int
    pages_stuck: int
    pages_owned: int
    backed_bytes: int
    owned_bytes: int
    segments_idle: int
    segments_leased: int
    segments_parked: int
    segments_retired: int
    segment_mappings: int
    pages_created: int
    pages_released: int
    pages_allocated: int
    pages_shared: int
    prefix_tokens_served: int
    prompt_tokens: int
    partial_copies: int
    partial_tokens: int
    tails_continued: int
    maps: int
    unmaps: int
    maps_behind: int
    prefix_maps: int
    prefix_maps_on_continue: int
    adoptions: int
    prepared_segments: int
    fresh_segments: int
    swaps: int
    shortages: int
    worker_failures: int
    scheduling_seconds: float
    worker_seconds: float

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def affordable_segments(layout: KVLayout, max_tokens: int) -> int:
    """How many segments of `max_tokens` tokens have room beside each other."""
    max_pages = layout.pages_for(max_tokens)
    by_tokens = (SEGMENT_TOKENS - 1) // (max_pages * layout.page_tokens)
    return min(SEGMENT_ADDRESS_BYTES // (max_pages * layout.page_bytes), by_tokens)


def most_running(layout: KVLayout, max_tokens: int) -> int:
    """How many requests of up to `max_tokens` tokens may run at once, with as many segments left for parked ones."""
    return max(1, affordable_segments(layout, max_tokens) // 2)


class KVMemory:
    """The KV memory of one rank.

    `capacity_pages` is what requests and nodes may own together (the padding page comes on top); `max_tokens` the
    longest context; `num_segments` as many as requests may run, plus `max_parked`. `reserve_pages` are kept backed and
    free for what comes next, less what requests have left in the pages they are filling; free pages beyond them go back
    to the driver after `idle_seconds`.
    With `worker=False` nothing happens behind the caller's back: `housekeep` does one turn of the worker's.
    """

    def __init__(
        self,
        vmm: VirtualMemory,
        layout: KVLayout,
        *,
        capacity_pages: int,
        max_tokens: int,
        max_running: int,
        max_parked: int | None = None,
        reserve_pages: int = 0,
        idle_seconds: float = 10.0,
        worker: bool = True,
    ) -> None:
        if capacity_pages < 1:
            raise ValueError(
                f"the KV cache has room for {capacity_pages} pages of {layout.page_tokens} tokens "
                f"({layout.page_bytes} bytes): raise --mem-fraction-static or --max-total-tokens"
            )
        self.vmm = vmm
        self.layout = layout
        max_pages = layout.pages_for(max_tokens)
        affordable = affordable_segments(layout, max_tokens)
        if affordable <= max_running:
            raise ValueError(
                f"{max_running} requests of {max_tokens} tokens need more than {SEGMENT_ADDRESS_BYTES >> 40} TiB of "
                f"addresses, or 2^31 tokens: lower --max-running-requests to {most_running(layout, max_tokens)} or "
                "--context-length"
            )
        if max_parked is None:
            max_parked = max_running
        # Retired segments wait for a batch or two, so there are a few more than requests and parked ones.
        num_segments = min(affordable, max_running + max_parked + 16)
        self.pages = PagePool(vmm, layout.page_bytes, capacity_pages + 1)
        self.segments = SegmentPool(vmm, self.pages, num_segments, max_pages, min(max_parked, num_segments))
        self.reserve_pages = min(reserve_pages, capacity_pages)
        #: Pages that may hold memory beside the padding page: the capacity, or less (`allow`).
        self.allowance = capacity_pages
        self.idle_seconds = idle_seconds
        #: Tokens that the pages of what runs have room for yet, as of the last batch.
        self.unfilled_tokens = 0
        self.launched = 0
        self.pages_allocated = 0
        self.pages_shared = 0
        self.prefix_tokens_served = 0
        self.prompt_tokens = 0
        self.tails_continued = 0
        self.partial_copies = 0
        self.partial_tokens = 0
        self.prefix_maps = 0
        self.prefix_maps_on_continue = 0
        self.shortages = 0
        self.worker_failures = 0
        self.retry_seconds = RETRY_SECONDS
        #: What memory costs the scheduling thread, and whatever else that does for memory's sake: `with memory.clock`.
        self.clock = Clock()
        self.worker_seconds = 0.0
        self._region: torch.Tensor | None = None
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)  # the worker has let go of a page or a segment
        self._used_at = time.monotonic()
        self._retry_at = 0.0
        self._warn_at = 0.0
        self._look_at = 0.0
        self._device_low = False
        # The segments and pages for which the driver did not do what the worker asked, and until when they are left
        # alone: each by itself, so that one which never succeeds holds up no other.
        self._again_at: dict[Segment | int, float] = {}
        self._took_at = 0.0  # when the worker last took something in hand
        self._warn_of_worker_at = 0.0
        self._missed_at = 0.0  # of which of these times it was said that it does not let go
        self._wake = threading.Event()
        self._turn = threading.Lock()  # held while the worker does one thing
        self._paused = False
        self._working = False
        self._due_at = float("inf")  # the worker waits until then, or until it is woken
        self._closing = False
        self._thread: threading.Thread | None = None
        if worker:
            self._start_worker()
            # It is a daemon: it would go on calling the driver while the process takes that down.
            atexit.register(self._stop_worker)

    # Pages.

    def available_pages(self) -> int:
        return self.pages.available()

    def room(self, *, growing: bool = False) -> int:
        """How many pages may be owned beyond those that are; below 0 where the allowance was lowered meanwhile."""
        return self.pages.available() if growing else self.allowance - self.pages.owned

    @property
    def short(self) -> bool:
        """The driver refused when it was last asked: until it gives again, what is backed is all there is."""
        return self.pages.refusal is not None

    def missing_pages(self) -> int:
        """How many of `available_pages` are not to be had now: beyond the allowance, or refused by the driver."""
        refused = self.pages.available() - self.pages.free_backed if self.short else self.pages.stuck
        return max(self.pages.limit - self.allowance, refused, 0)

    def allow(self, pages: int) -> int:
        """From now on no more than `pages` pages are to hold memory, beside the padding page. Returns how many owned
        ones are too many, for the caller to evict.

        Free pages beyond that go back to the driver at once, kept ones with them; owned ones as they are freed. What
        runs may grow beyond it (`allocate`), and nothing else.
        """
        with self._timed():
            self.allowance = max(0, min(pages, self.pages.limit))
        return self.excess()

    def excess(self) -> int:
        """How many owned pages are beyond the allowance now, for the caller to evict. Kept ones beyond it are kept no
        longer: here and not by the worker, so that ranks with the same history forget the same ones."""
        with self._timed():
            self.pages.forget_tails(max(0, self.allowance - self.pages.owned))
        if self._over():
            self._wake_worker()
        return max(0, -self.room())

    def owes(self) -> int:
        """Free pages beyond the allowance, which the worker is to give back."""
        return min(self._over(), self.pages.free_backed)

    def _over(self) -> int:
        """Backed pages beyond the allowance."""
        return max(0, self.pages.backed - 1 - self.allowance)

    def allocate(self, count: int, *, growing: bool = False) -> list[int] | None:
        """`count` pages, or None where the limit or the device has no room for all of them. `growing` is for what runs
        already: the allowance does not hold it up, so that it comes to its end.

        Kept pages that the limit has no room for beside them are forgotten, also where the driver then refuses: so it
        depends on `count` alone, and ranks stay alike.
        """
        if not count:
            return []
        with self._timed():
            if count > self.room(growing=growing):
                return None
            self.pages.make_room(count)
            pages = self._allocate(count)
            patience = _patience()
            while pages is None and self.pages.moving and self._wait_for_worker(patience):
                pages = self._allocate(count)
            self._used_at = time.monotonic()
        if pages is not None:
            self.pages_allocated += count
            if self.pages.ready < self._kept_ready:
                self._wake_worker()
        return pages

    def _wait_for_worker(self, until: float) -> bool:
        """Wait until the worker has let go of something. False at `until`, and where the worker has kept what it has in
        hand for longer than any call of the driver takes: then whoever waits is to do without."""
        left = min(until, self._took_at + PATIENCE_SECONDS) - time.monotonic()
        if left > 0 and self._settled.wait(left):
            return True
        if self._missed_at != self._took_at:
            self._missed_at = self._took_at
            logger.error(
                "for %g s the mapping worker has not let go of a page or a segment that is needed: a call of the "
                "driver does not return. Requests wait until there is another one; restart the server if this goes on",
                PATIENCE_SECONDS,
            )
        return False

    def _allocate(self, count: int) -> list[int] | None:
        if count > self.pages.ready and self.short and time.monotonic() < self._retry_at:
            return None
        was = self.pages.refusal
        pages = self.pages.allocate(count)
        if self.pages.refusal is not was:
            self._answered(was)
        return pages

    def _answered(self, was: VMMError | None) -> None:
        """The driver refused, or gave again after it had: say so once, and when to ask again."""
        refusal = self.pages.refusal
        now = time.monotonic()
        if refusal is not None:
            self._retry_at = now + self.retry_seconds
            self.shortages += was is None
            if was is None and now >= self._warn_at:
                self._warn_at = now + WARN_SECONDS
                logger.warning(
                    "the device gives no more memory: %s. The KV cache stays at %d of %d pages, requests wait or are "
                    "retracted, and it asks again every %g s: free what else holds memory there, or lower "
                    "--mem-fraction-static",
                    refusal,
                    self.pages.backed,
                    self.pages.num_pages,
                    self.retry_seconds,
                )
        elif was is not None:
            logger.debug("the device gives memory again: %d pages are backed", self.pages.backed)

    def free(self, pages: Sequence[int]) -> None:
        """Take pages back. The batches launched so far may still read them, and the one being made."""
        if not pages:
            return
        with self._timed():
            self.pages.free(pages, self.next_epoch)

    def keep(self, page: int, tokens: int) -> Tail:
        """Take back a page that is not full, with `tokens` tokens, for the turn that continues its text; until it is
        needed otherwise."""
        with self._timed():
            return self.pages.keep(page, self.next_epoch, tokens=tokens)

    def claim(self, tail: Tail) -> int | None:
        """The page that was kept, with what is in it, now the caller's; None if it is not there any more."""
        with self._timed():
            page = self.pages.claim(tail)
        if page is not None:
            self.tails_continued += 1
        return page

    def unclaim(self, tail: Tail, page: int) -> None:
        """Take back what was claimed and not touched."""
        with self._timed():
            self.pages.keep(page, self.next_epoch, tail)
        self.tails_continued -= 1

    def forget(self, tail: Tail) -> None:
        with self._timed():
            self.pages.forget(tail)

    def forget_tails(self, count: int) -> int:
        """Forget `count` kept pages, the longest kept first. Returns how many there were."""
        with self._timed():
            before = self.pages.tails
            self.pages.forget_tails(max(0, before - count))
            return before - self.pages.tails

    def forget_old_tails(self, before: float) -> None:
        """Forget the pages that were kept before that time, as `time.monotonic` counts."""
        with self._timed():
            self.pages.forget_old_tails(before)

    def copy_tokens(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another, K and V of all layers, on the current stream. A token's bytes
        lie together, so that is one run of bytes."""
        if self._region is None:
            self._region = self.vmm.tensor(self.pages.base, self.pages.num_pages * self.layout.page_bytes)
        size = tokens * self.layout.stride_bytes
        from_, to = source * self.layout.page_bytes, target * self.layout.page_bytes
        self._region[to : to + size].copy_(self._region[from_ : from_ + size])
        self.partial_copies += 1
        self.partial_tokens += tokens

    def free_all(self) -> None:
        """Take every page back, and drop every segment: nothing is cached or running any more."""
        with self._timed():
            for segment in self.segments.segments:
                if segment.state is SegmentState.LEASED:
                    self.segments.release(segment)
            self.segments.drop_parked()
            self.pages.forget_tails()
            unused = set(self.pages.unused_pages())
            owned = [page for page in range(1, self.pages.num_pages) if page not in unused]
            self.pages.free(owned, self.next_epoch)
        self._wake_worker()

    # Segments.

    def lease(self, segment: Segment | None, pages: Sequence[int], *, shared: int = 0) -> Segment:
        """A segment on which `pages` lie in order, for the next batch to read.

        `segment` is the one the request holds, or a parked one to adopt, or None for a fresh one, which also takes the
        place of one that the worker does not let go of; `shared` says how many of the pages came from the tree, for the
        statistics. All or nothing: if a mapping fails (`VMMError`), what the request held it still holds, and the
        parked one is still parked.
        """
        with self._timed():
            patience = _patience()
            stuck = None
            while segment is not None and segment.in_hand:
                if not self._wait_for_worker(patience):
                    stuck, segment = segment, None
            parked = None
            if segment is None:
                while self.segments.exhausted() and self.segments.in_hand and self._wait_for_worker(patience):
                    pass
                held = self.segments.take()
            elif segment.owner is None:
                held = segment
            else:
                parked = (segment.wanted, segment.owner, segment.prepared)
                held = self.segments.adopt(segment)
            missing = max(0, shared - self.segments.common(held, pages))
            try:
                fitted = self.segments.fit(held, pages)
            except VMMError as error:
                if parked is not None:
                    wanted, owner, held.prepared = parked
                    self.segments.park(held, wanted, owner)
                elif segment is None:
                    self.segments.release(held)
                was, self.pages.refusal = self.pages.refusal, error
                self._answered(was)
                raise
            if stuck is not None and stuck.state is SegmentState.LEASED:
                self.segments.release(stuck)
            fitted.busy_until = self.next_epoch
            self.pages_shared += shared
            self.prefix_maps += missing
            if parked is not None and not parked[2]:
                self.prefix_maps_on_continue += missing
            return fitted

    def shown(self, segment: Segment | None, pages: Sequence[int]) -> int:
        """How many of `pages`, from the first one on, a segment shows in order."""
        with self._timed():
            return 0 if segment is None else self.segments.common(segment, pages)

    def shows(self, segment: Segment, pages: Sequence[int]) -> bool:
        """Whether a batch may read `pages` from a leased segment as it is: they lie there in order, page by page, and
        the worker is not about to unmap one (it may have begun while the segment was parked)."""
        with self._timed():
            return not segment.in_hand and self.segments.common(segment, pages) == len(pages)

    def lease_later(self, segment: Segment | None, pages: Sequence[int]) -> Segment | None:
        """As `lease`, for a batch that does not read the segment: the worker maps what is missing. To be leased before
        it is read. None where no segment is idle."""
        with self._timed():
            if segment is None:
                if not self.segments.idle:
                    return None
                segment = self.segments.take()
            elif segment.owner is not None:
                segment = self.segments.adopt(segment)
            self.segments.follow(segment, list(pages))
        self._wake_worker()
        return segment

    def pin_padding(self) -> Segment:
        """A segment that shows the padding page at every address, for the padding requests of captured batches."""
        with self._timed():
            return self.segments.pin(0)

    def park(self, segment: Segment, pages: Sequence[int], owner: object) -> None:
        """Leave a leased segment at `owner` (a tree node) for the turn that continues it. The worker sees to it that
        it shows `pages`, which is the whole path."""
        with self._timed():
            self.segments.park(segment, pages, owner)
        self._wake_worker()

    def prepare(self, pages: Sequence[int], owner: object) -> Segment | None:
        """A segment parked at `owner`, a request that still waits, for the worker to map the prefix it will share.

        None where no idle segment is to spare.
        """
        with self._timed():
            segment = self.segments.prepare(pages, owner)
        self._wake_worker()
        return segment

    def shorten(self, segment: Segment) -> None:
        """Of the pages that a prepared segment is to show, nobody owns the last ones any more, perhaps: then it shows
        only those before them, and the worker unmaps the rest."""
        with self._timed():
            shortened = self.segments.shorten(segment)
        if shortened:
            self._wake_worker()

    def release(self, segment: Segment) -> None:
        with self._timed():
            self.segments.release(segment)
        self._wake_worker()

    def drop(self, segment: Segment) -> None:
        with self._timed():
            self.segments.drop(segment)
        self._wake_worker()

    # Epochs.

    @property
    def next_epoch(self) -> int:
        """The epoch of the batch that is being made: it may read what was freed or leased until it is launched."""
        return self.launched + 1

    def launch(self) -> int:
        """A batch was launched. Returns its epoch, to be given to `complete` when the device has done it."""
        self.launched += 1
        return self.launched

    def complete(self, epoch: int) -> None:
        """Every batch up to `epoch` is done."""
        if epoch > self.segments.completed:
            self.segments.completed = epoch
            if self.segments.pending() or self._over():
                self._wake_worker()

    # The worker.

    def housekeep(self) -> bool:
        """One turn of what needs not be done now. True if it did something, and there may be more.

        The driver is called without the lock: the page or the segment is in this thread's hands meanwhile, and nobody
        else's. Whatever comes of the call, it is let go of; what the driver did not do is tried again after
        `retry_seconds`, and everything else goes on.
        """
        if (segment := self._take_in_hand(lambda: self.segments.begin_reclaim(self._due))) is not None:
            self._reclaim(segment)
            return True
        if (untidy := self._take_in_hand(lambda: self.segments.begin_tidy(self._due))) is not None:
            self._tidy(*untidy)
            return True
        if (page := self._take_in_hand(self._page_to_back)) is not None:
            return self._back(page)
        self._look_at_device()
        if (page := self._take_in_hand(self._page_to_trim)) is not None:
            self._trim(page)
            return True
        return False

    def _due(self, what: Segment | int) -> bool:
        return time.monotonic() >= self._again_at.get(what, 0.0)

    def _take_in_hand(self, begin: Callable[[], T | None]) -> T | None:
        with self._lock:
            taken = begin()
            if taken is not None:
                self._took_at = time.monotonic()
            return taken

    @contextlib.contextmanager
    def _calling_driver(self, what: Segment | int, let_go: Callable[[], None]) -> Iterator[None]:
        """A call of the driver for what is in hand, which is let go of behind it, whatever came of it."""
        try:
            yield
            self._again_at.pop(what, None)
        except VMMError as error:
            self.worker_failures += 1
            now = time.monotonic()
            self._again_at[what] = now + self.retry_seconds
            if now >= self._warn_of_worker_at:
                self._warn_of_worker_at = now + WARN_SECONDS
                logger.error("%s; the mapping worker tries it again every %g s", error, self.retry_seconds)
        finally:
            with self._settled:
                let_go()
                self._settled.notify_all()

    def _reclaim(self, segment: Segment) -> None:
        left = len(segment.pages)
        with self._calling_driver(segment, lambda: self.segments.finish_reclaim(segment, left)):
            for left in self.segments.unmap_segment(segment):  # noqa: B007
                with self._lock:
                    pass  # the driver has a lock too: whoever maps for a batch goes first

    def _trim(self, page: int) -> None:
        with self._calling_driver(page, lambda: self.pages.finish_trim(page)):
            self.pages.release_page(page)

    def _tidy(self, segment: Segment, page: int | None) -> None:
        """If it fails, the segment stays as it is, to be tried again: whoever leases it before maps the rest."""
        done = False

        def let_go() -> None:
            self.segments.finish_tidy(segment, page, done=done)

        with self._calling_driver(segment, let_go):
            self.segments.tidy_segment(segment, page)
            done = True

    @property
    def _kept_ready(self) -> int:
        """Free pages that are to be ready. What is left in the pages that requests fill is ready too; and in those that
        were kept unfinished, which are half empty on average."""
        left = self.unfilled_tokens // self.layout.page_tokens + self.pages.tails // 2
        return max(0, self.reserve_pages - left)

    def _page_to_back(self) -> int | None:
        if self._device_low:
            return None
        there = self.pages.ready
        available = max(0, self.allowance - self.pages.owned - self.pages.tails)
        wanted = min(self._kept_ready, available)
        if self.short:  # one page more than there is tells whether the driver gives again
            wanted = min(max(wanted, there + 1), available)
        if there >= wanted or (self.short and time.monotonic() < self._retry_at):
            return None
        return self.pages.begin_back()

    def _back(self, page: int) -> bool:
        created, refusal = False, None
        try:
            self.pages.create_page(page)
            created = True
        except VMMError as error:
            refusal = error
        finally:
            with self._settled:
                was = self.pages.refusal
                self.pages.finish_back(page, created=created)
                self.pages.refusal = refusal
                self._answered(was)
                self._settled.notify_all()
        return created

    def _look_at_device(self) -> None:
        """Once in a while, whether the device is short of memory for somebody else."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._device_low = self.vmm.low()

    def _page_to_trim(self) -> int | None:
        if self._over() or self._device_low:
            keep = 0
        elif time.monotonic() - self._used_at < self.idle_seconds:
            keep = self.pages.ready
        else:
            keep = self._kept_ready
        page = self.pages.begin_trim(keep, self.segments.completed)
        return self.pages.begin_again(self._due) if page is None else page

    def trim(self) -> int:
        """Give every free page beyond the reserve back to the driver now. Returns how many."""
        with self._lock:
            self.segments.reclaim()
            keep = min(self._kept_ready, max(0, self.allowance - self.pages.owned))
            return self.pages.trim(keep, self.segments.completed)

    def give_way(self) -> None:
        """Let the worker go on if it may have something to do, for a caller that has nothing more urgent.

        The worker wants the interpreter after each call of the driver. A thread that never waits, and gives it up for
        moments only, as one that polls a socket does, takes it back before the other one has woken up.
        """
        if self._thread is None:
            return
        if not self._thread.is_alive():
            self._wake_worker()
        if self._working or self._wake.is_set() or time.monotonic() >= self._due_at:
            with self.clock:
                time.sleep(GIVE_WAY_SECONDS)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The worker does nothing meanwhile. For the capture of a CUDA graph, which fails if any thread of the process
        makes a call that might wait for it. Raises `VMMError` where a call of the worker's does not return."""
        self._paused = True  # first, or it might take turn after turn before this thread gets one
        try:
            if not self._turn.acquire(timeout=PATIENCE_SECONDS):
                raise VMMError("pause", f"the mapping worker's call has not returned for {PATIENCE_SECONDS:g} s")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._paused = False
            self._wake_worker()

    def _start_worker(self) -> None:
        self._thread = threading.Thread(target=self._work, name="vtensor-mapping", daemon=True)
        self._thread.start()

    def _wake_worker(self) -> None:
        """There is something to do. A worker that died, of whatever got past `_work`, is replaced."""
        self._wake.set()
        if self._thread is not None and not self._thread.is_alive() and not self._closing:
            self.worker_failures += 1
            logger.error("the mapping worker died, and a new one is started: look for its traceback above")
            self._start_worker()

    def _work(self) -> None:
        attached = False
        while not self._closing:
            self._working = True
            start = time.perf_counter()
            try:
                if not attached:
                    self.vmm.attach_thread()
                    attached = True
                if self._take_turn():
                    self.worker_seconds += time.perf_counter() - start
                    continue
            except Exception:
                # The scheduling thread does without it what a batch needs; only what is given back waits for it.
                self.worker_failures += 1
                logger.exception("the mapping worker failed; it tries again in %g s", self.retry_seconds)
            self._due_at = time.monotonic() + self.retry_seconds
            self._working = False
            self._wake.wait(self.retry_seconds)
            self._wake.clear()

    def _take_turn(self) -> bool:
        if self._paused:
            return False
        with self._turn:
            return self.housekeep()

    # Tensors.

    def identity_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer by slot: `(slots, kv_heads, head_dim)`, token stride constant, not contiguous."""
        region = self.vmm.tensor(self.pages.base, self.pages.num_pages * self.layout.page_bytes)
        return self.layout.layer_views(region, layer)

    def segment_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer by segment: `(segments, max_tokens, kv_heads, head_dim)`. What is not mapped faults."""
        pool = self.segments
        region = self.vmm.tensor(pool.base, pool.num_segments * pool.segment_bytes)
        k, v = self.layout.layer_views(region, layer)
        shape = (pool.num_segments, pool.max_pages * self.layout.page_tokens, *k.shape[1:])
        return k.view(shape), v.view(shape)

    # What is told.

    def stats(self) -> Stats:
        with self._lock:
            pages, counts = self.pages, self.segments.counts()
            return Stats(
                page_tokens=self.layout.page_tokens,
                page_bytes=self.layout.page_bytes,
                waste=self.layout.waste,
                pages_capacity=pages.num_pages - 1,
                pages_limit=self.allowance,
                pages_backed=pages.backed,
                pages_free=pages.free_backed,
                pages_kept=pages.tails,
                kept_tokens=pages.kept_tokens,
                pages_stuck=pages.stuck,
                pages_owned=pages.owned,
                backed_bytes=pages.backed * pages.page_bytes,
                owned_bytes=pages.owned * pages.page_bytes,
                segments_idle=counts["idle"],
                segments_leased=counts["leased"],
                segments_parked=counts["parked"],
                segments_retired=counts["retired"],
                segment_mappings=self.segments.mappings(),
                pages_created=pages.creates,
                pages_released=pages.releases,
                pages_allocated=self.pages_allocated,
                pages_shared=self.pages_shared,
                prefix_tokens_served=self.prefix_tokens_served,
                prompt_tokens=self.prompt_tokens,
                partial_copies=self.partial_copies,
                partial_tokens=self.partial_tokens,
                tails_continued=self.tails_continued,
                maps=self.segments.maps,
                unmaps=self.segments.unmaps,
                maps_behind=self.segments.maps_behind,
                prefix_maps=self.prefix_maps,
                prefix_maps_on_continue=self.prefix_maps_on_continue,
                adoptions=self.segments.adoptions,
                prepared_segments=self.segments.prepared,
                fresh_segments=self.segments.fresh,
                swaps=self.segments.swaps,
                shortages=self.shortages,
                worker_failures=self.worker_failures,
                scheduling_seconds=self.clock.seconds,
                worker_seconds=self.worker_seconds,
            )

    def check_integrity(self) -> None:
        """Every invariant that the two pools can check. Raises `AssertionError`."""
        patience = _patience()
        with self._settled:
            while self.segments.in_hand:  # the worker has counted what it is about to map
                assert self._wait_for_worker(patience), "the worker does not let go of a segment"
            self.pages.check_integrity()
            self.segments.check_integrity()
            for segment in self.segments.segments:
                assert segment.busy_until <= self.next_epoch, segment

    def close(self) -> None:
        """Stop the worker, unmap and release everything. No batch may be in flight, and no view may be read after."""
        self._stop_worker()
        atexit.unregister(self._stop_worker)
        with self._lock:
            self.segments.close()
            self.pages.close()

    def _stop_worker(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _timed(self) -> _Timed:
        return _Timed(self)


def _patience() -> float:
    """Until when the scheduling thread waits for the worker, from now on."""
    return time.monotonic() + PATIENCE_SECONDS


class Clock:
    """Adds up the seconds spent within `with clock:`, each once, also where these are nested. For one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._start = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start


class _Timed:
    """Holds the lock; the clock of the scheduling thread runs meanwhile."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory

    def __enter__(self) -> None:
        self._memory.clock.__enter__()
        self._memory._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._memory._lock.release()
        self._memory.clock.__exit__()
