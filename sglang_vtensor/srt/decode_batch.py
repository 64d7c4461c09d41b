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

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import RequestFrames, Runtime


class DecodeBatch:
    """The requests of the last decode step, the page that each wrote to, and for how many steps all have room.

    Lengths and slots are int64 tensors on the host, `(requests,)`: between two forward passes, a first operation of
    another library costs several of these.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reqs: list[Req] = []
        self._slots: list[int] = []
        self._records: Sequence[RequestFrames] = ()
        self._changes = -1
        # Of each request: its tokens before the next step, how many its frames have room for, the last one that its
        # page has room for, and how far slots of that page are ahead of tokens.
        self._lengths = self._ends = self._last = self._ahead = torch.empty(0, dtype=torch.int64)
        self._full: list[int] = []
        # For so many steps more each has a place for its next token, and for so many it is in the same page.
        self._steps = self._inside = 0

    def _same(self, reqs: Sequence[Req]) -> bool:
        """Whether these are the requests of the last step, in its order, with the frames that they had."""
        return self._changes == self._runtime.changes and self._reqs == reqs

    def full(self, reqs: Sequence[Req]) -> tuple[list[RequestFrames], list[int]] | None:
        """Those of these requests whose next token has no place yet, and how many tokens each of them has; None where
        that is not known from the last step. For who gives them frames: `grown`."""
        if self._runtime.window is not None or not self._same(reqs):
            return None
        if self._steps > 0:
            return [], []
        self._full = _where(self._lengths >= self._ends)
        return [self._records[n] for n in self._full], [int(self._lengths[n]) for n in self._full]

    def grown(self, before: int) -> None:
        """The requests that `full` told got frames behind those that they had, and nothing else was changed since
        `Runtime.changes` was `before`, when it told them."""
        if self._changes == before == self._runtime.changes - 1:
            self._changes = self._runtime.changes
            for n in self._full:
                self._ends[n] = self._room_of(self._records[n])
            self._steps = int((self._ends - self._lengths).min())

    def _room_of(self, record: RequestFrames) -> int:
        return len(record.frames) * self._runtime.page_tokens

    def next(self, reqs: Sequence[Req], lengths: torch.Tensor) -> torch.Tensor | None:
        """The slot of the next token of each of these requests, which have so many tokens; None where that is not known
        from the last step."""
        if self._runtime.window is not None or not self._same(reqs) or self._steps <= 0:
            return None
        if not torch.equal(lengths, self._lengths):
            return None
        if self._inside <= 0:
            self._turn_pages()
        self._steps -= 1
        self._inside -= 1
        self._lengths += 1
        return self._ahead + lengths

    def _turn_pages(self) -> None:
        """For the next tokens that are the first ones of their pages."""
        tokens = self._runtime.page_tokens
        for n in _where(self._last < self._lengths):
            page = int(self._lengths[n]) // tokens
            self._last[n] += tokens
            self._ahead[n] = (self._records[n].frames[page] - page) * tokens
        self._inside = int((self._last - self._lengths).min()) + 1

    def look(self, reqs: Sequence[Req], records: Sequence[RequestFrames], lengths: torch.Tensor) -> torch.Tensor:
        """The same of requests with these records, which have a place for it; the next steps are known from here on."""
        tokens = self._runtime.page_tokens
        pages = lengths // tokens
        frames = [record.frames[page] for record, page in zip(records, pages.tolist(), strict=True)]
        self._reqs, self._slots = list(reqs), [self._runtime.sglang.slot(req) for req in reqs]
        self._records, self._changes = records, self._runtime.changes
        self._ends = torch.tensor([self._room_of(record) for record in records], dtype=torch.int64)
        self._last = (pages + 1) * tokens - 1
        self._ahead = (torch.tensor(frames, dtype=torch.int64) - pages) * tokens
        self._lengths = lengths + 1  # its own: SGLang counts on in place
        self._steps = int((self._ends - self._lengths).min())
        self._inside = int((self._last - self._lengths).min()) + 1
        return self._ahead + lengths

    def forget(self) -> None:
        """No request runs: none of the last step is held on to."""
        self._reqs, self._slots, self._records, self._changes = [], [], (), -1

    def slots(self, reqs: Sequence[Req]) -> list[int]:
        """The rows of these requests in SGLang's table of slots."""
        return self._slots if self._same(reqs) else [self._runtime.sglang.slot(req) for req in reqs]


def _where(those: torch.Tensor) -> list[int]:
    return torch.nonzero(those).flatten().tolist()
