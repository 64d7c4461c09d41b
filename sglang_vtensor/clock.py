"""What memory costs the scheduling thread."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager


class Clock:
    """Adds up the seconds spent within `with clock:`, each once, also where these are nested. For one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._start = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start


class Timed(AbstractContextManager[None]):
    """Holds a lock, the wait for it counted."""

    def __init__(self, clock: Clock, lock: AbstractContextManager[object]) -> None:
        self._clock, self._lock = clock, lock

    def __enter__(self) -> None:
        self._clock.__enter__()
        self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)
        self._clock.__exit__()
