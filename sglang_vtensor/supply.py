"""Pages for what is to be used, and what follows when the driver refuses some."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from sglang_vtensor.backing import Backing, Claim
from sglang_vtensor.room import Room
from sglang_vtensor.vmm import VMMError
from sglang_vtensor.worker import WARN_SECONDS, Worker

logger = logging.getLogger(__name__)


class Supply:
    """Of the stores of a memory, under its lock. After a refusal the driver is left alone for a while."""

    def __init__(self, room: Room, worker: Worker) -> None:
        self._room, self._worker = room, worker
        #: How often the driver began to refuse.
        self.shortages = 0
        self._retry_at = self._warn_at = 0.0

    @property
    def asks_again(self) -> bool:
        """Whether the driver may be asked, if it refused."""
        return time.monotonic() >= self._retry_at

    def take(self, stores: Sequence[Backing], frames: Sequence[int]) -> bool:
        """Memory for frames (or slots), in all of these stores or in none."""
        claims = [backing.claim(frames) for backing in stores]
        # While the driver is left alone, there is what free pages have.
        wanted = sum(len(claim.missing) * b.page_bytes for claim, b in zip(claims, stores, strict=True))
        there = self._room.budget.free if len(self._room.stores) > 1 else 0
        done = self.asks_again or not self._room.short or wanted <= there
        for claim, backing in zip(claims, stores, strict=True):
            done = done and self.fill(backing, claim)
        if not done:
            for claim, backing in zip(claims, stores, strict=True):
                backing.unclaim(claim)
        return done

    def fill(self, backing: Backing, claim: Claim) -> bool:
        """Pages for what a claim lacks. Whether there are all of them: if not, whoever asked gives the claim up."""
        was = backing.refusal
        done = backing.fill(claim)
        if backing.refusal is not was:
            self.answered(backing, was)
        return done

    def answered(self, backing: Backing, was: VMMError | None) -> None:
        """The driver refused, or gave again after it had: say so once, and when to ask again."""
        now = time.monotonic()
        if backing.refusal is not None:
            self._retry_at = now + self._worker.retry_seconds
            self.shortages += was is None
            if was is None and now >= self._warn_at:
                self._warn_at = now + WARN_SECONDS
                logger.warning(
                    "the device gives no more memory: %s. The KV cache stays at %d of %d pages, requests wait or are "
                    "retracted, and it asks again every %g s: free what else holds memory there, or lower "
                    "--mem-fraction-static",
                    backing.refusal,
                    self._room.backed,
                    self._room.limit + 1,
                    self._worker.retry_seconds,
                )
        elif was is not None:
            logger.debug("the device gives memory again: %d pages are backed", self._room.backed)
