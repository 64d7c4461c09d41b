"""Our tree and pools, for what a turn costs the scheduling thread (`unified`), without a GPU or a model.

The driver's part is left out: the virtual memory here does nothing, as that is measured on a GPU. What the worker does
is not the scheduling thread's, and not timed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.vmm import Handle, VirtualMemory

PAGE, SYSTEM, OWN, SAID = 64, 512, 320, 100


class NoMemory(VirtualMemory):
    """Addresses and handles that count up, with nothing behind them."""

    device = torch.device("cpu")
    granularity = 4096

    def __init__(self) -> None:
        self._next = 1

    def reserve(self, nbytes: int) -> int:
        self._next += 1
        return self._next << 44

    def create(self, nbytes: int) -> Handle:
        self._next += 1
        return Handle(self._next)

    def free(self, address: int, nbytes: int) -> None: ...
    def release(self, handle: Handle) -> None: ...
    def map(self, address: int, nbytes: int, handle: Handle) -> None: ...
    def unmap(self, address: int, nbytes: int) -> None: ...
    def clear(self, address: int, nbytes: int) -> None: ...

    def wait_cleared(self) -> None: ...

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        raise NotImplementedError

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40


class Ours:
    """The tree and the memory of `--kv-backend vtensor`: so many pages of `page` tokens, and requests of up to
    `longest` tokens."""

    def __init__(self, capacity: int, running: int, longest: int, *, page: int = PAGE) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        from sglang_vtensor import patches
        from sglang_vtensor.srt.runtime import Runtime

        self.page, patch = page, patches.load()
        layout = KVLayout(1, 1, 64, torch.float16, page, stride_bytes=256, granularity=4096)
        self.memory = KVMemory(NoMemory(), layout, capacity_pages=capacity, max_tokens=longest, worker=False)
        self.runtime = Runtime(self.memory, running + 1, patch.requests)
        pool: Any = SimpleNamespace(page_size=page, dtype=torch.float16, device="cpu", runtime=self.runtime)
        self.rows = ReqToTokenPool(running, longest, "cpu", False)
        self.tree = patch.tree_class()(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=patch.allocator_class()(capacity * page, pool),
                page_size=page,
            )
        )

    def take(self, req: Any, matched: int, end: int) -> torch.Tensor:
        """Frames, for which the tree gives up what was not read for longest; the slots of all tokens."""
        from sglang_vtensor.srt.runtime import RequestFrames, slots_of

        slot, whole = self.runtime.sglang.slot(req), matched // self.page
        record = self.runtime.requests[slot] = RequestFrames(self.tree.path_frames(req.last_node), whole, whole)
        partial = req.vtensor_partial
        if partial is not None and partial.tail is not None:
            frame = self.memory.tails.claim(partial.tail)
            assert frame is not None
            record.frames.append(frame)
        copied = partial.node if partial is not None else None
        if copied is not None:
            self.tree.inc_lock_ref(copied)
        lacking = self.memory.layout.pages_for(end) - len(record.frames)
        self.evict(lacking - self.memory.room())
        placed = self.memory.allocate([record.ask(lacking)])
        if placed is None:
            self.evict(lacking - self.memory.tails.forget_some(lacking))
            placed = self.memory.allocate([record.ask(lacking)])
        assert placed is not None, "the pool is large enough for one request"
        if copied is not None:
            self.tree.dec_lock_ref(copied)
        record.frames += placed[0]
        return slots_of(record.frames, self.page)[:end]

    def evict(self, pages: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        if pages > 0:
            self.tree.evict(EvictParams(num_tokens=pages * self.page))

    def memory_seconds(self) -> float:
        return self.memory.clock.seconds

    def behind(self) -> None:
        """What the worker does meanwhile."""
        self.memory.complete(self.memory.launch())
        while self.memory.housekeep():
            pass
