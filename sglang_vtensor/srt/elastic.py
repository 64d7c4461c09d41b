"""How much memory a server may hold, changed while it serves: a limit, sleep, neighbours, and prefixes that grow old.

SGLang's sums stay as they are: the pool keeps its size, and what is not to be had is counted as spent when requests are
admitted (`Runtime.missing_tokens`). Requests that run come to their end whatever the limit, those that were retracted
meanwhile too; what is cached is evicted.

    awake --sleep--> drowsy: what runs comes to its end, what arrives waits --nothing runs--> asleep --wake--> awake

SGLang's release of memory is the same for a server that runs nothing (`occupation`); only a resume ends that.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import is_health_check_generate_req

from sglang_vtensor.neighbours import Neighbours, NoNeighbours, Record, allowed
from sglang_vtensor.worker import RETRY_SECONDS as WORKER_RETRY_SECONDS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime

logger = logging.getLogger(__name__)

#: `POST /set_internal_state` with one of these: bytes as an integer, or anything.
LIMIT, SLEEP, WAKE = "vtensor_limit_bytes", "vtensor_sleep", "vtensor_wake"
#: Beside them, this makes the next answer to `GET /server_info` hold the map of the memory (`memory_map`).
MAP = "vtensor_map"
#: Prefixes that grow old are looked for so often.
EXPIRE_EVERY_SECONDS = 1.0
#: Neighbours are looked at so often, and what they wanted is left to them for so long after they want nothing more.
LOOK_EVERY_SECONDS, CALM_SECONDS = 0.05, 1.0
#: Beside neighbours the driver is asked again sooner.
RETRY_SECONDS = 0.1
#: So many waiting requests are what a server wants memory for.
WANTED_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests that memory is for: see `Elastic.tick`."""

    waiting: Sequence[Req]
    running: Sequence[Req] = ()
    new_token_ratio: float = 0.0
    #: Whose prompt is computed in part.
    chunked: Req | None = None


class Elastic:
    """A scheduler's allowance. Everything here runs on the scheduling thread, between two batches.

    `cache_idle_seconds`: cached prefixes that nobody read for so long are given up; None: they stay until evicted.
    `minimum_bytes`: what is kept, cached or idle, whatever the neighbours want.
    """

    def __init__(self, runtime: Runtime, tree: Any, *, cache_idle_seconds: float | None, minimum_bytes: int) -> None:
        self.runtime = runtime
        self.tree = tree
        self.cache_idle_seconds = cache_idle_seconds
        self.minimum_bytes = minimum_bytes
        #: In pages of each side, whose bytes the sides share.
        self.limit = runtime.memory.capacity
        self.sleeping = False
        #: Tags whose memory was released (`occupation`). While there are any, nothing runs.
        self.released: frozenset[str] = frozenset()
        #: A release that waits for the last batch, and why the last release or resume was refused.
        self.release_when_idle: Callable[[], None] | None = None
        self.refusal: str | None = None
        #: Whether who is refused is told so.
        self.tells_refusals = True
        #: Pages that the neighbours leave this server, while they want something.
        self.pressure: int | None = None
        self.neighbours = self._neighbours()
        #: Whether another server is on this device.
        self.beside_others = False
        self._emptied = False
        #: Since when nothing runs and a request waits, as the neighbours are told; 0: that is not so.
        self._alone_since = 0
        self._left_headroom = 0
        #: Tokens of the pool's size that were not to be had when requests were last looked at.
        self._missing = 0
        self._expire_at = self._look_at = self._calm_at = 0.0
        if self.neighbours is None:
            self._look_at = math.inf
        if cache_idle_seconds is None:
            self._expire_at = math.inf
        runtime.elastic_stats = self.stats

    def _neighbours(self) -> Neighbours | None:
        memory = self.runtime.memory
        if memory.vmm.identity is None:
            return None
        if self.runtime.several_ranks:
            logger.info("memory is not shared with other servers of a GPU: ranks would need to give it up alike")
            return None
        try:
            neighbours = Neighbours(memory.vmm.identity)
        except NoNeighbours as error:
            logger.warning("memory is not shared with other servers of this device: %s", error)
            return None
        atexit.register(neighbours.close)
        return neighbours

    # What is asked of it.

    def control(self, asked: dict[str, Any]) -> bool:
        """Do all that `asked` says. If some of it cannot be, nothing of it is done: False, and a line in the log."""
        limit, sleeping, most = self.limit, self.sleeping, self.runtime.memory.capacity
        for key, value in asked.items():
            if key == LIMIT:
                if not isinstance(value, int) or isinstance(value, bool):
                    logger.warning("a limit of %r: bytes wanted, as an integer", value)
                    return False
                limit = self.pages_of(value)
                if not 1 <= limit <= most:
                    logger.warning("a limit of %d bytes is %d pages: between 1 and %d wanted", value, limit, most)
                    return False
            elif key in (SLEEP, WAKE):
                if self.released:
                    logger.warning("memory was released: only POST /resume_memory_occupation ends that")
                    return False
                sleeping = key == SLEEP
            else:
                logger.warning("%s is unknown: %s, %s or %s", key, LIMIT, SLEEP, WAKE)
                return False
        self.limit, self.sleeping = limit, sleeping
        with self.runtime.memory.clock:
            self.apply()
        return True

    def pages_of(self, nbytes: int) -> int:
        """Pages of each side that `nbytes` bytes have room for, beside the padding pages, which are always there."""
        memory = self.runtime.memory
        return (nbytes - memory.padding_bytes) // memory.page_bytes

    @property
    def holding(self) -> bool:
        """Whether what arrives waits."""
        return self.sleeping or bool(self.released)

    def apply(self) -> None:
        """Set the memory's allowance, and evict what is beyond it."""
        memory = self.runtime.memory
        empty = self.sleeping or GPU_MEMORY_TYPE_KV_CACHE in self.released
        allowance = 0 if empty else self.limit if self.pressure is None else min(self.limit, self.pressure)
        if allowance != memory.allowance:
            memory.allow(allowance)
        self._evict_excess()

    def _evict_excess(self) -> None:
        memory = self.runtime.memory
        excess = memory.excess() if memory.allowance < memory.capacity else 0
        if excess:
            self.tree.reclaim(excess)

    def release(self, released: frozenset[str]) -> None:
        """The memory of these tags is out, and what arrives waits. If the KV cache is among them, nothing of it is
        cached: all of its memory is given back before this returns, but for the padding page."""
        memory = self.runtime.memory
        self.released = released
        if GPU_MEMORY_TYPE_KV_CACHE not in released:
            return
        with memory.clock:
            self.apply()
        self.runtime.idle()
        if not memory.give_all_back():
            logger.warning(
                "the driver did not take all pages back: %d hold memory yet, and the worker goes on with them",
                memory.backed - 1,
            )
        if memory.vmm.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self, released: frozenset[str]) -> None:
        """Only these are out from now on. Pages are created as requests need them: if the device has none, the requests
        wait, and the log says so."""
        self.released = released
        with self.runtime.memory.clock:
            self.apply()

    # Between two batches.

    def tick(self, demand: Demand) -> None:
        """What a request left in the tree as it ended may be beyond the limit; what is cached grows old; and neighbours
        want something, or nothing more. Most calls, of thousands a second, find nothing to do.

        Of the answers that the running requests may give, SGLang keeps the share `new_token_ratio` free before it
        admits others.
        """
        memory, now = self.runtime.memory, time.monotonic()
        if now >= self._look_at or now >= self._expire_at or memory.allowance < memory.capacity or self.holding:
            with memory.clock:
                self._tick(demand, now)
        else:
            self._emptied = False

    def _tick(self, demand: Demand, now: float) -> None:
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_SECONDS
            self._look_around(demand, now)
        self._evict_excess()
        if self.runtime.memory.owes():
            self.runtime.memory.give_way()
        if self.cache_idle_seconds is not None and now >= self._expire_at:
            self._expire_at = now + min(EXPIRE_EVERY_SECONDS, self.cache_idle_seconds / 2)
            self.tree.expire(now - self.cache_idle_seconds)
        if not self.holding:
            self._emptied = False
        elif not self._emptied and not self.runtime.requests:
            self._emptied = True
            if self.runtime.memory.vmm.device.type == "cuda":
                torch.cuda.empty_cache()  # activations of the largest batch there was

    def _look_around(self, demand: Demand, now: float) -> None:
        """Tell the neighbours, hear them, and hold what they leave."""
        assert self.neighbours is not None
        memory = self.runtime.memory
        others = self.neighbours.others()
        mine = self.record(demand)
        self.neighbours.tell(mine)
        self._leave_headroom_to(others)
        if bool(others) != self.beside_others:
            self.beside_others = bool(others)
            memory.worker.retry_seconds = RETRY_SECONDS if others else WORKER_RETRY_SECONDS
        free = 0
        if any(other.wanted for other in others):
            free = max(0, memory.vmm.memory()[0] - memory.vmm.kept_free)
        holds = allowed(mine, others, free)
        if holds is not None:
            self._calm_at = now + CALM_SECONDS
            pressure = max(0, self.pages_of(holds))
        elif now < self._calm_at:
            return
        else:
            pressure = None
        if pressure != self.pressure:
            self.pressure = pressure
            self.apply()

    def _leave_headroom_to(self, others: Sequence[Record]) -> None:
        """Each server on a device has the headroom that it asks for, unless all together ask for more than half."""
        wanted = sum(other.headroom for other in others)
        if wanted != self._left_headroom:
            self._left_headroom, vmm = wanted, self.runtime.memory.vmm
            vmm.others_headroom_bytes = max(0, min(wanted, vmm.memory()[1] // 2 - vmm.headroom_bytes))

    def record(self, demand: Demand) -> Record:
        """What the neighbours are told."""
        memory = self.runtime.memory
        evictable = self.runtime.cached_bytes(self.tree.evictable_size())
        kept = len(memory.tails) * memory.page_bytes
        wanted = alone = 0
        if not self.holding and (memory.short or self.pressure is not None):
            # What the requests that run and those at the head of the queue will take, beyond what it holds for them.
            there = memory.budget.free + kept + evictable
            most = self.limit * memory.page_bytes
            wanted = min(max(0, self._demanded(demand) - there), max(0, most - memory.needed_bytes))
            next_one = self._next_alone(demand)
            if next_one is not None:
                # It may be admitted beyond the limit (`bars`).
                alone = self._demanded(Demand([next_one])) + memory.padding_bytes
                wanted = max(wanted, alone - memory.backed_bytes)
        if not alone:
            self._alone_since = 0
        elif not self._alone_since:
            self._alone_since = time.monotonic_ns() // 1000
        return Record(
            backed=memory.backed_bytes,
            idle=memory.budget.free,
            cached=evictable + kept,
            minimum=self.minimum_bytes,
            wanted=wanted,
            alone=alone,
            since=self._alone_since,
            headroom=memory.vmm.headroom_bytes,
        )

    @staticmethod
    def _next_alone(demand: Demand) -> Req | None:
        """The request that is to run next, if nothing runs: whose prompt is computed in part, or the first one."""
        if demand.running:
            return None
        return demand.chunked or next(iter(demand.waiting), None)

    def offers(self, waiting: list[Req], *, busy: bool) -> tuple[list[Req], bool]:
        """The waiting requests that may be admitted now, and whether they may have memory beyond the limit.

        A request that was retracted comes to its end whatever the limit is. While others run (`busy`), it waits for
        them within the limit. When none runs, it is admitted before the requests that have not begun.
        """
        memory = self.runtime.memory
        if self.released:  # also who was retracted, as the engine was paused
            return [], False
        if memory.allowance == memory.capacity:
            return waiting, False
        begun = [] if busy else [req for req in waiting if req.is_retracted]
        if begun or self.sleeping:
            return begun, True
        return waiting, False

    def has_more_room(self) -> bool:
        """Whether memory has come since this was last asked: SGLang is then to look again at requests that it found no
        room for, which it does otherwise only when one that runs has ended."""
        before, self._missing = self._missing, self.runtime.missing_tokens()
        return self._missing < before

    def bars(self, waiting: list[Req], *, busy: bool) -> bool:
        """Whether the limit keeps the first waiting request out. To be asked when no request was admitted although
        nothing runs: SGLang counts the longest answer that a request may give, and the limit has no room for that. The
        request is then to be admitted alone, and may grow beyond the limit."""
        limited = self.limit < self.runtime.memory.capacity
        left = self.pressure is None or self.pressure >= self.limit  # by its neighbours
        return bool(waiting) and not busy and limited and left and not self.holding

    @contextlib.contextmanager
    def beyond_the_limit(self, really: bool) -> Iterator[None]:
        """Within this, requests are admitted as if there were no limit, if `really`."""
        memory = self.runtime.memory
        allowance = memory.allowance
        if really:
            memory.allowance = memory.capacity
        try:
            yield
        finally:
            memory.allowance = allowance

    def refuse_too_long(self, waiting: list[Req], send: Any) -> None:
        """Take requests from the queue that the limit has no room for even alone, and answer them with the reason."""
        memory = self.runtime.memory
        if self.holding or self.limit == memory.capacity:
            return
        page = memory.page_bytes
        with memory.clock:
            too_long = [req for req in waiting if not req.is_retracted and self._wants(req) > self.limit * page]
        for req in too_long:
            message = (
                f"this request needs {-(-self._wants(req) // page)} pages of KV cache, and the server is limited to "
                f"{self.limit} ({(self.limit + 1) * page} bytes): raise the limit, or shorten the prompt"
            )
            self._refuse(
                req, waiting, {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}, send
            )

    def answer_failed(self, waiting: list[Req], send: Any) -> None:
        """Take requests from the queue of a sleeping server that are not to be computed (their grammar is none, or they
        were aborted while it was compiled): SGLang answers them in the batch that they would begin in."""
        for req in [req for req in waiting if isinstance(req.to_finish, FINISH_ABORT) and not req.is_retracted]:
            self._refuse(req, waiting, req.to_finish.to_json(), send)

    @staticmethod
    def _refuse(req: Req, waiting: list[Req], reason: dict[str, Any], send: Any) -> None:
        waiting.remove(req)
        send(AbortReq(finished_reason=reason, rid=req.rid), req)
        req.time_stats.trace_ctx.abort(abort_info=reason)

    def asleep(self, waiting: Sequence[Req]) -> bool:
        """Whether the server sleeps and has nothing left to bring to its end: who waits, waits until it is woken."""
        drowsy = bool(self.runtime.requests) or any(req.is_retracted for req in waiting)
        return bool(self.released) or (self.sleeping and not drowsy)

    @staticmethod
    def take_health_checks(waiting: list[Req]) -> list[str | None]:
        """Take health checks from the queue of a sleeping server, where they would wait. Returns the HTTP workers that
        sent them, and are to be answered."""
        checks = [req for req in waiting if is_health_check_generate_req(req)]
        for check in checks:
            waiting.remove(check)
        return [check.http_worker_ipc for check in checks]

    def _demanded(self, demand: Demand) -> int:
        """Bytes that must be free for SGLang to admit what waits at the head of the queue, if anything does: it keeps
        room also for the answers, for what runs as it estimates them, and for what is to begin whole, with a page."""
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        heads = demand.waiting[:WANTED_REQUESTS]
        if not heads:
            return 0

        def answer(req: Req) -> int:
            return max(0, min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS))

        tokens = float(sum(map(answer, heads)))
        for req in demand.running if demand.chunked is None else [*demand.running, demand.chunked]:
            if req.finished():  # there until SGLang decodes again, in some versions
                continue
            tokens += answer(req) * (1.0 if req.sampling_params.ignore_eos else demand.new_token_ratio)
            # What chunks of its prompt are yet to come.
            tokens += len(req.origin_input_ids) + len(req.output_ids) - self.runtime.sglang.allocated(req)
        layout = self.runtime.memory.layout
        return sum(map(self._wants, heads)) + (len(heads) + layout.pages_for(int(tokens))) * layout.page_bytes

    def _wants(self, req: Req) -> int:
        """Bytes that a request needs to begin or to go on."""
        return self.runtime.bytes_for(len(req.origin_input_ids) + len(req.output_ids) + 1)

    def stats(self) -> dict[str, int]:
        memory = self.runtime.memory
        page = memory.page_bytes
        return {
            "limit_bytes": self.limit * page + memory.padding_bytes,
            "sleeping": int(self.holding),
            "neighbours": len(self.neighbours.others()) if self.neighbours else 0,
            "left_by_neighbours_bytes": 0 if self.pressure is None else (self.pressure + 1) * page,
        }
