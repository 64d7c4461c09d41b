"""Placement: which frames of the slot region go to whom. Plain data: no driver, no thread, no memory behind it.

A frame is a place for one page, and there are many times as many frames as pages. So what a request adds of its own can
lie one frame behind the other, and what the next turn adds behind that:

    lane    | s0 s1 a0 a1 a2 .  .  . | b0 b1 .  .  .  .  .  . | c0 c1 c2 .  .  .  .  .  |
              system prompt, and         another conversation   a third one
              the first conversation     behind it

Extents are what requests begin in: whole lanes, which are as long as the longest context, so that nobody outgrows one.
Where addresses are short, extents in use are halved from behind: the longest ones first, and of these the one that was
unused the longest. A half that is free grows together again with its other half. Where nothing can be halved, frames
are taken wherever they are vacant: that costs contiguity, never correctness.

    free --place--> live (some frame of it is owned or kept) --the last one is freed--> free
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


class FrameState(enum.IntEnum):
    VACANT = 0
    OWNED = 1
    #: Nobody owns it, but it holds the unfilled last page of a text that may be continued.
    KEPT = 2
    #: Nobody owns it and nobody may be placed there for now: on some side the worker is giving it memory or taking it
    #: away, or the driver did not take it back.
    ASIDE = 3


@dataclass(eq=False, slots=True)
class Extent:
    """`size` frames from `start` on, both powers of two of frames; `used` of them are owned or kept."""

    start: int
    size: int
    used: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


#: Free extents that are looked at for one whose first frames are vacant.
LOOKED_AT = 8
#: Of each extent that is handed out next, so many frames are worth having memory.
LEAD = 8


def lane_frames_for(frames: int) -> int:
    """The length of a lane for contexts of up to that many frames: a power of two."""
    return 1 << max(0, frames - 1).bit_length()


def runs_of(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of a context: the first frame of each, and how many follow one another."""
    first = count = 0
    for frame in frames:
        if count and frame == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = frame, 1
    if count:
        yield first, count


class Placement:
    """`num_frames` frames in lanes of `lane_frames`. Frame 0 is the padding frame, and is owned for good.

    Not thread-safe.
    """

    def __init__(self, num_frames: int, lane_frames: int) -> None:
        if lane_frames & (lane_frames - 1) or num_frames % lane_frames or num_frames < 2:
            raise ValueError(
                f"{num_frames} frames in lanes of {lane_frames}: a power of two for a lane, and at least two frames in "
                "whole lanes wanted"
            )
        self.num_frames = num_frames
        self.lane_frames = lane_frames
        self._states = bytearray(num_frames)
        #: How many things (one a side at most) keep a frame from being handed out, owned or not at this moment.
        self._aside: dict[int, int] = {}
        self._counts = [0] * len(FrameState)
        self._counts[FrameState.VACANT] = num_frames
        #: By start; all but the lanes that nobody ever began in.
        self._extents: dict[int, Extent] = {}
        #: By size, those that are free, the one freed last is the last.
        self._free: dict[int, OrderedDict[int, Extent]] = {}
        #: By size, live ones that may be halved, the longest unused first.
        self._roomy: dict[int, OrderedDict[int, Extent]] = {}
        self._next_lane = 0
        self.halved = 0
        self._own(self._at(0), [0])

    # What there is.

    def state(self, frame: int) -> FrameState:
        return FrameState(self._states[frame])

    def is_vacant(self, frame: int) -> bool:
        return self._states[frame] == FrameState.VACANT

    def count(self, state: FrameState) -> int:
        """How many frames are in a state; the padding frame is an owned one."""
        return self._counts[state]

    @property
    def owned(self) -> int:
        """Frames that requests and nodes own; the padding frame is not among them."""
        return self._counts[FrameState.OWNED] - 1

    @property
    def kept(self) -> int:
        return self._counts[FrameState.KEPT]

    def owned_frames(self) -> list[int]:
        """Every frame that is owned, ascending; not the padding frame."""
        frames: list[int] = []
        at = 0
        while (at := self._states.find(bytes([FrameState.OWNED]), at + 1)) >= 0:
            frames.append(at)
        return frames

    def extent_of(self, frame: int) -> Extent:
        """The extent that a frame is in. Raises `KeyError` where nobody ever began."""
        size = self.lane_frames
        while size:
            extent = self._extents.get(frame & -size)
            if extent is not None and frame < extent.end:
                return extent
            size >>= 1
        raise KeyError(frame)

    def room_behind(self, frame: int) -> int | None:
        """The frame behind, if that is vacant and in the same extent."""
        behind = frame + 1
        return behind if behind < self.extent_of(frame).end and self.is_vacant(behind) else None

    # Placing.

    def place(self, after: int | None, count: int, *, own: bool = False) -> list[int] | None:
        """`count` frames, now owned: right behind frame `after` where they are vacant, else in an extent that is free,
        else wherever there are any. None if there are not so many vacant ones.

        `own` says that `after` is the caller's own, and not a shared one: then it takes what there is behind it also
        where that is not all. Another caller begins an extent of its own instead, so that it has one run.
        """
        if count > self._counts[FrameState.VACANT]:
            return None
        frames: list[int] = []
        if after is not None:
            extent = self.extent_of(after)
            end = self._vacant_until(after + 1, min(extent.end, after + 1 + count))
            if own or end == after + 1 + count:
                frames.extend(range(after + 1, end))
                self._own(extent, frames)
        while len(frames) < count:
            left = count - len(frames)
            found = self._take_extent(left)
            if found is None:
                frames += self._pick(left)
                break
            end = self._vacant_until(found.start, min(found.end, found.start + left))
            some = list(range(found.start, end))
            self._own(found, some)
            frames += some
        return frames

    def take(self, frames: Sequence[int]) -> None:
        """Own these vacant frames, which the caller chose."""
        for frame in frames:
            self._expect(frame, FrameState.VACANT)
            self._own(self._at(frame), [frame])

    def free(self, frames: Iterable[int]) -> None:
        """Owned frames are vacant from now on."""
        for frame in frames:
            if not 0 < frame < self.num_frames:
                raise ValueError(f"frame {frame}: one between 1 and {self.num_frames - 1} wanted")
            self._expect(frame, FrameState.OWNED)
            self._vacate(frame)

    def keep(self, frame: int) -> None:
        """An owned frame becomes a kept one: nobody owns it, and its page holds the end of a text that may be
        continued."""
        self._expect(frame, FrameState.OWNED)
        self._set(frame, FrameState.KEPT)

    def claim(self, frame: int) -> None:
        """A kept frame is owned again."""
        self._expect(frame, FrameState.KEPT)
        self._set(frame, FrameState.OWNED)

    def forget(self, frame: int) -> None:
        """A kept frame is vacant."""
        self._expect(frame, FrameState.KEPT)
        self._vacate(frame)

    # What backing does.

    def set_aside(self, frame: int) -> None:
        """From now on nobody is placed at this frame, until `put_back` was called as often as this. An owner keeps
        it."""
        self._aside[frame] = self._aside.get(frame, 0) + 1
        if self._states[frame] == FrameState.VACANT:
            self._set(frame, FrameState.ASIDE)

    def is_aside(self, frame: int) -> bool:
        """Whether `set_aside` was called more often than `put_back`, whoever owns the frame."""
        return frame in self._aside

    def put_back(self, frame: int) -> None:
        """Undo one `set_aside`."""
        self._aside[frame] -= 1
        if self._aside[frame]:
            return
        del self._aside[frame]
        if self._states[frame] == FrameState.ASIDE:
            self._set(frame, FrameState.VACANT)

    def next_without(self, has_memory: Callable[[int], bool]) -> int | None:
        """A vacant frame without memory where a request will begin before long: among the first ones of the extents
        that are handed out next. None if those have memory."""
        for extent in self._handed_out_next():
            for frame in range(extent.start, min(extent.start + LEAD, extent.end)):
                if self._states[frame] == FrameState.VACANT and not has_memory(frame):
                    return frame
        return None

    def _handed_out_next(self) -> Iterator[Extent]:
        seen = 0
        for extent in reversed(self._free.get(self.lane_frames, {}).values()):
            yield extent
            seen += 1
            if seen == LOOKED_AT:
                return
        for lane in range(self._next_lane, self.num_frames // self.lane_frames):
            yield Extent(lane * self.lane_frames, self.lane_frames)
            seen += 1
            if seen == LOOKED_AT:
                return

    # Extents.

    def _take_extent(self, count: int) -> Extent | None:
        """An extent that was free, of which the first frames are vacant: a lane that was used before (it may still have
        memory), a new lane, or the longest that there is of shorter extents and of halves of those in use. None where
        there is none."""
        lanes = self._free.get(self.lane_frames)
        if lanes and (found := self._with_vacant_start(lanes, count)) is not None:
            return found
        if (fresh := self._fresh_lane()) is not None:
            return fresh
        size = self.lane_frames
        while size:
            if (free := self._free.get(size)) and (found := self._with_vacant_start(free, 1)) is not None:
                return found
            if (half := self._halve(size)) is not None:
                return half
            size //= 2
        return None

    def _with_vacant_start(self, free: OrderedDict[int, Extent], count: int) -> Extent | None:
        for looked_at, extent in enumerate(reversed(free.values())):
            count = min(count, extent.size)
            if self._vacant_until(extent.start, extent.start + count) == extent.start + count:
                return extent
            if looked_at == LOOKED_AT:
                break
        return None

    def _fresh_lane(self) -> Extent | None:
        start = self._next_lane * self.lane_frames
        if start == self.num_frames:
            return None
        self._next_lane += 1
        extent = self._extents[start] = Extent(start, self.lane_frames)
        self._set_free(extent)
        return extent

    def _halve(self, half: int) -> Extent | None:
        """The vacant back half, of that size, of an extent in use: of the one that was unused the longest."""
        roomy = self._roomy.get(2 * half, OrderedDict())
        for start, extent in list(roomy.items()):
            taken = self._vacant_until(start + half, extent.end)
            if taken < extent.end:
                if self._states[taken] != FrameState.ASIDE:
                    del roomy[start]  # until something of it is freed
                continue
            del roomy[start]
            extent.size = half
            self._touch(extent)
            self.halved += 1
            behind = self._extents[start + half] = Extent(start + half, half)
            self._set_free(behind)
            return behind
        return None

    def _pick(self, count: int) -> list[int]:
        """Vacant frames wherever they are."""
        frames: list[int] = []
        for extent in list(self._extents.values()):
            at = extent.start
            some: list[int] = []
            while len(frames) + len(some) < count:
                at = self._states.find(bytes([FrameState.VACANT]), at, extent.end)
                if at < 0:
                    break
                some.append(at)
                at += 1
            self._own(extent, some)
            frames += some
            if len(frames) == count:
                break
        assert len(frames) == count, (len(frames), count)
        return frames

    def _at(self, frame: int) -> Extent:
        """The extent of a frame; a lane that nobody began in is begun."""
        while frame >= self._next_lane * self.lane_frames:
            self._fresh_lane()
        return self.extent_of(frame)

    def _own(self, extent: Extent, frames: Sequence[int]) -> None:
        if not frames:
            return
        if not extent.used:
            del self._free[extent.size][extent.start]
        extent.used += len(frames)
        for frame in frames:
            self._set(frame, FrameState.OWNED)
        self._touch(extent)

    def _vacate(self, frame: int) -> None:
        extent = self.extent_of(frame)
        self._set(frame, FrameState.ASIDE if frame in self._aside else FrameState.VACANT)
        extent.used -= 1
        if extent.used:
            self._touch(extent)
            return
        self._roomy[extent.size].pop(extent.start, None)
        self._set_free(extent)

    def _touch(self, extent: Extent) -> None:
        roomy = self._roomy.setdefault(extent.size, OrderedDict())
        roomy[extent.start] = extent
        roomy.move_to_end(extent.start)

    def _set_free(self, extent: Extent) -> None:
        """An extent that nobody uses grows together with its other half, if nobody uses that."""
        while extent.size < self.lane_frames:
            of_size = self._free.get(extent.size)
            other = of_size.pop(extent.start ^ extent.size, None) if of_size else None
            if other is None:
                break
            del self._extents[max(extent.start, other.start)]
            extent = self._extents[min(extent.start, other.start)]
            extent.size *= 2
        self._free.setdefault(extent.size, OrderedDict())[extent.start] = extent

    # Frames.

    def _vacant_until(self, start: int, stop: int) -> int:
        """The first frame from `start` on that is not vacant, or `stop`."""
        states = self._states
        while start < stop and states[start] == FrameState.VACANT:
            start += 1
        return start

    def _set(self, frame: int, state: FrameState) -> None:
        self._counts[self._states[frame]] -= 1
        self._counts[state] += 1
        self._states[frame] = state

    def _expect(self, frame: int, state: FrameState) -> None:
        if self._states[frame] != state:
            raise ValueError(f"frame {frame} is {self.state(frame).name}: {state.name} wanted")

    def check_integrity(self) -> None:
        """Each frame is in one state, each extent in one list, and all counts agree."""
        ends = used = 0
        for extent in sorted(self._extents.values(), key=lambda extent: extent.start):
            assert extent.start == ends, f"a gap before {extent}"
            assert extent.start % extent.size == 0
            ends = extent.end
            here = self._states[extent.start : extent.end]
            assert extent.used == here.count(FrameState.OWNED) + here.count(FrameState.KEPT), extent
            used += extent.used
            of_size = self._free.get(extent.size, OrderedDict())
            assert (of_size.get(extent.start) is extent) == (not extent.used), extent
            roomy = [size for size, some in self._roomy.items() if extent.start in some]
            assert roomy in ([], [extent.size] if extent.used else []), extent
        assert ends == self._next_lane * self.lane_frames
        assert sum(map(len, self._free.values())) == sum(not extent.used for extent in self._extents.values())
        assert used == self._counts[FrameState.OWNED] + self._counts[FrameState.KEPT]
        assert sum(self._counts) == self.num_frames
        # What nobody began in is far more than the rest.
        assert self._states.find(bytes([FrameState.OWNED]), ends) < 0, "owned before it began"
        assert self._states[0] == FrameState.OWNED
        aside = [self._states[frame] for frame in self._aside]
        assert aside.count(FrameState.ASIDE) == self._counts[FrameState.ASIDE], "a frame is aside, and nothing keeps it"
        assert FrameState.VACANT not in aside
