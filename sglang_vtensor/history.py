"""A few numbers of the last minutes, for the lines on the page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

#: How long samples are kept, and the time between two of them.
SPAN_SECONDS, EVERY_SECONDS = 600.0, 2.0


class History:
    """Samples of the numbers `names`, which `look` returns in that order. `sample` may be called as often as one likes:
    it looks once in `EVERY_SECONDS`."""

    def __init__(self, names: Sequence[str], look: Callable[[], Sequence[float]]) -> None:
        self.names = tuple(names)
        self._look = look
        self._samples: deque[tuple[float, ...]] = deque(maxlen=int(SPAN_SECONDS / EVERY_SECONDS))
        self._due = 0.0

    def sample(self) -> None:
        """Take a sample, unless the last one is not old yet."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + EVERY_SECONDS
            self._samples.append((now, *self._look()))

    def columns(self) -> dict[str, list[float]]:
        """The samples of the last `SPAN_SECONDS`, the oldest first: one list for each name, and in `age` how many
        seconds ago each was taken."""
        now = time.monotonic()
        recent = [sample for sample in self._samples if now - sample[0] <= SPAN_SECONDS]
        columns = list(zip(*recent, strict=True)) or [()] * (1 + len(self.names))
        ages = [round(now - at, 1) for at in columns[0]]
        return {"age": ages, **{name: list(column) for name, column in zip(self.names, columns[1:], strict=True)}}
