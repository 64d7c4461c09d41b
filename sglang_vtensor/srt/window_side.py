"""Which frames have memory on the side of layers that see a window.

A token reads the frames that its window reaches back to. So behind the window of a request the frames lose their memory
on this side, and keep it on the side of all tokens:

    frames        0  1  2  3  4  5  6  7         the next token is in frame 7, and its window reaches back to frame 5
    all tokens    x  x  x  x  x  x  x  x
    this side     .  .  x  x  .  x  x  x         2 and 3: a node ends behind them, and who goes on there needs them

A frame has memory here for one of three reasons (invariant 10): a request has it for itself and within its window; a
request `holds` it, a frame of the tree within its window; or it is within the window of the end of a node, where a
match may end. A match ends only where the window before it is there. Where memory is short, the ends that nobody
matched for the longest time lose their windows, and their nodes keep the side of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_vtensor.srt.ends import Ends

if TYPE_CHECKING:
    from sglang_vtensor.srt.runtime import RequestFrames, Runtime

#: The second side of a memory that has one.
SIDE = 1


def pages_within(reach: int, tokens: int, page_tokens: int) -> int:
    """Pages of `page_tokens` tokens that so many tokens in a row are in at most, together with the `reach` tokens
    before them."""
    return -(-(reach + tokens) // page_tokens) + 1


class WindowSide(Ends):
    """Of a runtime's memory. `reach` is how many tokens before one the side is read, tiles of kernels among it. An
    extend batch computes at most `chunk` tokens of a request; None: all of them."""

    def __init__(self, runtime: Runtime, reach: int, chunk: int | None = None) -> None:
        super().__init__()  # of nodes that have a window (`node.window`)
        self.runtime = runtime
        self.memory = runtime.memory
        self.reach = reach
        self.chunk = chunk
        #: By frame of the tree, how many requests hold it, and within how many ends' windows it is.
        self.holders: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        #: Frames that have memory for ends alone: no request holds them.
        self.spare = 0

    # How much there is.

    @property
    def page_tokens(self) -> int:
        return self.memory.layout.page_tokens

    @property
    def page_bytes(self) -> int:
        return self.memory.sides[SIDE].page_bytes

    def first(self, token: int) -> int:
        """The first frame of a context that this token reads."""
        return max(0, token - self.reach) // self.page_tokens

    def pages(self, start: int, stop: int) -> int:
        """Pages that a batch needs that computes the tokens from `start` on, up to `stop`."""
        return -(-stop // self.page_tokens) - self.first(start)

    @property
    def decoding(self) -> int:
        """Pages that a request needs at most to compute one token."""
        return pages_within(self.reach, 1, self.page_tokens)

    def most_pages(self, tokens: int) -> int:
        """Pages that a request of so many tokens needs at a time at most, in a chunk of prefill or behind it."""
        pages = -(-tokens // self.page_tokens)
        return pages if self.chunk is None else min(pages, pages_within(self.reach, self.chunk, self.page_tokens))

    @property
    def needed(self) -> int:
        """Pages that requests need now; the others, those of ends and of kept frames, are given up for them."""
        return self.memory.backings[SIDE].used - len(self.memory.tails) - self.spare

    def there(self, frame: int) -> bool:
        """Whether an owned or kept frame has memory here."""
        return self.memory.backings[SIDE].uses(frame)

    def whole(self, frames: Sequence[int], token: int) -> bool:
        """Whether all that `token` reads of these frames, the first ones of its context, is there."""
        return all(map(self.there, frames[self.first(token) :]))

    def longest(self, frames: Sequence[int]) -> int:
        """How many of these frames, from the first one on, a request may go on behind."""
        tokens, longest, together = self.page_tokens, 0, 0
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
        if record.leaf is not None and record.leaf.id in self.nodes:
            self.touch(record.leaf)

    def hold(self, frames: Iterable[int]) -> None:
        for frame in frames:
            self.spare -= frame in self.ends and frame not in self.holders
            self.holders[frame] = self.holders.get(frame, 0) + 1

    def slide(self, record: RequestFrames, token: int) -> None:
        """The request's tokens from this one on are still to be computed. What the tree has not got yet stays a little
        longer, as its pages may lack just that."""
        first = self.first(token)
        if first <= record.behind or record.awaited:
            return
        own = max(record.behind, record.protected)
        if first > own:
            self._let_go(record.frames[own:first])
        self.release(record.frames[record.behind : min(first, record.protected)])
        record.behind = first

    def over(self, record: RequestFrames) -> None:
        """The request is over; what it has for itself is the caller's."""
        self.release(record.frames[record.behind : record.protected])

    def release(self, frames: Sequence[int], epoch: int | None = None) -> None:
        """Undo `hold`. Batches up to `epoch` read the frames; None: as `Runtime.last_reader` says."""
        gone = []
        for frame in frames:
            self.holders[frame] -= 1
            if not self.holders[frame]:
                del self.holders[frame]
                self.spare += frame in self.ends
                if frame not in self.ends:
                    gone.append(frame)
        self._let_go(gone, epoch)

    def _let_go(self, frames: Sequence[int], epoch: int | None = None) -> None:
        """Tokens that are still to be computed are too far behind these frames to read them."""
        if frames:
            self.memory.let_go(SIDE, frames, self.runtime.last_reader if epoch is None else epoch)

    # The ends of nodes.

    def keep(self, node: Any, frames: Sequence[int]) -> None:
        """A match may end at the end of this node, whose path has these frames: what is there of its window stays."""
        window = [frame for frame in frames[self.first(node.depth) :] if self.there(frame)]
        before = node.window
        for frame in window:
            self.spare += frame not in self.ends and frame not in self.holders
            self.ends[frame] = self.ends.get(frame, 0) + 1
        node.window = window
        self._let_go(self._forget(before))
        self.touch(node)

    def drop(self, node: Any) -> None:
        """The end of this node needs no window any more."""
        frames, node.window = node.window, []
        self.nodes.pop(node.id, None)
        self._let_go(self._forget(frames))

    def _forget(self, frames: Sequence[int]) -> list[int]:
        """An end with this window is gone. Returns the frames that nothing needs any more."""
        gone = []
        for frame in frames:
            self.ends[frame] -= 1
            if not self.ends[frame]:
                del self.ends[frame]
                if frame not in self.holders:
                    self.spare -= 1
                    gone.append(frame)
        return gone

    def clear(self) -> None:
        """Every frame is taken back."""
        self.holders.clear()
        self.ends.clear()
        self.nodes.clear()
        self.spare = 0

    # The tree.

    def lacking(self, record: RequestFrames, theirs: Sequence[int]) -> list[int]:
        """The tree has `theirs` for the first frames of a request, which computed some of them anew, as their windows
        were gone. Returns which of them, by number, are to have memory again: those that the request's next token
        reads, and the window of their end."""
        start = max(self.first(len(theirs) * self.page_tokens), record.protected, record.behind)
        return [n for n in range(start, len(theirs)) if not self.there(theirs[n])]

    def check_integrity(self, records: Iterable[RequestFrames], nodes: Iterable[Any]) -> None:
        """Memory is here where one of the three reasons says so, and nowhere else."""
        holders: dict[int, int] = {}
        wanted: set[int] = set()
        own_pages = 0
        for record in records:
            own = max(record.behind, record.protected)
            wanted.update(record.frames[own:])
            own_pages += len(record.frames) - own
            assert not any(map(self.there, record.frames[record.protected : own])), "an own frame behind the window"
            for frame in record.frames[record.behind : record.protected]:
                holders[frame] = holders.get(frame, 0) + 1
        assert holders == self.holders, (holders, self.holders)
        wanted.update(holders)
        ends: dict[int, int] = {}
        owned: set[int] = set()
        for node in nodes:
            path, at = [], node
            owned.update(node.frames)
            while at.parent is not None:
                path.append(at.frames)
                at = at.parent
            frames = [frame for some in reversed(path) for frame in some]
            assert set(node.window) <= set(frames[self.first(node.depth) :]), "an end keeps what is not its window"
            assert (self.nodes.get(node.id) is node) or not node.window
            for frame in node.window:
                ends[frame] = ends.get(frame, 0) + 1
        assert ends == self.ends, (ends, self.ends)
        wanted.update(ends)
        assert all(map(self.there, wanted)), "a frame that is needed has no memory"
        beyond = [frame for frame in owned if self.there(frame) and frame not in wanted]
        assert not beyond, f"frames {beyond} have memory that nobody needs"
        assert self.spare == len(ends.keys() - holders.keys())
        assert self.needed == own_pages + len(holders)
