"""How many requests are admitted where layers see a window, or have states: each is charged the side of all tokens for
its tokens, and beside that what its window needs, or its states.

SGLang counts one kind of tokens. Here these are tokens of the first side, and other bytes are counted as the tokens
that they hold there. Versions of SGLang bring the class that counts (`patches`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_vtensor.srt.window_side import SIDE, pages_within

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime
    from sglang_vtensor.srt.state_side import StateSide
    from sglang_vtensor.srt.window_side import WindowSide


def longest(nbytes: int, page_bytes: int, window_bytes: int, window_pages: int) -> int:
    """Of how many pages a context is at most that takes `nbytes` bytes together with its window: each of its pages is
    `page_bytes` on the first side, and `window_pages` of them, or all if they are fewer, are `window_bytes` on the
    second one."""
    if window_pages * (page_bytes + window_bytes) >= nbytes:
        return nbytes // (page_bytes + window_bytes)
    return (nbytes - window_pages * window_bytes) // page_bytes


def alone(runtime: Runtime) -> int:
    """How many tokens a request may have at most, prompt and answer together, so that it is admitted while it is the
    only one: with room for a page more, as admission counts one, and for a page that rounding may cost."""
    memory, window = runtime.memory, runtime.window
    first, nbytes = memory.layout.page_bytes, memory.budget.nbytes - 2 * memory.layout.page_bytes
    if window is None:
        assert runtime.states is not None
        return max(0, (nbytes - runtime.states.request_bytes) // first) * memory.layout.page_tokens
    pages = nbytes // memory.page_bytes
    if window.chunk is not None:
        pages = longest(nbytes, first, window.page_bytes, pages_within(window.reach, window.chunk, window.page_tokens))
    most = memory.backings[SIDE].most
    if most is not None and window.chunk is None:
        pages = min(pages, most)
    return max(0, pages) * window.page_tokens


class Counts:
    """What requests need beside the side of all tokens, in tokens of that."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.memory = runtime.memory
        #: What a pass of admission has promised, beside what requests have.
        self.promised = 0

    def tokens(self, nbytes: float) -> float:
        """How many tokens of the first side have so many bytes."""
        return nbytes / self.memory.layout.page_bytes * self.memory.layout.page_tokens

    def available(self, evictable_tokens: int) -> float:
        """Tokens that there is memory for beside what requests need now: what is cached and may be evicted (of the
        first side `evictable_tokens`) is given up for it, but for what was promised."""
        needed = self.memory.needed_bytes - self.runtime.cached_bytes(evictable_tokens)
        return self.tokens(self.memory.budget.nbytes - self.runtime.lacking_bytes() - needed)


class Windows(Counts):
    """Of the side of windows, in pages of it and in tokens of the first side. What it promises (`charge`) is pages."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        assert runtime.window is not None
        self.window: WindowSide = runtime.window

    def left(self) -> float:
        """Pages that may yet be promised, where a bound is set on this side."""
        most = self.memory.backings[SIDE].most
        return float("inf") if most is None else most - self.window.needed - self.promised

    def wanted(self, prefix: int, extend: int, new: int, chunk: int | None) -> int:
        """Pages that a request needs at a time at most, that computes `extend` tokens behind `prefix` ones, no more
        than `chunk` in this batch, and then decodes `new` tokens."""
        now = extend if chunk is None else min(extend, chunk)
        return max(self.window.pages(prefix, prefix + now), self.decoding(prefix + extend + new))

    def decoding(self, tokens: int) -> int:
        """Pages that a request of so many tokens needs at most while it decodes."""
        return min(self.memory.layout.pages_for(tokens), self.window.decoding)

    def held(self, req: Req) -> int:
        """Pages that a request has now."""
        record = self.runtime.requests[self.runtime.sglang.slot(req)]
        return len(record.frames) - record.behind

    def as_tokens(self, pages: int) -> float:
        """So many pages of this side, in tokens of the first one."""
        return self.tokens(pages * self.window.page_bytes)

    def charge(self, pages: int) -> float:
        """Promise so many pages. Returns them as tokens."""
        pages = max(0, pages)
        self.promised += pages
        return self.as_tokens(pages)

    def growth(self, running: Iterable[tuple[Req, float]]) -> float:
        """Promise what running requests, each with the tokens that it is expected to decode yet, need more than they
        have. Returns that as tokens."""
        sglang, pages = self.runtime.sglang, 0
        for req, new in running:
            if sglang.begun(req):  # one that ended in the last batch may be here yet
                pages += max(0, self.decoding(int(sglang.allocated(req) + new) + 1) - self.held(req))
        return self.charge(pages)


class States(Counts):
    """Of states. What it promises (`charge`) is slots."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        assert runtime.states is not None
        self.side: StateSide = runtime.states
        #: Nodes whose states those that were admitted go on behind: they stay, and are among what was promised.
        self.sources: set[int] = set()

    def left(self, req: Req) -> bool:
        """Whether there are slots for one request more, of as many as there may be."""
        return self.promised + self._slots(req) <= self.side.states.left + len(self.side.nodes)

    def wanted(self, req: Req) -> float:
        """What a request takes as it begins, as tokens."""
        return self.tokens(self._slots(req) * self.side.states.page_bytes)

    def charge(self, req: Req) -> float:
        """Promise that. Returns it as tokens."""
        wanted = self.wanted(req)
        self.promised += self._slots(req)
        if not self.runtime.sglang.begun(req) and req.last_node.state is not None:
            self.sources.add(req.last_node.id)
        return wanted

    def _slots(self, req: Req) -> int:
        """Its own, and that of the node it goes on behind, if no other one was promised that; one between two chunks
        has them already."""
        if self.runtime.sglang.begun(req):
            return 0
        node = req.last_node
        return self.side.slots + (node.state is not None and node.id not in self.sources)
