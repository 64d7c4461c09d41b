"""SGLang's slot allocator, by page. What it hands out to requests goes through `allocation`, which knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator

from sglang_vtensor.handout import Ask
from sglang_vtensor.srt.runtime import slots_of

if TYPE_CHECKING:
    from sglang_vtensor.srt.kv_pool import VTensorKVPool


class VTensorAllocator(BaseTokenToKVPoolAllocator):
    """Sizes in tokens, as SGLang counts; whole pages beneath. Slots are int64 tensors on the pool's device."""

    def __init__(self, size: int, kvcache: VTensorKVPool) -> None:
        # The base constructor would set the free lists that are derived here.
        self.size = size
        self.page_size = kvcache.page_size
        self.dtype = kvcache.dtype
        self.device = kvcache.device
        self.need_sort = False
        self._kvcache = kvcache
        self.runtime = kvcache.runtime

    @property
    def free_pages(self) -> torch.Tensor | None:
        """Frames that have memory and no owner, for SGLang's own invariant checks; those without are far too many. None
        for the watchdog of a server that hangs in a call of the driver: SGLang counts none then."""
        frames = self.runtime.memory.frames_left()
        return None if frames is None else torch.tensor(frames, dtype=torch.int64, device=self.device)

    @property
    def release_pages(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.device)

    def available_size(self) -> int:
        return self.runtime.memory.available_pages() * self.page_size

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """`need_size` slots of fresh frames, for a caller that is no request; None if there is no room."""
        placed = self.runtime.memory.allocate([Ask(None, -(-need_size // self.page_size))])
        if placed is None:
            return None
        return slots_of(placed[0], self.page_size)[:need_size].to(self.device)

    def free(self, free_index: torch.Tensor) -> None:
        """Free the frames of these slots. Reads the slots back from the device; requests and nodes, which know their
        frames, are freed without it."""
        if free_index.numel():
            self.runtime.memory.free(torch.unique(free_index // self.page_size).tolist())

    def free_group_begin(self) -> None:
        """Frames are freed by list, which is cheap one by one: there is nothing to group."""

    def free_group_end(self) -> None:
        pass

    def clear(self) -> None:
        self.runtime.clear()

    def resize(self, config: object) -> NoReturn:
        raise NotImplementedError("the pool's size is fixed at start; its memory is not")
