"""Unfilled last pages of texts that are over, kept for whoever continues them.

When one is forgotten depends on what is owned and kept, never on what a driver or the worker did: ranks with one
history keep the same ones (invariant 8).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Tail:
    """A frame whose page still has what its last owner wrote: `tokens` of them, at `kept_at` (`time.monotonic`).
    `frame` is None once it was forgotten."""

    frame: int | None
    tokens: int = 0
    kept_at: float = field(default_factory=time.monotonic)


class Tails:
    """Those that are kept, the longest kept first."""

    def __init__(self) -> None:
        self._tails: OrderedDict[int, Tail] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._tails)

    def __iter__(self) -> Iterator[Tail]:
        return iter(self._tails.values())

    def frames(self) -> list[int]:
        """The frames that are kept, ascending."""
        return sorted(self._tails)

    def keep(self, tail: Tail, frame: int) -> None:
        """Remember that the page of `frame` holds the tail, which is the newest one now."""
        tail.frame = frame
        self._tails[frame] = tail
        self.tokens += tail.tokens

    def drop(self, tail: Tail) -> int:
        """The tail is kept no longer. Returns the frame that it had."""
        frame = tail.frame
        assert frame is not None
        del self._tails[frame]
        tail.frame = None
        self.tokens -= tail.tokens
        return frame

    def oldest(self) -> Tail | None:
        return next(iter(self._tails.values()), None)
