"""Which frames have memory on the side of layers that see a window.

A token reads the frames that its window reaches back to. So behind the window of a request the frames lose their memory
on this side, and keep it on the side of all tokens:

    frames        0  1  2  3  4  5  6  7         the next token is in frame 7, and its window reaches back to frame 5
    all tokens    x  x  x  x  x  x  x  x
    this side     .  .  x  x  .  x  x  x         2 and 3: a node ends behind them, and who goes on there needs them

A frame has memory here for one of three reasons (invariant 10): a request has it for itself and within its window; a
request `holds` it, a frame of the tree within its window; or it is within the window of the end of a node, where a
match may end. A match ends only where the window before it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_vtensor.memory import KVMemory
    from sglang_vtensor.srt.runtime import RequestFrames

#: The second side of a memory that has one.
SIDE = 1


class WindowSide:
    """`reach` is how many tokens before one the side is read, tiles of kernels among it."""

    def __init__(self, memory: KVMemory, reach: int) -> None:
        self.memory = memory
        self.reach = reach
        #: By frame of the tree, how many requests hold it.
        self.holders: dict[int, int] = {}

    def first(self, token: int) -> int:
        """The first frame of a context that this token reads."""
        return max(0, token - self.reach) // self.memory.layout.page_tokens

    def there(self, frame: int) -> bool:
        """Whether an owned or kept frame has memory here."""
        return self.memory.backings[SIDE].uses(frame)

    def whole(self, frames: Sequence[int], token: int) -> bool:
        """Whether all that `token` reads of these frames, the first ones of its context, is there."""
        return all(map(self.there, frames[self.first(token) :]))

    def longest(self, frames: Sequence[int]) -> int:
        """How many of these frames, from the first one on, a request may go on behind."""
        tokens, longest, together = self.memory.layout.page_tokens, 0, 0
        for count, frame in enumerate(frames, start=1):
            together = together + 1 if self.there(frame) else 0
            if together >= count - self.first(count * tokens):
                longest = count
        return longest

    # A request.

    def begins(self, record: RequestFrames, token: int) -> None:
        """A request goes on with this token behind frames of the tree."""
        record.behind = self.first(token)
        self.hold(record.frames[record.behind : record.protected])

    def hold(self, frames: Iterable[int]) -> None:
        for frame in frames:
            self.holders[frame] = self.holders.get(frame, 0) + 1

    def slide(self, record: RequestFrames, token: int) -> None:
        """The request's tokens from this one on are still to be computed. What the tree has not got yet stays a little
        longer, as its pages may lack just that."""
        first = self.first(token)
        if first <= record.behind or record.awaited:
            return
        own = max(record.behind, record.protected)
        if first > own:
            self.memory.let_go(SIDE, record.frames[own:first])
        self._release(record, record.behind, min(first, record.protected))
        record.behind = first

    def ends(self, record: RequestFrames) -> None:
        """The request is over; what it has for itself is the caller's."""
        self._release(record, record.behind, record.protected)

    def _release(self, record: RequestFrames, start: int, stop: int) -> None:
        if start >= stop:
            return
        ends = self._ends(record.leaf)
        gone = []
        for n, frame in enumerate(record.frames[start:stop], start=start):
            self.holders[frame] -= 1
            if not self.holders[frame]:
                del self.holders[frame]
                if not any(first <= n < end for first, end in ends):
                    gone.append(frame)
        if gone:
            self.memory.let_go(SIDE, gone)

    def _ends(self, leaf: Any) -> list[tuple[int, int]]:
        """Of each node of a path, the frames within the window of its end: the first one, and one past the last."""
        tokens, ends = self.memory.layout.page_tokens, []
        while leaf is not None and leaf.parent is not None:
            ends.append((self.first(leaf.depth), leaf.depth // tokens))
            leaf = leaf.parent
        return ends

    # The tree.

    def lacking(self, record: RequestFrames, theirs: Sequence[int]) -> list[int]:
        """The tree has `theirs` for the first frames of a request, which computed some of them anew, as their windows
        were gone. Returns which of them, by number, are to have memory again: those that the request's next token
        reads, and the window of their end."""
        start = max(self.first(len(theirs) * self.memory.layout.page_tokens), record.protected, record.behind)
        return [n for n in range(start, len(theirs)) if not self.there(theirs[n])]

    def check_integrity(self, records: Iterable[RequestFrames], nodes: Iterable[Any]) -> None:
        """Memory is here where one of the three reasons says so, and nowhere else."""
        holders: dict[int, int] = {}
        wanted: set[int] = set()
        for record in records:
            own = max(record.behind, record.protected)
            wanted.update(record.frames[own:])
            assert not any(map(self.there, record.frames[record.protected : own])), "an own frame behind the window"
            for frame in record.frames[record.behind : record.protected]:
                holders[frame] = holders.get(frame, 0) + 1
        assert holders == self.holders, (holders, self.holders)
        wanted.update(holders)
        assert all(map(self.there, wanted)), "a frame that is needed has no memory"
        owned: set[int] = set()
        for node in nodes:
            path, at = [], node
            owned.update(node.frames)
            while at.parent is not None:
                path.append(at.frames)
                at = at.parent
            frames = [frame for some in reversed(path) for frame in some]
            wanted.update(frames[self.first(node.depth) :])
        beyond = [frame for frame in owned if self.there(frame) and frame not in wanted]
        assert not beyond, f"frames {beyond} have memory that nobody needs"
