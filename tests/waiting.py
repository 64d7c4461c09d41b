"""Waiting for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Nothing takes so long, also where other tests have both cores of a slow machine.
SECONDS = 120.0


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the worker did not do it"
        time.sleep(0.005)
