"""What a turn costs the scheduling thread in the tree and the pools, beside SGLang's own, without a GPU or a model.

A turn of a random conversation: match its text, lock, take pages (and a segment, for ours), and, when it is over,
insert it, park, unlock. Mapping itself is left out: the virtual memory here does nothing, as the driver's part is
measured on a GPU. What the mapping worker does is not the scheduling thread's, and not timed.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from array import array
from types import SimpleNamespace
from typing import Any

import torch

from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
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
    """The tree and the memory of `--kv-backend vtensor`."""

    def __init__(self, capacity: int, running: int, longest: int) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        from sglang_vtensor.srt.allocator import VTensorAllocator
        from sglang_vtensor.srt.radix_cache import VTensorRadixCache
        from sglang_vtensor.srt.runtime import Runtime

        layout = KVLayout(1, 1, 64, torch.float16, PAGE, stride_bytes=256, granularity=4096)
        self.memory = KVMemory(
            NoMemory(), layout, capacity_pages=capacity, max_tokens=longest, max_running=running, worker=False
        )
        self.runtime = Runtime(self.memory, running + 1)
        pool: Any = SimpleNamespace(page_size=PAGE, dtype=torch.float16, device="cpu", runtime=self.runtime)
        self.rows = ReqToTokenPool(running, longest, "cpu", False)
        self.tree = VTensorRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=VTensorAllocator(capacity * PAGE, pool),
                page_size=PAGE,
            )
        )

    def take(self, req: SimpleNamespace, matched: int, end: int) -> torch.Tensor:
        """Pages and a segment; the slots of the new tokens."""
        from sglang_vtensor.srt.runtime import RequestPages

        whole = matched // PAGE
        pages = self.tree.path_pages(req.last_node)
        record = self.runtime.requests[req.req_pool_idx] = RequestPages(pages, whole)
        partial = req.vtensor_partial
        if partial is not None and partial.tail is not None:
            page = self.memory.claim(partial.tail)
            assert page is not None
            record.pages.append(page)
        new = self.memory.allocate(self.memory.layout.pages_for(end) - len(record.pages))
        record.pages.extend(new or [])
        self.runtime.map_request(req.req_pool_idx, shared=whole, adopt=self.tree.segment_for(req))
        first = torch.tensor(record.pages[whole:], dtype=torch.int64) * PAGE
        slots = (first[:, None] + torch.arange(PAGE)).view(-1)
        return slots[matched - whole * PAGE : end - whole * PAGE]

    def behind(self) -> None:
        """What the worker does meanwhile."""
        self.memory.complete(self.memory.launch())
        while self.memory.housekeep():
            pass


class Theirs:
    """SGLang's radix cache and paged allocator."""

    def __init__(self, capacity: int, running: int, longest: int) -> None:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.rows = ReqToTokenPool(running, longest, "cpu", False)
        pool: Any = SimpleNamespace(page_size=PAGE)
        self.allocator = PagedTokenToKVPoolAllocator(capacity * PAGE, PAGE, torch.float16, "cpu", pool, False)
        self.tree = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
            )
        )

    def take(self, req: SimpleNamespace, matched: int, end: int) -> torch.Tensor:
        slots = self.allocator.alloc(-(-(end - matched) // PAGE) * PAGE)
        assert slots is not None
        return slots[: end - matched]

    def behind(self) -> None:
        pass


def turn(side: Ours | Theirs, tokens: array[int], number: int) -> float:
    """One turn of a conversation whose text is `tokens`. Returns seconds."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    req: Any = SimpleNamespace(
        rid=str(number), origin_input_ids=tokens, output_ids=array("q"), extra_key=None, priority=0, req_pool_idx=1
    )
    start = time.perf_counter()
    found = side.tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens, None, limit=len(tokens) - 1), req=req))
    matched = len(found.device_indices)
    req.last_node = found.last_device_node
    req.cache_protected_len = matched if found.cache_protected_len is None else found.cache_protected_len
    side.tree.inc_lock_ref(req.last_node)
    slots = side.take(req, matched, len(tokens))
    side.rows.req_to_token[1, :matched] = found.device_indices
    side.rows.req_to_token[1, matched : len(tokens)] = slots
    req.kv = SimpleNamespace(kv_allocated_len=len(tokens))
    side.tree.cache_finished_req(req, kv_len_to_handle=len(tokens))
    seconds = time.perf_counter() - start
    side.behind()
    return seconds


def measure(side: type[Ours] | type[Theirs], conversations: int, turns: int = 1500) -> float:
    """Median microseconds of a turn with so many conversations cached."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scheduling thread is one
    os.environ.setdefault("SGLANG_PLATFORM", "vtensor_host")
    rng = random.Random(0)
    longest = 8192
    capacity = conversations * (2 + (OWN + SAID) // PAGE) + 4 * turns + SYSTEM // PAGE + 64
    cache = side(capacity, 256, longest)

    def words(count: int) -> array[int]:
        return array("q", (rng.randrange(100_000) for _ in range(count)))

    system = words(SYSTEM)
    texts = [system + words(OWN) for _ in range(conversations)]
    for number, text in enumerate(texts):
        turn(cache, text, number)
    taken = []
    for number in range(turns):
        at = rng.randrange(conversations)
        text = texts[at] + words(SAID)
        taken.append(turn(cache, text, conversations + number))
        if len(text) + SAID < longest:
            texts[at] = text
    torch.set_num_threads(threads)
    return 1e6 * statistics.median(taken)
