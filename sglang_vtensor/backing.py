"""Backing: which frames have memory, on one side. It knows no tree and no requests, and is told which frames are used.

A page is one handle of the driver's. It is mapped in one frame, and stays there when nobody uses the frame any more,
until it is wanted elsewhere or given back:

    (nothing) --create--> used <--take/give--> free --trim--> (nothing)
                            ^                   |
                            +------ move -------+     the frame that it was in is stale until it is unmapped there

A move maps first and unmaps later: for a while a page is mapped twice, in its new frame and in the stale one, which a
batch in flight may still read. Whoever writes through the new frame runs behind those batches on the same stream, so
nothing waits, nothing is unmapped on the path of a batch, and a map that is refused changes nothing (invariants 3, 7).

What the worker does is in three steps: begin (take it in hand, under the manager's lock), a call of the driver without
the lock, and finish.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sglang_vtensor.placement import Placement
from sglang_vtensor.vmm import Handle, VirtualMemory, VMMError


@dataclass(frozen=True, slots=True)
class Stale:
    """A mapping that is to be taken away once every batch up to `epoch` is done."""

    frame: int
    page: Handle
    epoch: int


@dataclass(eq=False, slots=True)
class Leaving:
    """A page that is to be given back: unmapped from `frame`, where it still is mapped if `mapped`, and released."""

    page: Handle
    frame: int
    mapped: bool = True


@dataclass(eq=False, slots=True)
class Ahead:
    """A frame that is to have memory: the page of `stale`, which is that of another frame, or a `new` one. It has it
    once `page` is set."""

    frame: int
    stale: Stale | None
    new: Leaving | None = None
    page: Handle | None = None


class Backing:
    """One side of the frames of `placement`: addresses for all of them, and memory for those that are used.

    `capacity` pages may exist, the padding frame's beside them. With `moves=False` a page stays in its frame for life,
    as a page must whose address somebody else knows. Not thread-safe.
    """

    def __init__(
        self, vmm: VirtualMemory, placement: Placement, page_bytes: int, capacity: int, *, moves: bool = True
    ) -> None:
        self.vmm = vmm
        self.placement = placement
        self.page_bytes = page_bytes
        self.capacity = capacity
        self.moves = moves
        self.nbytes = placement.num_frames * page_bytes
        self.base = vmm.reserve(self.nbytes)
        #: Every batch up to this epoch is done.
        self.completed = 0
        #: Why the driver gave no page when it was last asked for one; None since it gave one again.
        self.refusal: VMMError | None = None
        self.creates = self.releases = self.maps = self.unmaps = 0
        #: Of the frames that were taken, those that had memory, got it by a move, and got a new page.
        self.had_memory = self.moved = self.created = 0
        #: Pages that were moved before they were needed.
        self.moved_ahead = 0
        self._pages: dict[int, Handle] = {}  # by frame: what is mapped there, to stay
        #: Frames whose pages nobody uses, the longest so first, with the epoch of the last reader.
        self._free: OrderedDict[int, int] = OrderedDict()
        self._stale: OrderedDict[int, Stale] = OrderedDict()  # by frame
        self._twice: Counter[Handle] = Counter()  # stale mappings of each page
        self._leaving: list[Leaving] = []  # the driver did not take them back when it was last asked to
        self._in_hand = 0  # pages that are created, moved or given back without the lock at this moment
        self._pages[0] = self._new_page(0)
        self.vmm.wait_cleared()

    # What there is.

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that are used; the padding frame's is not among them."""
        return len(self._pages) - 1 - len(self._free)

    @property
    def stuck(self) -> int:
        """Pages that the driver did not take back when it was last asked to."""
        return len(self._leaving)

    @property
    def stale(self) -> int:
        """Mappings that wait to be taken away."""
        return len(self._stale)

    @property
    def pages(self) -> int:
        """Pages that hold memory, the padding frame's included; not those in hand."""
        return len(self._pages) + len(self._leaving)

    @property
    def in_hand(self) -> int:
        return self._in_hand

    @property
    def creatable(self) -> int:
        """How many more pages may be created."""
        return max(0, self.capacity + 1 - self.pages - self._in_hand)

    def has_page(self, frame: int) -> bool:
        return frame in self._pages

    def uses(self, frame: int) -> bool:
        """Whether the frame's page is used."""
        return frame in self._pages and frame not in self._free

    def address(self, frame: int) -> int:
        return self.base + frame * self.page_bytes

    def newest_vacant(self, count: int) -> list[int]:
        """Vacant frames that have a page: those that were given up last, ascending; up to so many."""
        vacant = filter(self.placement.is_vacant, reversed(self._free))
        return sorted(itertools.islice(vacant, count))

    # For what is used.

    def take(self, frames: Sequence[int]) -> bool:
        """Each of these frames, which nobody used, has memory from now on; False if that is not to be had.

        A frame that has a page keeps it; else the page that was free the longest is moved there, or one is created.
        Where pages do not move, and no more may be created, the one that was free the longest is given back for it.
        After False none of them is used: what was moved or created on the way stays there, free.
        """
        had = {frame: self._free.pop(frame) for frame in frames if frame in self._pages}
        missing = [frame for frame in frames if frame not in had]
        got: dict[int, int] = {}
        refusal = self._get(missing, got)
        if refusal is not None:
            self.refusal = refusal
        if len(got) < len(missing):
            self._free.update(had)
            self._free.update(got)
            return False
        self.had_memory += len(had)
        return True

    def _get(self, missing: Sequence[int], got: dict[int, int]) -> VMMError | None:
        """Pages for frames that have none: into `got`, with the epoch of their last reader. Why the driver refused."""
        created: list[int] = []
        refusal = None
        for frame in missing:
            if frame in self._stale:
                break  # something else is mapped there yet
            try:
                if self._free and self.moves:
                    source, epoch = next(iter(self._free.items()))
                    self.vmm.map(self.address(frame), self.page_bytes, self._pages[source])
                    self.maps += 1
                    self._pages[frame] = self._leave(source).page
                    self._moved()
                    self.moved += 1
                    got[frame] = epoch
                elif self.creatable or (not self.moves and self.trim(self.free - 1)):
                    self._pages[frame] = self._new_page(frame)
                    created.append(frame)
                else:
                    break
            except VMMError as error:
                refusal = error
                break
        if not created:
            return refusal
        try:
            self.vmm.wait_cleared()
        except VMMError as error:
            for frame in created:
                self._take_down(Leaving(self._pages.pop(frame), frame))
            return error
        self.creates += len(created)
        self.created += len(created)
        self.maps += len(created)
        self.refusal = None
        got.update(dict.fromkeys(created, 0))
        return refusal

    def give(self, frames: Iterable[int], epoch: int) -> None:
        """Nobody uses these frames any more, but for batches up to `epoch`. Their pages stay there, and are free."""
        for frame in frames:
            assert self.uses(frame), f"frame {frame} is not used"
            self._free[frame] = epoch

    def _moved(self) -> None:
        """A page could be moved. Where none may be created, that is all that the driver can be asked for."""
        if not self.creatable:
            self.refusal = None

    def _leave(self, source: int) -> Stale:
        """The free page of `source` is another frame's from now on."""
        stale = Stale(source, self._pages.pop(source), self._free.pop(source))
        self._twice[stale.page] += 1
        self._stale[source] = stale
        self.placement.set_aside(source)
        return stale

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

    def release(self, leaving: Leaving) -> None:
        """Unmap a page and give it back. After a failure, it goes on where that was."""
        # The mapping goes first: a handle that is released while mapped keeps its memory (invariant 4).
        if leaving.mapped:
            self.vmm.unmap(self.address(leaving.frame), self.page_bytes)
            leaving.mapped = False
        self.vmm.release(leaving.page)

    # For the worker: stale mappings.

    def begin_unmap(self, due: Callable[[int], bool] = lambda frame: True) -> Stale | None:
        """A stale mapping that no batch reads any more, and whose frame is `due`; None if there is none."""
        for stale in self._stale.values():
            if stale.epoch <= self.completed and due(stale.frame):
                return stale
        return None

    def unmap(self, stale: Stale) -> None:
        """The driver's part of it. The frame is aside meanwhile."""
        self.vmm.unmap(self.address(stale.frame), self.page_bytes)

    def finish_unmap(self, stale: Stale) -> None:
        """It is not mapped there any more."""
        self.unmaps += 1
        self._forget_stale(stale)

    def _forget_stale(self, stale: Stale) -> None:
        del self._stale[stale.frame]
        self._twice[stale.page] -= 1
        if not self._twice[stale.page]:
            del self._twice[stale.page]
        self.placement.put_back(stale.frame)

    # For the worker: memory ahead of need.

    def begin_back(self, frame: int, *, move: bool) -> Ahead | None:
        """Take a vacant frame without memory in hand: for the page that is free the longest, where one is to `move`, or
        for a new one. None if there is none to be had. Nobody is placed there before `finish_back`."""
        if move and self.moves and self._free:
            ahead = Ahead(frame, self._leave(next(iter(self._free))))
        elif not move and self.creatable:
            ahead = Ahead(frame, None)
        else:
            return None
        self.placement.set_aside(frame)
        self._in_hand += 1
        return ahead

    def back(self, ahead: Ahead) -> None:
        """The driver's part of it."""
        if ahead.stale is not None:
            self.vmm.map(self.address(ahead.frame), self.page_bytes, ahead.stale.page)
            ahead.page = ahead.stale.page
            return
        ahead.new = Leaving(self.vmm.create(self.page_bytes), ahead.frame, mapped=False)
        self._show(ahead.new)
        self.vmm.wait_cleared()
        ahead.page = ahead.new.page

    def finish_back(self, ahead: Ahead) -> None:
        """The frame has its page, free; or that was refused, and all is as it was before. A new page that is only half
        there is stuck, and the next turn gives it back."""
        self._in_hand -= 1
        self.placement.put_back(ahead.frame)
        stale = ahead.stale
        if ahead.page is None:
            if ahead.new is not None:
                self._stick(ahead.new)
            if stale is not None:
                self._forget_stale(stale)
                self._pages[stale.frame], self._free[stale.frame] = stale.page, stale.epoch
                self._free.move_to_end(stale.frame, last=False)
            return
        # It is where somebody will begin or go on, so it is the last one to be moved away.
        self._pages[ahead.frame], self._free[ahead.frame] = ahead.page, 0 if stale is None else stale.epoch
        self.maps += 1
        if stale is None:
            self.creates += 1
            self.refusal = None
        else:
            self._moved()
            self.moved_ahead += 1

    # For the worker: memory that is given back.

    def begin_trim(self, keep: int) -> Leaving | None:
        """Take in hand the page that is free the longest and may go; None if `keep` or fewer are free, or none may.

        A page stays while a batch may still read it, or while it is mapped in a stale frame too.
        """
        if len(self._free) <= keep:
            return None
        for frame, epoch in self._free.items():
            if epoch <= self.completed and self._pages[frame] not in self._twice:
                del self._free[frame]
                self.placement.set_aside(frame)
                self._in_hand += 1
                return Leaving(self._pages.pop(frame), frame)
        return None

    def begin_again(self, due: Callable[[int], bool] = lambda frame: True) -> Leaving | None:
        """Take in hand a page that is stuck, and whose frame is `due`; None if there is none."""
        for leaving in self._leaving:
            if due(leaving.frame):
                self._leaving.remove(leaving)
                if not leaving.mapped:
                    self.placement.set_aside(leaving.frame)
                self._in_hand += 1
                return leaving
        return None

    def finish_trim(self, leaving: Leaving, *, done: bool) -> None:
        """The page in hand is gone; or it is stuck, and its frame is aside as long as it is mapped there."""
        self._in_hand -= 1
        if not leaving.mapped:
            self.placement.put_back(leaving.frame)
        if done:
            self.unmaps += 1
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
        for stale in self._stale.values():
            with contextlib.suppress(VMMError):
                self.unmap(stale)
        for leaving in [*(Leaving(page, frame) for frame, page in self._pages.items()), *self._leaving]:
            self.release(leaving)
        self.vmm.free(self.base, self.nbytes)

    def check_integrity(self, used: set[int]) -> None:
        """Invariants 1 to 4, as far as one side can see. `used` are the frames whose owners need this side."""
        assert self._pages.keys() - self._free.keys() == used | {0}, "frames that are used, and pages that are"
        assert self._free.keys() <= self._pages.keys()
        assert not self._stale.keys() & self._pages.keys(), "a frame has a page, and a stale mapping"
        held = [*self._pages.values(), *(leaving.page for leaving in self._leaving)]
        assert len(held) == len(set(held)) == self.pages, "a page is in two frames"
        assert self._twice == Counter(stale.page for stale in self._stale.values())
        assert self._twice.keys() <= set(held), "a page was released that is mapped yet"
        assert not any(self.placement.is_vacant(frame) for frame in self._stale)
        assert self.pages + self._in_hand <= self.capacity + 1, (self.pages, self._in_hand, self.capacity)
