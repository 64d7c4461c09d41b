"""The decode batch, followed from step to step.

At nearly every step nothing changes but that each request writes its next token one slot further on. What such a step
needs is known from the last one, and no request is looked at: with hundreds of them, that would cost the scheduling
thread more than all else that memory does. Whoever changes a request's frames, or which requests there are, counts that
in `Runtime.changes`; the step behind it looks at all of them again. So does every step of models with windows, which
move with each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import RequestFrames, Runtime


class DecodeBatch:
    """The requests of the last decode step: where each wrote, and how many steps more each of them has room for."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reqs: list[Req] = []
        self._slots: list[int] = []
        self._changes = -1
        self._left = 0
        self._lengths = self._places = np.empty(0, dtype=np.int64)

    def _same(self, reqs: Sequence[Req]) -> bool:
        """Whether these are the requests of the last step, in its order, with the frames that they had."""
        return self._changes == self._runtime.changes and self._reqs == reqs

    def has_room(self, reqs: Sequence[Req]) -> bool:
        """Whether it is known that the next token of each of these requests has a place."""
        return self._left > 0 and self._same(reqs)

    def next(self, reqs: Sequence[Req], lengths: np.ndarray) -> np.ndarray | None:
        """The slot of the next token of each of these requests, which have so many tokens (int64, both); None where
        that is not known from the last step."""
        if not self.has_room(reqs) or not np.array_equal(lengths, self._lengths + 1):
            return None
        self._left -= 1
        self._lengths += 1
        self._places += 1
        return self._places.copy()

    def look(self, reqs: Sequence[Req], records: Sequence[RequestFrames], lengths: np.ndarray) -> np.ndarray:
        """The same of requests with these records, which have a place for it; the next steps are known from here on."""
        tokens = self._runtime.page_tokens
        ends = np.array([len(record.frames) for record in records], dtype=np.int64) * tokens
        pages, inside = np.divmod(lengths, tokens)
        frames = [record.frames[page] for record, page in zip(records, pages.tolist(), strict=True)]
        self._reqs, self._slots = list(reqs), [self._runtime.sglang.slot(req) for req in reqs]
        self._changes = self._runtime.changes
        self._left = int((ends - lengths).min()) - 1 if self._runtime.window is None else 0
        self._lengths = lengths.copy()  # SGLang counts on in its own
        self._places = np.array(frames, dtype=np.int64) * tokens + inside
        return self._places.copy()

    def forget(self) -> None:
        """No request runs: none of the last step is held on to."""
        self._reqs, self._slots, self._left = [], [], 0

    def slots(self, reqs: Sequence[Req]) -> list[int]:
        """The rows of these requests in SGLang's table of slots."""
        return self._slots if self._same(reqs) else [self._runtime.sglang.slot(req) for req in reqs]
