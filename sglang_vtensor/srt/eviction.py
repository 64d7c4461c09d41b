"""What of the tree goes where memory is short: leaves that nobody reads, in the order of SGLang's eviction policy, and
the windows or states at the ends of nodes that stay."""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from sglang_vtensor.srt.runtime import Runtime


class EvictingTree(RadixCache):
    """A tree whose leaves lie in a heap, by the rank that each had when it came there."""

    runtime: Runtime

    def __init__(self, params: CacheInitParams) -> None:
        #: Leaves that may be evicted, each once, by the rank that it had when it came here; a heap.
        self._order: list[tuple[Any, int, TreeNode]] = []
        self._queued: set[int] = set()
        # Ranks are times and counts, which only grow: one that is out of date comes up too early, and is put back.
        self._ranks_grow = params.eviction_policy.lower() != "mru"
        super().__init__(params)

    def reset(self) -> None:
        """No leaf is left."""
        super().reset()
        self._order.clear()
        self._queued.clear()

    # What nodes have beside their frames is the tree's.

    def tell_removed(self, leaf: TreeNode) -> None:
        """For who listens to SGLang's events of the cache."""
        raise NotImplementedError

    def _first(self, key: RadixKey) -> tuple[str, tuple[int, ...]]:
        raise NotImplementedError

    def _rate(self, node: TreeNode) -> None:
        raise NotImplementedError

    # What SGLang asks.

    def dec_lock_ref(self, node: TreeNode, params: Any = None) -> Any:
        """As SGLang does, and note which batch is the last one that may read what nobody locks any more."""
        result = super().dec_lock_ref(node, params)
        while node is not self.root_node and not node.lock_ref and not self.disable:
            node.epoch, node = self.runtime.memory.next_epoch, node.parent
        return result

    def evict(self, params: EvictParams) -> EvictResult:
        """Give up unlocked leaves, in the order of the eviction policy, until `params.num_tokens` are free."""
        left = params.num_tokens

        def one_more() -> int | None:
            nonlocal left
            leaf = self._next_leaf() if left > 0 else None
            if leaf is None:
                return None
            freed = self._free_leaf(leaf)
            left -= freed
            return freed

        return EvictResult(num_tokens_evicted=self._evict(one_more))

    # What the memory asks.

    def reclaim(self, frames: int) -> None:
        """Give up what is cached until there is room for so many frames more than there is now, with memory on all
        sides. Where layers see a window or have states, that is leaves, and the windows or states of the ends of nodes
        that stay: what nobody used for the longest time first."""
        memory = self.runtime.memory
        if self.runtime.ends is None:
            self.evict(EvictParams(num_tokens=frames * self.page_size))
            return
        wanted = memory.room() + frames
        self._reclaim(lambda: memory.room() >= wanted)

    def reclaim_states(self, count: int) -> None:
        """The same until there is room for so many states. Where slots are short, only states make room."""
        states, side = self.runtime.memory.states, self.runtime.states
        assert states is not None
        assert side is not None
        while states.left < count and (end := side.oldest()) is not None:
            side.drop(end)
        self._reclaim(lambda: states.room() >= count)

    def expire(self, before: float) -> int:
        """Give up every leaf that nobody has read since `before` (`time.monotonic`), what becomes a leaf by that, and
        the unfilled pages that were kept before. Returns how many tokens of the tree."""
        start_time = time.perf_counter()
        self.runtime.memory.tails.forget_old(before)
        expired = 0
        while old := [leaf for leaf in self.evictable_leaves if leaf.last_access_time < before]:
            for leaf in old:
                expired += self._free_leaf(leaf)
        if expired:
            # Nobody may ever evict, who takes the nodes that are gone from the order.
            self._order = [entry for entry in self._order if not entry[2].gone]
            self._queued = {leaf_id for _, leaf_id, _ in self._order}
            heapq.heapify(self._order)
            self.update_eviction_metrics(expired, start_time)
        return expired

    # How it is done.

    def _reclaim(self, enough: Callable[[], bool]) -> None:
        ends = self.runtime.ends
        assert ends is not None

        def one_more() -> int | None:
            if enough():
                return None
            end, leaf = ends.oldest(), self._next_leaf()
            if end is not None and (leaf is None or (end not in self.evictable_leaves and _is_older(end, leaf))):
                if leaf is not None:
                    self._update_leaf_status(leaf)
                ends.drop(end)
                return 0
            return None if leaf is None else self._free_leaf(leaf)

        self._evict(one_more)

    def _evict(self, one_more: Callable[[], int | None]) -> int:
        """Call `one_more` as long as it gives something up. Returns how many tokens that was."""
        if self.disable:
            return 0
        start_time = time.perf_counter()
        if not self._ranks_grow:
            self._order = [(self._rank(leaf), leaf.id, leaf) for leaf in self.evictable_leaves]
            self._queued = {leaf.id for leaf in self.evictable_leaves}
            heapq.heapify(self._order)
        evicted = 0
        while (tokens := one_more()) is not None:
            evicted += tokens
        self.update_eviction_metrics(evicted, start_time)
        return evicted

    def _free_leaf(self, leaf: TreeNode) -> int:
        frames = self._give_up(leaf)
        self.runtime.memory.free(frames, leaf.epoch)
        return len(frames) * self.page_size

    def _give_up(self, leaf: TreeNode) -> list[int]:
        """Take an unlocked leaf from the tree. Returns its frames, for the caller to free."""
        for _, tail in leaf.tails:
            self.runtime.memory.tails.forget(tail)
        if self.runtime.ends is not None:
            self.runtime.ends.drop(leaf)
        leaf.gone = True
        firsts = leaf.parent.firsts
        del firsts[bisect_left(firsts, self._first(leaf.key))]
        self._delete_leaf(leaf)
        self._rate(leaf.parent)
        self.tell_removed(leaf)
        frames: list[int] = leaf.frames
        return frames

    def _rank(self, leaf: TreeNode) -> Any:
        return self.eviction_strategy.get_priority(leaf)

    def _update_leaf_status(self, node: TreeNode) -> None:
        super()._update_leaf_status(node)
        if node in self.evictable_leaves and node.id not in self._queued:
            self._queued.add(node.id)
            heapq.heappush(self._order, (self._rank(node), node.id, node))

    def _next_leaf(self) -> TreeNode | None:
        """The leaf of the lowest rank; one that is locked now comes back when it is not."""
        while self._order:
            rank, _, leaf = heapq.heappop(self._order)
            self._queued.discard(leaf.id)
            if leaf not in self.evictable_leaves:
                continue  # locked now, or expired
            if rank == self._rank(leaf):
                return leaf
            self._update_leaf_status(leaf)
        return None


def _is_older(end: TreeNode, leaf: TreeNode) -> bool:
    """Whether nobody used the end of a node for longer than nobody read a leaf."""
    older: bool = end.end_time <= leaf.last_access_time
    return older
