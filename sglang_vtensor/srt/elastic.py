"""How much memory a server may hold, changed while it serves: a limit, sleep, and cached prefixes that grow old.

SGLang's sums stay as they are: the pool keeps its size, and what is not to be had is counted as spent when requests are
admitted (`Runtime.missing_tokens`). Requests that run come to their end whatever the limit; what is cached is evicted.

    awake --sleep--> drowsy: what runs comes to its end, what arrives waits --nothing runs--> asleep --wake--> awake
"""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime

logger = logging.getLogger(__name__)

#: `POST /set_internal_state` with one of these, a number each: bytes, or anything.
LIMIT, SLEEP, WAKE = "vtensor_limit_bytes", "vtensor_sleep", "vtensor_wake"
#: Prefixes that grow old are looked for so often.
EXPIRE_EVERY_SECONDS = 1.0


class Elastic:
    """A scheduler's allowance. Everything here runs on the scheduling thread, between two batches.

    `cache_idle_seconds`: cached prefixes that nobody read for so long are given up; None: they stay until evicted.
    """

    def __init__(self, runtime: Runtime, tree: Any, cache_idle_seconds: float | None) -> None:
        self.runtime = runtime
        self.tree = tree
        self.cache_idle_seconds = cache_idle_seconds
        self.limit = runtime.memory.pages.limit
        self.sleeping = False
        self._expire_at = 0.0
        runtime.elastic_stats = self.stats

    # What is asked of it.

    def control(self, asked: dict[str, float]) -> bool:
        """Do what `asked` says. False, and a line in the log, if it cannot be."""
        for key, value in asked.items():
            if key == LIMIT:
                pages = self.pages_of(int(value))
                if not 1 <= pages <= self.runtime.memory.pages.limit:
                    logger.warning(
                        "a limit of %d bytes is %d pages: between 1 and %d wanted",
                        value,
                        pages,
                        self.runtime.memory.pages.limit,
                    )
                    return False
                self.limit = pages
            elif key == SLEEP:
                self.sleeping = True
            elif key == WAKE:
                self.sleeping = False
            else:
                logger.warning("%s is unknown: %s, %s or %s", key, LIMIT, SLEEP, WAKE)
                return False
        self.apply()
        return True

    def pages_of(self, nbytes: int) -> int:
        """Pages that `nbytes` bytes have room for, beside the padding page, which is always there."""
        return nbytes // self.runtime.memory.layout.page_bytes - 1

    def apply(self) -> None:
        """Set the memory's allowance, and evict what is beyond it."""
        memory = self.runtime.memory
        allowance = 0 if self.sleeping else self.limit
        if allowance != memory.allowance:
            memory.allow(allowance)
        self._evict_excess()

    def _limited(self) -> bool:
        return self.runtime.memory.allowance < self.runtime.memory.pages.limit

    def _evict_excess(self) -> None:
        excess = self.runtime.memory.excess() if self._limited() else 0
        if excess and self.tree.evictable_size():
            self.tree.evict(EvictParams(num_tokens=excess * self.runtime.page_tokens))

    # Between two batches.

    def tick(self) -> None:
        """What a request left in the tree as it ended may be beyond the limit; and what is cached grows old."""
        self._evict_excess()
        if self.cache_idle_seconds is None:
            return
        now = time.monotonic()
        if now >= self._expire_at:
            self._expire_at = now + min(EXPIRE_EVERY_SECONDS, self.cache_idle_seconds / 2)
            self.tree.expire(now - self.cache_idle_seconds)

    def refuse_too_long(self, waiting: list[Req], send: Any) -> None:
        """Take requests from the queue that the limit has no room for even alone, and answer them with the reason."""
        memory = self.runtime.memory
        if self.sleeping or not self._limited():
            return
        for req in [req for req in waiting if self._wants(req) > self.limit]:
            waiting.remove(req)
            message = (
                f"this request needs {self._wants(req)} pages of KV cache, and the server is limited to {self.limit} "
                f"({(self.limit + 1) * memory.layout.page_bytes} bytes): raise the limit, or shorten the prompt"
            )
            reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
            send(AbortReq(finished_reason=reason, rid=req.rid), req)
            req.time_stats.trace_ctx.abort(abort_info=reason)

    def _wants(self, req: Req) -> int:
        pages: int = self.runtime.memory.layout.pages_for(len(req.origin_input_ids) + len(req.output_ids) + 1)
        return pages

    def stats(self) -> dict[str, int]:
        page = self.runtime.memory.layout.page_bytes
        return {"limit_bytes": (self.limit + 1) * page, "sleeping": int(self.sleeping)}
