"""Which frames a batch gets: where they lie best, with memory, or none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_vtensor.chores import Chores
from sglang_vtensor.placement import runs_of
from sglang_vtensor.room import Room
from sglang_vtensor.supply import Supply


@dataclass(frozen=True, slots=True)
class Ask:
    """`count` frames behind frame `after`, which is the request's `own` or a shared one; None: nothing comes before."""

    after: int | None
    count: int
    own: bool = False


class Handout:
    """Of the frames of a memory, under its lock. `counts` are the memory's own."""

    def __init__(self, room: Room, chores: Chores, supply: Supply, counts: dict[str, int]) -> None:
        self._room, self._chores, self._supply, self._counts = room, chores, supply, counts

    def attempt(self, asks: Sequence[Ask]) -> list[list[int]] | None:
        """Frames for each ask, all of them with memory, or None; then nothing has changed."""
        room = self._room
        self._chores.wait_for({ask.after + 1 for ask in asks if ask.after is not None})
        placed: list[list[int]] = []
        frames: list[int] = []
        lacking = 0
        for ask in asks:
            some = self._place(ask, lacking, len(frames) - lacking) if ask.count else []
            if some is None:
                break
            placed.append(some)
            frames += some
            lacking += len(some) - room.backing.backed_among(some)
        if len(placed) == len(asks) and self._supply.take(room.backings, frames):
            self._count(asks, placed, created=lacking)
            return placed
        room.placement.free(frames)
        return None

    def _count(self, asks: Sequence[Ask], placed: Sequence[Sequence[int]], *, created: int) -> None:
        """These frames are handed out, and so many of them have new pages. What was tried before in vain is not
        counted."""
        total = sum(map(len, placed))
        self._counts["allocated"] += total
        self._counts["created"] += created
        self._counts["with_memory"] += total - created
        for ask, frames in zip(asks, placed, strict=True):
            if ask.after is not None and frames[:1] == [ask.after + 1]:
                self._counts["in_place"] += next(runs_of(frames))[1]

    def _place(self, ask: Ask, without: int, having: int) -> list[int] | None:
        """Frames for one request. For others of its batch some were placed, `without` memory and `having` it. Where no
        more pages may be created, or the driver gives none, those without memory on the first side are given up for
        others that have some."""
        room, backing = self._room, self._room.backing
        frames = room.placement.place(ask.after, ask.count, own=ask.own)
        if frames is None:
            return None
        lacking = len(frames) - backing.backed_among(frames)
        if not lacking or (not room.short and lacking + without <= backing.creatable):
            return frames
        there = list(filter(backing.has_page, frames))
        if backing.free - having - len(there) < lacking or len(others := backing.newest_vacant(lacking)) < lacking:
            return frames
        room.placement.free(set(frames).difference(there))
        room.placement.take(others)
        return there + others
