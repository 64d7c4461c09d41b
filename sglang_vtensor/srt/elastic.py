"""How much memory a server may hold, changed while it serves: a limit, sleep, neighbours, and prefixes that grow old.

SGLang's sums stay as they are: the pool keeps its size, and what is not to be had is counted as spent when requests are
admitted (`Runtime.lacking_bytes`). Requests that run come to their end whatever the limit, those that were retracted
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
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import is_health_check_generate_req

from sglang_vtensor.neighbours import Neighbours, NoNeighbours, Record, allowed
from sglang_vtensor.srt.demand import Demand, Patience, Turn, bytes_to_go_on, demanded
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
        #: Who waits found no memory together, on one of the ranks, and none runs whose end would make room.
        self.one_at_a_time = False
        self._emptied = False
        self._turn = Turn()
        self._left_headroom = 0
        self._expire_at = self._look_at = self._calm_at = self._more_at = 0.0
        #: Whether who was retracted waits for memory that is to come, and when that is counted again.
        self._awaits_memory = False
        self._count_at = 0.0
        self.patience = Patience()
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
        holds = allowed(mine, others, memory.vmm.left() if any(other.wanted for other in others) else 0)
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

    def _cached(self) -> int:
        """Bytes that are given up where memory is short."""
        memory = self.runtime.memory
        return self.runtime.cached_bytes(self.tree.evictable_size()) + len(memory.tails) * memory.page_bytes

    def record(self, demand: Demand) -> Record:
        """What the neighbours are told."""
        memory = self.runtime.memory
        with memory.held_still():  # a page that the worker lets go of between the two would be in one of them only
            backed, free, cached = memory.backed_bytes, memory.budget.free, self._cached()
        wanted = alone = 0
        if self.sleeping:  # it brings to its end what it has begun
            demand = replace(demand, waiting=[req for req in demand.waiting if req.is_retracted])
        if (memory.short or self.pressure is not None or self._awaits_memory) and not self.asleep(demand.waiting):
            # What the requests that run and those at the head of the queue will take, beyond what it holds for them.
            there = free + cached
            most = self.limit * memory.page_bytes
            wanted = min(max(0, demanded(self.runtime, demand) - there), max(0, most - memory.needed_bytes))
            first = self._turn.take(demand)
            if first is not None:
                # It may be admitted beyond the limit (`bars`).
                alone = demanded(self.runtime, Demand([first])) + memory.padding_bytes
                wanted = max(wanted, alone - backed)
        else:
            self._turn.end()
        live = backed - free - cached if demand.paused else 0
        return Record(
            backed=backed,
            idle=free,
            cached=cached,
            minimum=max(self.minimum_bytes, live),
            wanted=wanted,
            alone=alone,
            since=self._turn.since if alone else 0,
            headroom=memory.vmm.headroom_bytes,
        )

    def offers(self, waiting: list[Req], *, busy: bool) -> tuple[list[Req], bool]:
        """The waiting requests that may be admitted now, and whether they may have memory beyond the limit.

        A request that was retracted comes to its end whatever the limit is. While others run (`busy`), it waits for
        them within the limit. When none runs, it is admitted before the requests that have not begun; all wait with it
        while its memory is to come.
        """
        memory = self.runtime.memory
        if self.released:  # also who was retracted waits, as the engine was paused
            self._awaits_memory = False
            return [], False
        begun = [] if busy else [req for req in waiting if req.is_retracted]
        less = memory.allowance < memory.capacity
        if not self.runtime.several_ranks:  # each would see the memory of another device
            self.patience.look(begun, stuck=bool(waiting) and not busy, short=memory.short)
            comes_next = bool(begun) and (less or begun[0] is waiting[0])
            self._awaits_memory = comes_next and not self.patience.is_over and self._memory_is_to_come(begun[0])
        if self._awaits_memory:
            return [], False
        if less and (begun or self.sleeping):
            return begun, True
        return waiting, False

    def _memory_is_to_come(self, req: Req) -> bool:
        """Whether `req`, which was retracted, waits although nothing runs, as there is no memory yet for all that
        SGLang keeps room for. To go on with memory that others are yet to give would be to be retracted for each page
        that they give, and each time its context is computed anew."""
        now, memory = time.monotonic(), self.runtime.memory
        if not (self._awaits_memory or self.beside_others or memory.short):
            return False
        if self._awaits_memory and now < self._count_at:
            return True
        self._count_at = now + LOOK_EVERY_SECONDS
        with memory.clock:
            there = memory.vmm.left() + memory.budget.free + self._cached()
            if self.pressure is not None:  # what is free may be another one's turn
                there = min(there, (self.pressure + 1) * memory.page_bytes)
            return there < min(demanded(self.runtime, Demand([req])), memory.budget.nbytes)

    def has_more_room(self) -> bool:
        """Whether memory has come since admission last counted: SGLang is then to look again at requests that it found
        no room for, which it does otherwise only when one that runs has ended."""
        runtime, now = self.runtime, time.monotonic()
        if not runtime.several_ranks:  # which have no clock in common, and count nothing that changes by itself
            if now < self._more_at:  # what batches in flight read changes with each of them
                return False
            self._more_at = now + LOOK_EVERY_SECONDS
            runtime.poll()
        before, runtime.lacked = runtime.lacked, 0
        return runtime.lacking_bytes() < before

    def bars(self, waiting: list[Req], *, busy: bool) -> bool:
        """Whether the limit keeps the first waiting request out. To be asked when no request was admitted although
        nothing runs: SGLang counts the longest answer that a request may give, and the limit has no room for that. The
        request is then to be admitted alone, and may grow beyond the limit."""
        limited = self.limit < self.runtime.memory.capacity
        left = self.pressure is None or self.pressure >= self.limit  # by its neighbours
        return bool(waiting) and not busy and limited and left and not self.holding and not self._awaits_memory

    @contextlib.contextmanager
    def beyond_the_limit(self, really: bool) -> Iterator[None]:
        """Within this, requests are admitted as if there were no limit, if `really`. They ask the driver themselves: it
        may have refused, and beyond the limit the worker does not look whether it gives again. So do requests that are
        tried with what there is."""
        memory = self.runtime.memory
        memory.beyond, memory.asks = really, self.patience.tries or (really and memory.supply.asks_again)
        try:
            yield
        finally:
            memory.beyond = memory.asks = False

    def refuse_too_long(self, waiting: list[Req], send: Any) -> None:
        """Take requests from the queue that the limit has no room for even alone, and answer them with the reason."""
        memory = self.runtime.memory
        if self.holding or self.limit == memory.capacity:
            return
        page = memory.page_bytes
        with memory.clock:
            needed = {req: bytes_to_go_on(self.runtime, req) for req in waiting if not req.is_retracted}
        for req, nbytes in needed.items():
            if nbytes <= self.limit * page:
                continue
            message = (
                f"this request needs {memory.in_pages(nbytes)} pages of KV cache, and the server is limited to "
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

    def stats(self) -> dict[str, int]:
        memory = self.runtime.memory
        page = memory.page_bytes
        return {
            "limit_bytes": self.limit * page + memory.padding_bytes,
            "sleeping": int(self.holding),
            "neighbours": len(self.neighbours.others()) if self.neighbours else 0,
            "left_by_neighbours_bytes": 0 if self.pressure is None else (self.pressure + 1) * page,
        }
