"""Backing: which frames have memory, on one side. It knows no tree and no requests, and is told which frames are used.

A page is one handle of the driver's. It is mapped in one frame, and stays there when nobody uses the frame any more,
until it is given back:

    (nothing) --create--> used <--take/give--> free --trim--> (nothing)

A page keeps its frame for life. To move free pages to where contexts grow was measured (`benchmarks/results/moves.json`
and `spike.json`): each move takes the scheduling thread some 40 us and the worker as much again, and contiguity gains
less than that. So a full cache places contexts where pages are free, in several runs.

What the worker does is in three steps: begin (take it in hand, under the manager's lock), a call of the driver without
the lock, and finish.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_vtensor.budget import Budget
from sglang_vtensor.placement import Placement
from sglang_vtensor.vmm import Handle, OutOfMemory, VirtualMemory, VMMError


class Free(NamedTuple):
    """Of a page that nobody uses: the epoch of its last reader, and since when (`time.monotonic`)."""

    epoch: int
    since: float


@dataclass(eq=False, slots=True)
class Leaving:
    """A page that is to be given back: unmapped from `frame`, where it still is mapped if `mapped`, and released."""

    page: Handle
    frame: int
    mapped: bool = True
    #: In hand once more, after the driver did not take it back.
    again: bool = False


@dataclass(eq=False, slots=True)
class Ahead:
    """A vacant frame for which the worker creates a page, `new`. The frame has the page once this is `done`."""

    frame: int
    new: Leaving | None = None
    done: bool = False


@dataclass(eq=False, slots=True)
class Claim:
    """Frames that are to be used from now on: those that `had` a page, which was free so, and those for which one was
    `created`; the others are `missing` one."""

    had: dict[int, Free]
    missing: list[int]
    created: list[int]


class Backing:
    """One side of the frames of `placement`: addresses for all of them, and memory for those that are used.

    Its pages, and those of the other sides of `budget`, take that much together; `most` pages may exist on this side
    (None: as many as the budget has room for). The padding frame's page is beside them. Not thread-safe.
    """

    def __init__(
        self, vmm: VirtualMemory, placement: Placement, page_bytes: int, budget: Budget, *, most: int | None = None
    ) -> None:
        self.vmm = vmm
        self.placement = placement
        self.page_bytes = page_bytes
        self.budget = budget
        self.most = most
        self.nbytes = placement.num_frames * page_bytes
        self.base = vmm.reserve(self.nbytes)
        #: Every batch up to this epoch is done.
        self.completed = 0
        #: Why the driver gave no page when it was last asked for one; None since it gave one again.
        self.refusal: VMMError | None = None
        self.creates = self.releases = 0
        self._pages: dict[int, Handle] = {}  # by frame: what is mapped there, to stay
        #: Frames whose pages nobody uses, the longest so first.
        self._free: OrderedDict[int, Free] = OrderedDict()
        self._free_epochs: Counter[int] = Counter()  # how many of these have which epoch
        #: Frames whose pages are used. The worker never touches it: who hands frames out, and who matches what is
        #: cached, reads it without the lock. On several ranks it says the same at the same point of a history.
        self._used: set[int] = set()
        self._leaving: list[Leaving] = []  # the driver did not take them back when it was last asked to
        self._stuck = 0  # as many, and those in hand that it is asked to take once more: one number, for any reader
        self._in_hand = 0  # pages that are created, moved or given back without the lock at this moment
        self._pages[0] = self._new_page(0)
        self.vmm.wait_cleared()
        budget.sides.append(self)

    # What there is.

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that are used; the padding frame's is not among them."""
        return len(self._used)

    @property
    def stuck(self) -> int:
        """Pages that the driver did not take back when it was last asked to; also those in hand that it is asked about
        once more. It needs no lock."""
        return self._stuck

    @property
    def pages(self) -> int:
        """Pages that hold memory, the padding frame's included; not those in hand."""
        return len(self._pages) + len(self._leaving)

    @property
    def in_hand(self) -> int:
        return self._in_hand

    @property
    def held(self) -> int:
        """Pages that the budget counts: those in hand too, and not the padding frame's."""
        return self.pages - 1 + self._in_hand

    @property
    def flying(self) -> int:
        """Free pages that a batch in flight may still read."""
        # Copied in one step of the interpreter: the worker may change it meanwhile.
        return sum(count for epoch, count in dict(self._free_epochs).items() if epoch > self.completed)

    @property
    def creatable(self) -> int:
        """How many more pages may be created."""
        return self.budget.creatable(self)

    def free_since(self) -> float | None:
        """Since when the page is free that `trim` gives back first; None: it would give none."""
        return next((free.since for free in self._free.values() if free.epoch <= self.completed), None)

    def has_page(self, frame: int) -> bool:
        return frame in self._pages

    def backed_among(self, frames: Sequence[int]) -> int:
        """How many of these frames have a page."""
        pages = self._pages
        return sum(frame in pages for frame in frames)

    def uses(self, frame: int) -> bool:
        """Whether the frame's page is used. It needs no lock in the thread that hands frames out."""
        return frame in self._used

    def stays_until(self, frame: int, epoch: int) -> bool:
        """Whether the frame's page is used, or free but not to be given back before the batch of this epoch is done."""
        if frame in self._used:
            return True
        free = self._free.get(frame)
        return free is not None and free.epoch >= epoch

    def free_frames(self) -> list[int]:
        """Frames whose pages nobody uses, ascending."""
        return sorted(self._free)

    def stuck_frames(self) -> list[int]:
        """The frames of the pages that the driver did not take back."""
        return [leaving.frame for leaving in self._leaving]

    def frames_with_memory(self) -> list[int]:
        """Every frame that has a page, the padding frame among them, in no order."""
        return list(self._pages)

    def address(self, frame: int) -> int:
        return self.base + frame * self.page_bytes

    def newest_vacant(self, count: int) -> list[int]:
        """Vacant frames that have a page: those that were given up last, ascending; up to so many."""
        vacant = filter(self.placement.is_vacant, reversed(self._free))
        return sorted(itertools.islice(vacant, count))

    # For what is used.

    def take(self, frames: Sequence[int]) -> bool:
        """Give memory to each of these frames, which nobody used, and mark their pages as used. False if the driver or
        the budget has not enough for all of them.

        A frame that has a page keeps it. For another frame a page is created. Where no more pages may be created, the
        page that was free the longest is given back for the new one, on whichever side that is. After False none of the
        frames is used; the pages that were created on the way stay there, free.
        """
        claim = self.claim(frames)
        if self.fill(claim):
            return True
        self.unclaim(claim)
        return False

    def claim(self, frames: Sequence[int]) -> Claim:
        """The first step of `take`: what these frames have is used from now on, and is not given back for others."""
        had = {frame: self._pop_free(frame) for frame in frames if frame in self._pages}
        self._used.update(had)
        return Claim(had, [frame for frame in frames if frame not in had], [])

    def fill(self, claim: Claim) -> bool:
        """The second step: create what is missing. `refusal` says why the driver did not, if it did not."""
        refusal: VMMError | None = None
        try:
            waiting = deque(claim.missing)
            # Asked before each try: what a try leaves may be stuck, and counts.
            while waiting and (self.creatable or self.budget.make_room(self)):
                try:
                    self._pages[waiting[0]] = self._new_page(waiting[0])
                    self._used.add(waiting[0])
                    claim.created.append(waiting.popleft())
                except OutOfMemory as error:
                    # A side that gives pages back makes room on the device as it does in the budget.
                    refusal = error
                    if len(self.budget.sides) == 1 or not self.budget.give_one_back():
                        raise
        except VMMError as error:
            refusal = error
        try:
            if claim.created:
                self.vmm.wait_cleared()
        except VMMError as error:
            refusal = error
            for frame in claim.created:
                self._take_down(Leaving(self._pages.pop(frame), frame))
            self._used.difference_update(claim.created)
            claim.created.clear()
        self.creates += len(claim.created)
        if claim.created or refusal is not None:
            self.refusal = refusal
        return len(claim.created) == len(claim.missing)

    def unclaim(self, claim: Claim) -> None:
        """Undo both steps: none of the frames is used. What was created is free."""
        now = time.monotonic()
        for frame, free in (*claim.had.items(), *((frame, Free(0, now)) for frame in claim.created)):
            self._set_free(frame, free)
            self._used.remove(frame)

    def _set_free(self, frame: int, free: Free) -> None:
        self._free[frame] = free
        self._free_epochs[free.epoch] += 1

    def _pop_free(self, frame: int) -> Free:
        free = self._free.pop(frame)
        self._free_epochs[free.epoch] -= 1
        if not self._free_epochs[free.epoch]:
            del self._free_epochs[free.epoch]
        return free

    def give(self, frames: Iterable[int], epoch: int, since: float | None = None) -> None:
        """Nobody uses these frames any more, from `since` on (`time.monotonic`; None: now); batches up to `epoch` may
        still read them. Their pages stay there, and are free."""
        free = Free(epoch, time.monotonic() if since is None else since)
        for frame in frames:
            assert self.uses(frame), f"frame {frame} is not used"
            self._set_free(frame, free)
            self._used.remove(frame)

    # The driver.

    def _new_page(self, frame: int) -> Handle:
        """Create a page and map it at a frame; its clearing is only begun. If that fails, it is gone, or stuck."""
        new = Leaving(self.vmm.create(self.page_bytes), frame, mapped=False)
        try:
            self._show(new)
        except VMMError:
            self._take_down(new)
            raise
        return new.page

    def _show(self, new: Leaving) -> None:
        """Map a new page, and begin to clear it."""
        self.vmm.map(self.address(new.frame), self.page_bytes, new.page)
        new.mapped = True
        self.vmm.clear(self.address(new.frame), self.page_bytes)

    def _take_down(self, leaving: Leaving) -> None:
        """Give a page back behind another failure, which is the one to be told; it is stuck where that fails too."""
        try:
            self.release(leaving)
        except VMMError:
            self._stick(leaving)

    def _stick(self, leaving: Leaving) -> None:
        """A page is stuck until `begin_again`. Its frame is aside as long as it is mapped there."""
        if leaving.mapped:
            self.placement.set_aside(leaving.frame)
        self._leaving.append(leaving)
        self._stuck += 1

    def release(self, leaving: Leaving) -> None:
        """Unmap a page and give it back. After a failure, it goes on where that was."""
        # The mapping goes first: a handle that is released while mapped keeps its memory (invariant 4).
        if leaving.mapped:
            self.vmm.unmap(self.address(leaving.frame), self.page_bytes)
            leaving.mapped = False
        self.vmm.release(leaving.page)

    # For the worker: memory ahead of need.

    def begin_back(self, frame: int) -> Ahead | None:
        """Take a vacant frame without memory in hand; None if no more pages may be created. Nobody is placed there
        before `finish_back`."""
        if not self.creatable:
            return None
        self.placement.set_aside(frame)
        self._in_hand += 1
        return Ahead(frame)

    def back(self, ahead: Ahead) -> None:
        """Create, map and clear the page of a frame in hand: the calls of the driver, without the lock. Raises
        `VMMError`."""
        ahead.new = Leaving(self.vmm.create(self.page_bytes), ahead.frame, mapped=False)
        self._show(ahead.new)
        self.vmm.wait_cleared()
        ahead.done = True

    def finish_back(self, ahead: Ahead) -> None:
        """Let go of a frame in hand. It has its page now, which is free; or the driver refused, and all is as before. A
        new page that the driver created and did not map is stuck, and a later turn gives it back."""
        self._in_hand -= 1
        self.placement.put_back(ahead.frame)
        if ahead.new is None:
            return
        if not ahead.done:
            self._stick(ahead.new)
            return
        self._pages[ahead.frame] = ahead.new.page
        self._set_free(ahead.frame, Free(0, time.monotonic()))
        self.creates += 1
        self.refusal = None

    # For the worker: memory that is given back.

    def begin_trim(self, keep: int, since: float = math.inf) -> Leaving | None:
        """Take in hand the page that is free the longest and may go; None if `keep` or fewer are free, or none may.

        A page stays while a batch may still read it, and if it was used later than `since`.
        """
        if len(self._free) <= keep:
            return None
        for frame, free in self._free.items():
            if free.since > since:
                return None
            if free.epoch <= self.completed:
                self._pop_free(frame)
                self.placement.set_aside(frame)
                self._in_hand += 1
                return Leaving(self._pages.pop(frame), frame)
        return None

    def begin_again(self, due: Callable[[int], bool] = lambda frame: True) -> Leaving | None:
        """Take in hand a page that is stuck, and whose frame is `due`; None if there is none."""
        for leaving in self._leaving:
            if due(leaving.frame):
                leaving.again = True
                self._leaving.remove(leaving)
                if not leaving.mapped:
                    self.placement.set_aside(leaving.frame)
                self._in_hand += 1
                return leaving
        return None

    def finish_trim(self, leaving: Leaving, *, done: bool) -> None:
        """Let go of a page in hand: it is gone if `done`. Else it is stuck, and its frame is aside as long as the page
        is mapped there."""
        self._in_hand -= 1
        if not leaving.mapped:
            self.placement.put_back(leaving.frame)
        again, leaving.again = leaving.again, False
        self._stuck += (not done) - again
        if done:
            self.releases += 1
        else:
            self._leaving.append(leaving)

    def trim(self, keep: int) -> int:
        """Give free pages back, the longest free first, until `keep` are left. Returns how many. Raises `VMMError` at
        the first that the driver does not take: that page is stuck."""
        released = 0
        while (leaving := self.begin_trim(keep)) is not None:
            done = False
            try:
                self.release(leaving)
                done = True
            finally:
                self.finish_trim(leaving, done=done)
            released += 1
        return released

    def close(self) -> None:
        """Unmap and release everything, used or not. The side is not to be used after."""
        for leaving in [*(Leaving(page, frame) for frame, page in self._pages.items()), *self._leaving]:
            self.release(leaving)
        self.vmm.free(self.base, self.nbytes)

    def check_integrity(self, used: set[int]) -> None:
        """Invariants 1 to 4, as far as one side can see. `used` are the frames whose owners need this side."""
        assert self._used == used, f"frames that are used: {sorted(self._used)}, and that owners need: {sorted(used)}"
        assert self._pages.keys() - self._free.keys() == used | {0}, "used frames, and pages that are not free"
        assert self._free.keys() <= self._pages.keys()
        assert self._free_epochs == Counter(free.epoch for free in self._free.values())
        held = [*self._pages.values(), *(leaving.page for leaving in self._leaving)]
        assert len(held) == len(set(held)) == self.pages, "a page is in two frames"
        assert len(self._leaving) <= self._stuck <= len(self._leaving) + self._in_hand
        assert not any(leaving.mapped and self.placement.is_vacant(leaving.frame) for leaving in self._leaving)
        self.budget.check_integrity()
