"""The KV memory of one rank: placement and backing behind one lock.

Before each batch the scheduling thread asks for the frames that the batch adds, and gets them with memory, or nothing.
What is given up keeps its memory where it is. The worker does the rest (`chores`).

Time is counted in epochs, one for each launched batch. What a batch may read carries its epoch, and is not unmapped
before `complete` has been told of it: nothing here waits for a device.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from sglang_vtensor.backing import Backing
from sglang_vtensor.budget import Budget
from sglang_vtensor.chores import Chores
from sglang_vtensor.clock import Clock, Timed
from sglang_vtensor.handout import Ask, Handout
from sglang_vtensor.layout import KVLayout, frames_for
from sglang_vtensor.placement import Placement
from sglang_vtensor.room import Room
from sglang_vtensor.snapshot import snapshot
from sglang_vtensor.states import States
from sglang_vtensor.supply import Supply
from sglang_vtensor.tails import Tails
from sglang_vtensor.vmm import VirtualMemory, VMMError
from sglang_vtensor.worker import Worker, patience

_T = TypeVar("_T")
#: A server is idle if it has launched nothing for so long, and for so long as it keeps free pages. Health checks come
#: more often.
QUIET_SECONDS = 30.0
#: So long another thread waits for the lock: nobody holds it longer, unless the driver does not return.
LOCKED_SECONDS = 1.0


class KVMemory(Room):
    """`sides` are the kinds of memory of a frame, with equal `page_tokens`; the first one is that of all tokens. What
    requests and nodes own may take the bytes of `capacity_pages` pages of each side (the padding pages come on top),
    which the sides share as they need them. They may own `most_frames` frames, by default so many as there are pages,
    and as many of them may have memory on side `side` as `most_pages[side]` says (no entry: all). `max_tokens` is the
    longest context. With `state_bytes` there are `state_slots` states beside them, of so many bytes each, in the same
    budget. `reserve_pages` are kept backed and free for what comes next, less what requests have left in the
    pages they are filling, and only `idle_reserve_pages` (None: as many) when no batch was launched for
    `QUIET_SECONDS`. Free pages beyond them that nobody needed for `idle_seconds` go back to the driver.
    `num_frames` is for tests: so many, rounded to lanes.
    With `worker=False` nothing happens behind the caller's back: `housekeep` does one turn of the worker's.
    """

    def __init__(
        self,
        vmm: VirtualMemory,
        sides: Sequence[KVLayout] | KVLayout,
        *,
        capacity_pages: int,
        max_tokens: int,
        most_frames: int | None = None,
        most_pages: Mapping[int, int] | None = None,
        state_bytes: int = 0,
        state_slots: int = 0,
        reserve_pages: int = 0,
        idle_reserve_pages: int | None = None,
        idle_seconds: float = 10.0,
        worker: bool = True,
        num_frames: int | None = None,
        lane_frames: int | None = None,
    ) -> None:
        self.sides = [sides] if isinstance(sides, KVLayout) else list(sides)
        self.layout = layout = self.sides[0]
        if capacity_pages < 1:
            raise ValueError(
                f"the KV cache has room for {capacity_pages} pages of {layout.page_tokens} tokens "
                f"({layout.page_bytes} bytes): raise --mem-fraction-static or --max-total-tokens"
            )
        if any(side.page_tokens != layout.page_tokens for side in self.sides):
            raise ValueError(f"pages of {[side.page_tokens for side in self.sides]} tokens: equal ones wanted")
        self.vmm = vmm
        #: Pages of each side whose bytes the budget has.
        self.capacity = capacity_pages
        self.limit = most_frames or capacity_pages
        frames, lane = frames_for(self.sides, self.limit, max_tokens)
        lane = lane_frames or lane
        self.placement = Placement(-(-(num_frames or frames) // lane) * lane, lane)
        self.budget = Budget(capacity_pages * self.page_bytes)
        self.backings = [
            Backing(vmm, self.placement, side.page_bytes, self.budget, most=(most_pages or {}).get(number))
            for number, side in enumerate(self.sides)
        ]
        self.backing = self.backings[0]
        #: What requests have once, whatever their length; None: nothing.
        self.states = States(self, state_bytes, state_slots) if state_bytes else None
        self.stores = self.backings if self.states is None else [*self.backings, self.states.backing]
        self.tails = Tails(self)
        self.allowance = capacity_pages
        self.reserve_pages = min(reserve_pages, capacity_pages)
        self.idle_reserve_pages = self.reserve_pages if idle_reserve_pages is None else idle_reserve_pages
        self.idle_seconds = idle_seconds
        #: Tokens that the pages of what runs have room for yet, as of the last batch.
        self.unfilled_tokens = 0
        self.launched = 0
        self._launched_at = time.monotonic()
        self._given = 0  # the epoch of what was given up last
        self.counts = dict.fromkeys(
            (
                *("allocated", "with_memory", "created", "in_place", "shared"),
                *("prefix_tokens", "prompt_tokens", "tails_continued", "copies", "copied_tokens"),
            ),
            0,
        )
        #: Contexts that were counted as they ended: how many, their runs, the most of one; and their own parts that
        #: are more than one run.
        self.contexts = self.context_runs = self.most_runs = self.broken_runs = 0
        #: What memory costs the scheduling thread, and whatever else that does for memory's sake: `with memory.clock`.
        self.clock = Clock()
        self.worker = Worker(self.housekeep, vmm.attach_thread)
        self.supply = Supply(self, self.worker)
        self.chores = Chores(self, self.worker)
        self.handout = Handout(self, self.chores, self.supply, self.counts)
        self._lock = self.worker.lock
        self._timed = Timed(self.clock, self._lock)
        self._regions: list[torch.Tensor] = []
        if worker:
            self.worker.start()
            # It is a daemon: it would go on calling the driver while the process takes that down.
            atexit.register(self.worker.stop)

    # The allowance.

    def allow(self, pages: int) -> int:
        """From now on the bytes of `pages` pages of each side are to hold memory at most, beside the padding pages.
        Returns how many pages of each side owners have too many, for the caller to evict.

        Free pages beyond that go back to the driver at once, kept ones with them; owned ones as they are freed. What
        runs may grow beyond it (`allocate`), and nothing else.
        """
        with self._timed:
            self.allowance = max(0, min(pages, self.capacity))
        return self.excess()

    def excess(self) -> int:
        """How many owned pages are beyond the allowance now, in bytes of pages of each side, for the caller to evict.
        Kept ones beyond it are kept no longer: here and not by the worker, so that ranks with the same history forget
        the same ones."""
        with self._timed:
            self.tails.forget_until(max(0, self.room()))
        if self.owes():
            self.worker.wake()
        return max(0, -self.room())

    # Hand out and take back.

    def allocate(self, asks: Sequence[Ask], *, growing: bool = False) -> list[list[int]] | None:
        """Frames with memory for all that is asked, or None where the limit or the device has no room for all of them.
        `growing` is for what runs already: the allowance does not hold it up, so that it comes to its end.

        Kept pages that the limit has no room for beside them are forgotten, also where the driver then refuses: so it
        depends on the numbers alone, and ranks stay alike.
        """
        total = sum(ask.count for ask in asks)
        if not total:
            return [[] for _ in asks]
        with self._timed:
            if total > self.room(growing=growing):
                return None
            self.tails.forget_until(self.room(growing=True) - total)

            def attempt() -> list[list[int]] | None:
                placed = self.handout.attempt(asks)
                if placed is None and self.short and total <= min(backing.free for backing in self.backings):
                    placed = self.handout.attempt(asks)  # where pages are, as the driver gives no others
                return placed

            placed = self.until_nothing_is_in_hand(attempt)
            if placed is None:
                return None
            self.chores.handed_out(placed)
        if self.ready < self.kept_ready:
            self.worker.wake()
        return placed

    def until_nothing_is_in_hand(self, attempt: Callable[[], _T | None]) -> _T | None:
        """What `attempt` gives; tried again while the worker has pages in hand, but not for long. Under the lock."""
        until = patience()
        placed = attempt()
        while placed is None and any(backing.in_hand for backing in self.stores) and self.worker.wait(until):
            placed = attempt()
        return placed

    def free(self, frames: Sequence[int], epoch: int | None = None) -> None:
        """Take frames back. Batches up to `epoch` may still read them; None: those launched so far, and the one being
        made."""
        if not frames:
            return
        with self._timed:
            self.placement.free(frames)
            self.give(frames, epoch)

    def give(self, frames: Iterable[int], epoch: int | None = None) -> None:
        """Nobody needs these frames on any side any more, as of `give_pages`. Under the lock."""
        now = time.monotonic()
        for backing in self.backings:
            self.give_pages(backing, frames, epoch, now)

    def give_pages(
        self, backing: Backing, frames: Iterable[int], epoch: int | None = None, since: float | None = None
    ) -> None:
        """Nobody needs this store of these frames (or slots) any more. Under the lock."""
        epoch = self.next_epoch if epoch is None else epoch
        self._given = max(self._given, epoch)
        backing.give([frame for frame in frames if backing.uses(frame)], epoch, since)

    def let_go(self, side: int, frames: Iterable[int], epoch: int | None = None) -> None:
        """Their owner keeps these frames, and needs one side of them no more; the first side it always needs. `epoch`
        as of `free`."""
        assert side, "the first side is that of all tokens"
        with self._timed:
            self.give_pages(self.backings[side], frames, epoch)

    def back_again(self, side: int, frames: Sequence[int]) -> bool:
        """Give owned frames memory again on a side that they had let go of: all of them, or none. What was there is
        lost. None get any while a page that the driver did not take back is mapped in one of them."""
        with self._timed:
            backing, until = self.backings[side], patience()
            # Their old pages may be in the worker's hands, and it would unmap what is mapped there meanwhile.
            while any(map(self.placement.is_aside, frames)):
                if not backing.in_hand or not self.worker.wait(until):
                    return False
            claim = backing.claim(frames)
            done = self.supply.fill(backing, claim)
            if not done:
                backing.unclaim(claim)
            return done

    def free_all(self) -> None:
        """Take every frame back: nothing is cached or running any more."""
        with self._timed:
            self.tails.forget_until(0)
            owned = self.placement.owned_frames()
            self.placement.free(owned)
            self.give(owned)
            if self.states is not None:
                self.states.give(self.states.placement.owned_frames())
        self.worker.wake()

    # Epochs.

    @property
    def next_epoch(self) -> int:
        """The epoch of the batch that is being made: it may read what was freed until it is launched."""
        return self.launched + 1

    def nothing_launched(self) -> None:
        """Every batch is done, and none is to be launched now: what was given up since the last one is read by nobody,
        although no next one says so."""
        if self._given > self.launched:
            self.launched += 1
        if self.launched > self.backing.completed:
            self.complete(self.launched)

    def launch(self, *, idle: bool = False) -> int:
        """A batch was launched. Returns its epoch, to be given to `complete` when the device has done it. `idle`: it
        was for nobody, as a health check's."""
        self.launched += 1
        if not idle:
            self._launched_at = time.monotonic()
        return self.launched

    def complete(self, epoch: int) -> None:
        """Every batch up to `epoch` is done."""
        if epoch > self.backing.completed:
            for backing in self.stores:
                backing.completed = epoch
            if self.owes():
                self.worker.wake()

    # The worker.

    @property
    def reserve_now(self) -> int:
        """Pages that are kept backed and free for what comes next, if all is well."""
        if time.monotonic() - self._launched_at < max(self.idle_seconds, QUIET_SECONDS):
            return self.reserve_pages
        return min(self.reserve_pages, self.idle_reserve_pages)

    @property
    def kept_ready(self) -> int:
        """Free pages that are to be ready. What is left in the pages that requests fill is ready too; and in those that
        were kept unfinished, which are half empty on average."""
        left = self.unfilled_tokens // self.layout.page_tokens + len(self.tails) // 2
        return max(0, self.reserve_now - left)

    def wants_page(self, backing: Backing) -> bool:
        """Whether one more page is to be created ahead of need. States are created as requests begin; after the driver
        refused one, it is asked for one more as it is for any other page: nobody may begin before it gives again."""
        reserved, available = 0, max(0, self.room(ahead=True) - len(self.tails))
        if backing in self.backings:
            reserved = min(self.kept_ready, available)
        elif self.states is not None:
            available = self.states.room(ahead=True)
        if backing.refusal is None:
            return backing.free < reserved
        # One page more than there is tells whether the driver gives again. Also a side that lacks none is asked about:
        # before that is known, nobody may begin with what another side lacks.
        return available > 0 and self.supply.asks_again

    def kept_now(self, backing: Backing, *, device_low: bool) -> tuple[int, float]:
        """How many free pages do not go back to the driver now, and since when one must have been free to go."""
        if self.over_bytes() or device_low:
            return 0, math.inf
        return self.kept_ready if backing in self.backings else 0, time.monotonic() - self.idle_seconds

    def housekeep(self) -> bool:
        """One turn of the worker's. True if it did something, and there may be more."""
        return self.chores.turn()

    def trim(self) -> int:
        """Give every free page beyond the reserve back to the driver now. Returns how many."""
        with self._lock:
            keep = min(self.kept_ready, max(0, self.room()))
            return sum(backing.trim(keep if backing in self.backings else 0) for backing in self.stores)

    def give_all_back(self) -> bool:
        """Give every free page back to the driver now, what the worker has in hand too. Every batch is done, and the
        allowance is 0, or the worker would create others. Whether all are gone: the driver may not take one, which the
        worker tries again."""
        until = patience()
        with self._timed:
            self.tails.forget_until(0)
            self.nothing_launched()
            for backing in self.stores:
                with contextlib.suppress(VMMError):
                    backing.trim(0)
                while backing.in_hand and self.worker.wait(until):
                    pass
                with contextlib.suppress(VMMError):
                    backing.trim(0)  # what was in hand may be a page that was created
            return not any(backing.free or backing.stuck or backing.in_hand for backing in self.stores)

    def give_way(self) -> None:
        """Let the worker go on if it may have something to do, for a caller that has nothing more urgent."""
        self.worker.give_way()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """The worker does nothing meanwhile (`Worker.paused`)."""
        return self.worker.paused()

    # Tensors.

    def region(self, side: int = 0) -> torch.Tensor:
        """All bytes of a side by frame, uint8; those of frames without memory fault."""
        if not self._regions:
            self._regions = [self.vmm.tensor(backing.base, backing.nbytes) for backing in self.backings]
        return self._regions[side]

    def layer_views(self, layer: int, side: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a side's layer by slot: `(slots, kv_heads, head_dim)`, token stride constant, not contiguous."""
        return self.sides[side].layer_views(self.region(side), layer)

    def copy_tokens(self, source: int, target: int, tokens: int, sides: Sequence[int] | None = None) -> None:
        """Copy the first tokens of one frame to another, of these sides or all, on the current stream. A token's bytes
        lie together, so that is one run of bytes."""
        for number in range(len(self.sides)) if sides is None else sides:
            side = self.sides[number]
            region, size = self.region(number), tokens * side.stride_bytes
            from_, to = source * side.page_bytes, target * side.page_bytes
            region[to : to + size].copy_(region[from_ : from_ + size])
        self.counts["copies"] += 1
        self.counts["copied_tokens"] += tokens

    # What is told.

    def held_still(self) -> contextlib.AbstractContextManager[None]:
        """The worker changes nothing meanwhile, so that numbers which are read one after another agree. For the
        scheduling thread, whose clock counts it."""
        return self._timed

    def frames_left(self) -> list[int] | None:
        """Frames that have memory and no owner, ascending. Any thread may ask. To one beside the scheduling thread,
        which is its process's first, this is None if the lock is held for `LOCKED_SECONDS`: whoever has it may stand in
        a call of the driver."""
        first = threading.current_thread() is threading.main_thread()
        if not self._lock.acquire(timeout=-1 if first else LOCKED_SECONDS):
            return None
        try:
            return self.backing.newest_vacant(self.backing.free)
        finally:
            self._lock.release()

    def ended(self, runs: int, own_runs: int) -> None:
        """A context ended that was so many runs, and its own part so many of them."""
        self.contexts += 1
        self.context_runs += runs
        self.most_runs = max(self.most_runs, runs)
        self.broken_runs += max(0, own_runs - 1)

    def stats(self) -> dict[str, int | float]:
        """What is told of it, as of now."""
        with self._lock:
            return snapshot(self)

    def check_integrity(self) -> None:
        """Every invariant that placement and backing can check, whatever the worker has in hand. Raises
        `AssertionError`."""
        with self._lock:
            self.placement.check_integrity()
            kept = [tail.frame for tail in self.tails if tail.frame is not None]
            assert len(kept) == len(set(kept)) == self.placement.kept
            assert self.tails.tokens == sum(tail.tokens for tail in self.tails)
            assert self.owned + len(self.tails) <= self.limit, (self.owned, len(self.tails), self.limit)
            used = {*self.placement.owned_frames(), *kept}
            for backing in self.backings:
                backing.check_integrity(used if backing is self.backing else {f for f in used if backing.uses(f)})
            if self.states is not None:
                self.states.check_integrity()

    def close(self) -> None:
        """Stop the worker, unmap and release everything. No batch may be in flight, and no view may be read after."""
        self.worker.stop()
        atexit.unregister(self.worker.stop)
        with self._lock:
            for backing in self.stores:
                backing.close()
