"""Unfilled last pages of texts that are over, kept for whoever continues them.

When one is forgotten depends on what is owned and kept, never on what a driver or the worker did: ranks with one
history keep the same ones (invariant 8).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_vtensor.memory import KVMemory


@dataclass(eq=False)
class Tail:
    """A frame whose page still has what its last owner wrote: `tokens` of them, at `kept_at` (`time.monotonic`).
    `frame` is None once it was forgotten."""

    frame: int | None
    tokens: int = 0
    kept_at: float = field(default_factory=time.monotonic)


class Tails:
    """Those of a memory that are kept, the longest kept first. Nobody owns their frames, and they count as free."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._tails: OrderedDict[int, Tail] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._tails)

    def __iter__(self) -> Iterator[Tail]:
        return iter(self._tails.values())

    def frames(self) -> list[int]:
        """The frames that are kept, ascending."""
        return sorted(self._tails)

    def keep(self, frame: int, tokens: int) -> Tail:
        """Take back a frame that is not full, with `tokens` tokens, for the turn that continues its text; until it is
        needed otherwise."""
        tail = Tail(None, tokens)
        with self._memory.held_still():
            self._keep(tail, frame)
        return tail

    def claim(self, tail: Tail) -> int | None:
        """The frame that was kept, with what is in it, now the caller's; None if it is not there any more, or the limit
        is reached."""
        memory = self._memory
        with memory.held_still():
            if tail.frame is None or not memory.available_pages():
                return None
            frame = self._drop(tail)
            memory.placement.claim(frame)
        memory.counts["tails_continued"] += 1
        return frame

    def unclaim(self, tail: Tail, frame: int) -> None:
        """Take back what was claimed and not touched."""
        with self._memory.held_still():
            self._keep(tail, frame)
        self._memory.counts["tails_continued"] -= 1

    def forget(self, tail: Tail) -> None:
        """Nobody wants it any more: its frame is vacant like any other."""
        if tail.frame is None:
            return
        with self._memory.held_still():
            frame = self._drop(tail)
            self._memory.placement.forget(frame)
            self._memory.give([frame])

    def forget_until(self, keep: int) -> int:
        """Forget the longest kept ones until so many are left. Returns how many were forgotten."""
        before = len(self)
        while len(self) > keep and (oldest := self._oldest()) is not None:
            self.forget(oldest)
        return before - len(self)

    def forget_some(self, count: int) -> int:
        """Forget `count` of them, the longest kept first. Returns how many there were."""
        return self.forget_until(max(0, len(self) - count))

    def forget_for(self, nbytes: int) -> None:
        """Forget the longest kept ones until owners have room for so many bytes more."""
        budget = self._memory.budget
        while budget.used + nbytes > budget.nbytes and (oldest := self._oldest()) is not None:
            self.forget(oldest)

    def forget_old(self, before: float) -> None:
        """Forget those that were kept before that time, as `time.monotonic` counts."""
        while (oldest := self._oldest()) is not None and oldest.kept_at < before:
            self.forget(oldest)

    def _keep(self, tail: Tail, frame: int) -> None:
        """The page of `frame` holds the tail, which is the newest one now."""
        self._memory.placement.keep(frame)
        tail.frame = frame
        self._tails[frame] = tail
        self.tokens += tail.tokens

    def _drop(self, tail: Tail) -> int:
        """The tail is kept no longer. Returns the frame that it had."""
        frame = tail.frame
        assert frame is not None
        del self._tails[frame]
        tail.frame = None
        self.tokens -= tail.tokens
        return frame

    def _oldest(self) -> Tail | None:
        return next(iter(self), None)
