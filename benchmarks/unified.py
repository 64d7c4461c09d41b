"""A turn in the tree and the pools, beside the tree that SGLang 0.5.23 has by default: `UnifiedRadixCache`, with its
core in Rust, and with its core in Python.

The turn is that of `benchmarks.turns`, in the life cycle of SGLang 0.5.23: match the text of a conversation, lock, take
slots, write them to the row; and, when the turn is over, insert the text, free what the tree did not take, unlock,
release the row. Contestants hold the same conversations, and each turn is timed on all of them, one after another, who
goes first rotating.
"""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.rounds import rotated
from benchmarks.turns import OWN, PAGE, SAID, SYSTEM, Ours

LONGEST = 8192


class Side(Protocol):
    """A tree and its pools. `tree` has the interface of SGLang 0.5.23's `BasePrefixCache`."""

    tree: Any
    rows: Any

    def take(self, req: Any, matched: int, end: int) -> torch.Tensor:
        """The slots of all tokens; those of `[matched, end)` are the request's own until it is over."""

    def behind(self) -> None:
        """Do what another thread does meanwhile; not timed."""

    def memory_seconds(self) -> float:
        """What placing and backing took of all turns so far, the tree's part left out."""


class Turn(NamedTuple):
    """What a turn took, and how many of its tokens were found."""

    seconds: float
    matched: int


class Stock:
    """SGLang's default tree, with one of its cores, and its paged allocator, on host memory; sizes as of `Ours`."""

    def __init__(self, capacity: int, running: int, longest: int, *, core: str = "rust", page: int = PAGE) -> None:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.page, self.rows = page, ReqToTokenPool(running, longest, "cpu", False)
        pool: Any = SimpleNamespace(page_size=page)
        self.allocator = PagedTokenToKVPoolAllocator(capacity * page, page, torch.float16, "cpu", pool, False)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        name = type(self.tree.tree_core).__name__
        if name.startswith("Rust") != (core == "rust"):
            raise RuntimeError(f"SGLang took {name} here: the comparison is with its core in {core}")

    def take(self, req: Any, matched: int, end: int) -> torch.Tensor:
        """The tree gives out whole pages only, so that new tokens begin a page."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        lacking = -(-(end - matched) // self.page) * self.page
        if (short := lacking - self.allocator.available_size()) > 0:
            self.tree.evict(EvictParams(num_tokens=short))
        slots = self.allocator.alloc(lacking)
        assert slots is not None, "the pool is large enough for one request"
        return torch.cat([self.tree.prefix_device_indices(req), slots[: end - matched]])

    def behind(self) -> None: ...

    def memory_seconds(self) -> float:
        return 0.0


def turn(side: Side, tokens: array[int], number: int, *, prompt: int | None = None) -> Turn:
    """One turn of a conversation whose text is `tokens`, of which the first `prompt` are asked for and the others are
    answered; by default all are asked for."""
    from sglang.srt.managers.schedule_batch import ReqKvInfo
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tree, end = side.tree, len(tokens)
    req: Any = SimpleNamespace(
        rid=str(number),
        origin_input_ids=tokens,
        output_ids=array("q"),
        full_untruncated_fill_ids=tokens,
        extra_key=None,
        cache_salt=None,
        priority=0,
        session=None,
        session_id=None,
        kv_rotation_base=None,
        skip_radix_cache_insert=False,
        finished=lambda: True,
        owned_kv_len=lambda: end,
        kv=ReqKvInfo(),
    )
    start = time.perf_counter()
    found = tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens, None, limit=(prompt or end) - 1), req=req))
    matched = found.device_prefix_len
    req.prefix_len, req.last_node = matched, found.last_device_node
    req.kv.cache_protected_len = matched if found.cache_protected_len is None else found.cache_protected_len
    req.lock = tree.lock(req.last_node)
    side.rows.alloc([req])
    side.rows.req_to_token[req.kv.req_pool_idx, :end] = side.take(req, matched, end)
    req.kv.kv_allocated_len = req.kv.kv_committed_len = end
    # The request is over: the order is that of SGLang's release_kv_cache.
    tree.checkpoint(req, up_to=end)
    tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, end)])
    tree.unlock(req.lock)
    tree.on_release(req, checkpointed=True)
    side.rows.free(req)
    req.kv.mark_kv_released()
    seconds = time.perf_counter() - start
    side.behind()
    return Turn(seconds, matched)


def measure(
    sides: Mapping[str, Callable[[int, int, int], Side]], conversations: int = 10_000, turns: int = 1500
) -> dict[str, float]:
    """Median microseconds of a turn, by side, with so many conversations cached; and, under "... memory", how many of
    them placing and backing took in the mean."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scheduling thread is one
    rng = random.Random(0)
    capacity = conversations * (2 + (OWN + SAID) // PAGE) + 4 * turns + SYSTEM // PAGE + 64
    caches = {name: make(capacity, 256, LONGEST) for name, make in sides.items()}

    def words(count: int) -> array[int]:
        return array("q", (rng.randrange(100_000) for _ in range(count)))

    system = words(SYSTEM)
    texts = [system + words(OWN) for _ in range(conversations)]
    for number, text in enumerate(texts):
        for cache in caches.values():
            turn(cache, text, number)
    taken: dict[str, list[float]] = {name: [] for name in caches}
    before = {name: cache.memory_seconds() for name, cache in caches.items()}
    for number in range(turns):
        at = rng.randrange(conversations)
        text = texts[at] + words(SAID)
        for name in rotated(list(caches), number):
            taken[name].append(turn(caches[name], text, conversations + number).seconds)
        if len(text) + SAID < LONGEST:
            texts[at] = text
    torch.set_num_threads(threads)
    took = {name: 1e6 * statistics.median(times) for name, times in taken.items()}
    for name, cache in caches.items():
        took[f"{name} memory"] = 1e6 * (cache.memory_seconds() - before[name]) / turns
    return took


def compare() -> dict[str, float]:
    """For the summary of host.json: a turn with few and with many conversations, and ours over theirs."""
    summary: dict[str, float] = {}
    for conversations, name in ((100, "100"), (10_000, "10k")):
        took = measure({"ours": Ours, "rust": Stock, "python": partial(Stock, core="python")}, conversations)
        summary[f"turn_us_at_{name}"], summary[f"turn_memory_us_at_{name}"] = took["ours"], took["ours memory"]
        for core, key in (("rust", "rust"), ("python", "python_tree")):
            summary[f"{core}_turn_us_at_{name}"] = took[core]
            summary[f"turn_vs_{key}_{name}"] = took["ours"] / took[core]
    return summary
