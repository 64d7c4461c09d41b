"""The decode batch, followed from step to step.

At nearly every step nothing changes but that each request writes its next token one slot further on, or at the start of
a page that it got for it. What such a step needs is known from the last one, and no other request is looked at: with
hundreds of them, that would cost the scheduling thread more than all else that memory does. Whoever changes a request's
frames, or which requests there are, counts that in `Runtime.changes`; the step behind it looks at all of them again. So
does every step of models with windows, which move with each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import RequestFrames, Runtime


class DecodeBatch:
    """The requests of the last decode step: where each wrote, and how many tokens its frames have room for."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reqs: list[Req] = []
        self._slots: list[int] = []
        self._records: Sequence[RequestFrames] = ()
        self._changes = -1
        self._lengths = self._places = self._ends = np.empty(0, dtype=np.int64)

    def _same(self, reqs: Sequence[Req]) -> bool:
        """Whether these are the requests of the last step, in its order, with the frames that they had."""
        return self._changes == self._runtime.changes and self._reqs == reqs

    def full(self, reqs: Sequence[Req]) -> tuple[list[RequestFrames], list[int]] | None:
        """Those of these requests whose next token has no place yet, and how many tokens each of them has; None where
        that is not known from the last step. For who gives them frames: `grown`."""
        if self._runtime.window is not None or not self._same(reqs):
            return None
        without = np.flatnonzero(self._lengths + 1 >= self._ends).tolist()
        return [self._records[n] for n in without], [int(self._lengths[n]) + 1 for n in without]

    def grown(self, before: int) -> None:
        """Requests of the last step got frames behind those that they had, and nothing else was changed since
        `Runtime.changes` was `before`, when they were the same."""
        if self._changes == before == self._runtime.changes - 1:
            self._changes = self._runtime.changes
            self._ends = self._room_of(self._records)

    def _room_of(self, records: Sequence[RequestFrames]) -> np.ndarray:
        return np.array([len(record.frames) for record in records], dtype=np.int64) * self._runtime.page_tokens

    def next(self, reqs: Sequence[Req], lengths: np.ndarray) -> np.ndarray | None:
        """The slot of the next token of each of these requests, which have so many tokens (int64, both); None where
        that is not known from the last step."""
        if self._runtime.window is not None or not self._same(reqs) or not np.array_equal(lengths, self._lengths + 1):
            return None
        if (lengths >= self._ends).any():
            return None
        self._lengths += 1
        self._places += 1
        tokens = self._runtime.page_tokens
        for n in np.flatnonzero(lengths % tokens == 0).tolist():
            self._places[n] = self._records[n].frames[int(lengths[n]) // tokens] * tokens
        return self._places.copy()

    def look(self, reqs: Sequence[Req], records: Sequence[RequestFrames], lengths: np.ndarray) -> np.ndarray:
        """The same of requests with these records, which have a place for it; the next steps are known from here on."""
        tokens = self._runtime.page_tokens
        pages, inside = np.divmod(lengths, tokens)
        frames = [record.frames[page] for record, page in zip(records, pages.tolist(), strict=True)]
        self._reqs, self._slots = list(reqs), [self._runtime.sglang.slot(req) for req in reqs]
        self._records, self._ends = records, self._room_of(records)
        self._changes = self._runtime.changes
        self._lengths = lengths.copy()  # SGLang counts on in its own
        self._places = np.array(frames, dtype=np.int64) * tokens + inside
        return self._places.copy()

    def forget(self) -> None:
        """No request runs: none of the last step is held on to."""
        self._reqs, self._slots, self._records, self._changes = [], [], (), -1

    def slots(self, reqs: Sequence[Req]) -> list[int]:
        """The rows of these requests in SGLang's table of slots."""
        return self._slots if self._same(reqs) else [self._runtime.sglang.slot(req) for req in reqs]
