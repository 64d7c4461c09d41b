"""What following who shares what takes of the scheduling thread, for each decode step. Needs no GPU.

Requests come and go all the time: in each step some end, and as many join that share what the others do.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from itertools import count
from types import SimpleNamespace
from typing import Any

from sglang_vtensor.srt.batch_sharing import BatchSharing
from sglang_vtensor.srt.runtime import RequestFrames

PAGE = 16
#: Pages that all share, groups and the pages of each, and pages of each request: a system prompt of 2,048 tokens, eight
#: documents of 16,384, and questions of 256.
OF_ALL, GROUPS, OF_GROUP, OWN = 128, 8, 1024, 16
#: Steps in a row; the median of several is told.
STEPS, TIMES = 200, 7


def step_us(requests: int = 256, joining: int = 2) -> float:
    """Microseconds a step of `requests` requests, of which `joining` are new and as many have ended since the last."""
    memory = SimpleNamespace(clock=contextlib.nullcontext())
    runtime: Any = SimpleNamespace(request_slots=requests + 1, page_tokens=PAGE, requests={}, memory=memory)
    sharing = BatchSharing(runtime, requests=requests, group=4, token_bytes=4096)
    page = count(10_000_000)
    stems = [[*range(OF_ALL), *range((n + 1) * 100_000, (n + 1) * 100_000 + OF_GROUP)] for n in range(GROUPS)]

    def admit(slot: int, number: int) -> None:
        frames = stems[number % GROUPS] + [next(page) for _ in range(OWN)]
        runtime.requests[slot] = RequestFrames(frames, len(frames), len(frames))

    slots = list(range(1, requests + 1))
    for number, slot in enumerate(slots):
        admit(slot, number)
    sharing.begin(slots, 10**6, 10**4)
    seen, numbers = [], count()
    for _ in range(TIMES):
        seconds = 0.0
        for _ in range(STEPS):
            ended, slots = slots[:joining], slots[joining:]
            start = time.perf_counter()
            for slot in ended:
                sharing.left(slot)
            seconds += time.perf_counter() - start
            for slot in ended:
                admit(slot, next(numbers))
            slots += ended
            start = time.perf_counter()
            sharing.begin(slots, 10**6, 10**4)
            seconds += time.perf_counter() - start
        seen.append(seconds / STEPS)
    return 1e6 * statistics.median(seen)
