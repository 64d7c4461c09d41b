"""One budget for all sides: how many bytes their pages take together, and which free page goes when one wants more.

    bytes    | side of all tokens: used | free | side of windows: used | free | not created yet |
             |<------------------------------ budget ------------------------------------------>|

No share of it is set apart for a side. A side creates pages until the budget is spent. From then on the page that was
free for the longest time is given back for each new one, whichever side it is on. The padding pages are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_vtensor.backing import Backing


class Budget:
    """`nbytes` bytes for the pages of `sides`, which join as they are made (`Backing`)."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.sides: list[Backing] = []

    @property
    def taken(self) -> int:
        """Bytes of all pages, the stuck ones and those in hand among them; the padding pages are not."""
        return sum(side.held * side.page_bytes for side in self.sides)

    @property
    def used(self) -> int:
        """Bytes of the pages that are used."""
        return sum(side.used * side.page_bytes for side in self.sides)

    @property
    def free(self) -> int:
        """Bytes of the pages that nobody uses."""
        return sum(side.free * side.page_bytes for side in self.sides)

    @property
    def flying(self) -> int:
        """Bytes of the free pages that a batch in flight may still read: they cannot be given back for others now."""
        return sum(side.flying * side.page_bytes for side in self.sides)

    def creatable(self, side: Backing) -> int:
        """How many more pages a side may create."""
        left = max(0, self.nbytes - self.taken) // side.page_bytes
        return left if side.most is None else max(0, min(left, side.most - side.held))

    def make_room(self, side: Backing) -> bool:
        """Give back the pages that were free the longest, until the side may create one more. False where no more may
        go: a batch in flight may read the others. Raises `VMMError` as `Backing.trim` does."""
        while not self.creatable(side):
            full = side.most is not None and side.held >= side.most
            if not self.give_one_back([side] if full else self.sides):
                return False
        return True

    def by_age(self, sides: Sequence[Backing]) -> list[Backing]:
        """The sides with a page that may be given back, the one whose page was free the longest first. Of equal ones,
        the side that has the most free pages."""
        able = [(since, side) for side in sides if (since := side.free_since()) is not None]
        return [side for _, side in sorted(able, key=lambda pair: (pair[0], -pair[1].free))]

    def give_one_back(self, sides: Sequence[Backing] | None = None) -> bool:
        """Give back the page that was free the longest on these sides, or on all. False where none may go. Raises
        `VMMError` as `Backing.trim` does."""
        able = self.by_age(sides or self.sides)
        return bool(able) and able[0].trim(able[0].free - 1) > 0

    def check_integrity(self) -> None:
        """The sum never exceeds the budget, nor a side its bound."""
        assert self.taken <= self.nbytes, (self.taken, self.nbytes)
        for side in self.sides:
            assert side.most is None or side.held <= side.most, (side.held, side.most)
