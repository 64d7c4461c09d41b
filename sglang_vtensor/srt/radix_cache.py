"""SGLang's radix tree, with the frames of each node kept on the host beside its slots.

    root -- [system prompt: frames 1 2] -- [turn 1: frames 3 4 5]
                                       \\-- [turn 1': frames 9 10]

A node owns its frames. A request that matched a node has locked it, and reads the frames without owning them. Nodes are
whole pages, and SGLang's `value` of a node is the slots of its frames, on the host. Where the frames of a node lie is
nothing that the tree depends on: it is one run as long as placement had room.

A match goes on inside a page: of the page behind the last whole one, be it a child's, the unfilled last page of a
request that ended there (a tail), or the one in which a running request's prompt ended, the longest common start is
taken too. So reuse is exact to the token, and samples of one prompt compute it once.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sglang_vtensor.srt.runtime import Begun, Partial, RequestFrames, Runtime, slots_of
from sglang_vtensor.srt.window_side import SIDE

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

#: Unfilled pages that are remembered at one node, of requests that ended and of requests that run: the newest ones.
MAX_TAILS = 8
#: A request waits for a prefix that another one is computing if so many tokens, at least, need not be computed twice.
AWAITED_TOKENS = 512
#: For so many batches it waits at most: what it waits for may be prompts of many chunks, one after another.
AWAITED_BATCHES = 64


@dataclass
class PagedInsertParams(InsertParams):
    """An insertion that brings the frames of the whole key."""

    frames: list[int] = field(default_factory=list)


class PagedRadixCache(RadixCache):
    """What is the same for every version of SGLang; `patches` has a class for each, with the names that it calls.

    A node has `frames` (in the order of its tokens), `tails` (`(RadixKey, Tail)`, what followed in pages that were not
    filled), `begun` (`(RadixKey, Begun)`, the same of requests that run), `firsts` (the first pages of its children, as
    tokens, sorted: of all of them, one beside where a page would stand has the longest start in common with it),
    `depth` (tokens from the root to its end) and `saved` (tokens that its children need not have each).

    With --disable-radix-cache it is `disable`d: nothing is found or kept, and requests own all of their frames.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.runtime: Runtime = params.token_to_kv_pool_allocator.runtime
        self.runtime.tree_stats = self.tree_stats
        self.runtime.use_group(params.tp_cache_group)
        #: Requests whose prompts are on their way into the tree: the extend batch in flight, and the chunked one.
        self.computing: list[Req] = []
        #: Leaves that may be evicted, each once, by the rank that it had when it came here; a heap.
        self._order: list[tuple[Any, int, TreeNode]] = []
        #: Nodes with several children, by the tokens that these save together (`_rate`); sorted.
        self._shared: list[tuple[int, int, TreeNode]] = []
        self._queued: set[int] = set()
        # Ranks are times and counts, which only grow: one that is out of date comes up too early, and is put back.
        self._ranks_grow = params.eviction_policy.lower() != "mru"
        super().__init__(params)

    def reset(self) -> None:
        """Forget the tree. Its frames are freed by `VTensorAllocator.clear`, which SGLang calls with it."""
        super().reset()
        self.computing.clear()
        self._order.clear()
        self._queued.clear()
        self._shared.clear()
        self.root_node.frames = []
        self._dress(self.root_node, 0)

    def _dress(self, node: TreeNode, depth: int) -> None:
        """What a node has here beside its frames while nothing hangs from it. `depth`: tokens from root to its end."""
        node.tails = []
        node.begun = []
        node.firsts = []
        node.gone = False
        node.depth = depth
        node.saved = 0

    def _first(self, key: RadixKey) -> tuple[str, tuple[int, ...]]:
        return self.runtime.sglang.namespace(key), tuple(key.token_ids[: self.page_size])

    # How a version of SGLang says it.

    @staticmethod
    def matched(result: MatchResult) -> int:
        """How many tokens a match found."""
        raise NotImplementedError

    @staticmethod
    def longer(result: MatchResult, tokens: int) -> MatchResult:
        """A match that goes on for so many tokens inside a page, which no node gives to the request."""
        raise NotImplementedError

    def insertion(self, req: Req, key: RadixKey, value: torch.Tensor, frames: list[int]) -> PagedInsertParams:
        """Of the start of a request."""
        raise NotImplementedError

    def hold(self, req: Req, leaf: TreeNode, tokens: int) -> None:
        """From now on the request's first `tokens` are the tree's: it locks `leaf`, and no longer what it matched."""
        raise NotImplementedError

    def tell_removed(self, leaf: TreeNode) -> None:
        """For who listens to SGLang's events of the cache."""
        raise NotImplementedError

    # Matching.

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As SGLang does, by whole pages; and for a request, on into the next page (`req.vtensor_partial`). Where
        layers see a window, up to where that is there."""
        result = super().match_prefix(params)
        req = params.req
        if req is None:
            return result
        req.vtensor_partial = None
        if self.disable:
            return result
        matched, node = self.matched(result), result.last_device_node
        whole_pages = self.page_size == 1 or getattr(req, "vtensor_whole_pages", False)
        with self.runtime.memory.clock:
            found, partial = self._longest(node, params.key, whole_pages=whole_pages)
        if found < matched:
            result = super().match_prefix(replace(params, key=params.key[:found]))
        if partial is None:
            return result
        req.vtensor_partial = partial
        return self.longer(result, partial.tokens)

    def _longest(self, node: TreeNode, key: RadixKey, *, whole_pages: bool) -> tuple[int, Partial | None]:
        """How many tokens of whole pages a match of `key` that ends at `node` may keep, and what it finds inside the
        next page. Where layers see a window, it ends where that is there: of pages before, or of what it finds inside.
        """
        window = self.runtime.window
        frames = [] if window is None else self.path_frames(node)
        found = node.depth if window is None else window.longest(frames) * self.page_size
        while not whole_pages:
            partial = self._inside_page(node, key[node.depth : node.depth + self.page_size])
            if partial is not None:
                count = node.depth // self.page_size
                if window is None or window.whole(frames[:count], node.depth + partial.tokens):
                    return node.depth, partial
            if node.depth <= found or node.parent.depth < found:
                break  # it ends here, or inside this node
            node = node.parent
        return found, None

    def _inside_page(self, node: TreeNode, rest: RadixKey) -> Partial | None:
        """The longest start of `rest` that a page behind `node` begins with."""
        best: Partial | None = None
        if not len(rest):
            return None
        sglang, window = self.runtime.sglang, self.runtime.window
        mine = self._first(rest)
        for key, tail in node.tails:
            if tail.frame is not None and sglang.namespace(key) == mine[0]:
                tokens = key.match(rest)
                if tokens > (best.tokens if best else 0):
                    best = Partial(tail.frame, tokens, tail=tail)
        for key, begun in node.begun:
            if self.runtime.writes_in(begun) and sglang.namespace(key) == mine[0]:
                tokens = key.match(rest)
                if tokens > (best.tokens if best else 0):
                    best = Partial(begun.record.frames[begun.page], tokens, begun=begun)
        # On each side of where the page would stand, the nearest one has the longest start in common with it.
        at = bisect_left(node.firsts, mine)
        for side in (range(at - 1, -1, -1), range(at, len(node.firsts))):
            for n in side:
                namespace, first = node.firsts[n]
                if namespace != mine[0]:
                    break  # behind it there are only others
                child = node.children[sglang.like(rest, first).child_key(self.page_size)]
                if window is not None and not window.there(child.frames[0]):
                    continue
                tokens = child.key.match(rest)
                if tokens > (best.tokens if best else 0):
                    best = Partial(child.frames[0], tokens, node=child)
                break
        return best

    def path_frames(self, node: TreeNode) -> list[int]:
        """The frames from the root down to the end of `node`."""
        path = []
        while node is not self.root_node:
            path.append(node.frames)
            node = node.parent
        return [frame for frames in reversed(path) for frame in frames]

    def awaits(self, req: Req, begun: Sequence[Req]) -> bool:
        """Whether a request that was just matched is better off a batch later: the tokens that follow its match are
        being computed for another one, in the batch that `begun` is the start of or in the one in flight.

        It may be put behind others so, but not for long: each time, what it finds in the tree has grown.
        """
        with self.runtime.memory.clock:
            return self._awaits(req, begun)

    def _awaits(self, req: Req, begun: Sequence[Req]) -> bool:
        sglang = self.runtime.sglang
        tokens, start = req.full_untruncated_fill_ids, sglang.prefix(req)
        end = start + AWAITED_TOKENS
        if self.disable or end > req._compute_max_prefix_len(len(tokens)) or req.positional_embed_overrides is not None:
            return False
        batches: int = getattr(req, "vtensor_awaited", 0)
        if batches == AWAITED_BATCHES:
            return False
        for other in (*begun, *self.computing):
            theirs = other.full_untruncated_fill_ids
            if (
                len(theirs) // self.page_size * self.page_size >= end  # what fills no page stays its own
                and theirs[start] == tokens[start]  # most differ here
                and sglang.namespace(other) == sglang.namespace(req)
                and other.positional_embed_overrides is None
                and theirs[:end] == tokens[:end]
            ):
                self.runtime.awaited_prefixes += not batches
                req.vtensor_awaited = batches + 1
                return True
        return False

    # Insertion.

    def insert(self, params: InsertParams) -> InsertResult:
        """Insert as SGLang does; a new leaf takes over the frames that the tree did not have."""
        result = super().insert(params)
        leaf = result.last_device_node
        if not hasattr(leaf, "frames"):
            assert isinstance(params, PagedInsertParams), "only requests insert, and they bring their frames"
            leaf.frames = params.frames[result.prefix_len // self.page_size :]
            self._dress(leaf, leaf.parent.depth + len(leaf.key))
            insort(leaf.parent.firsts, self._first(leaf.key))
            self._rate(leaf.parent)
            assert len(leaf.frames) * self.page_size == len(leaf.key), (leaf.frames, len(leaf.key))
        return result

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        count = split_len // self.page_size
        upper.frames, child.frames = child.frames[:count], child.frames[count:]
        # The tails stay with the child: they follow the end of its text.
        self._dress(upper, child.depth - len(child.key))
        upper.firsts = [self._first(child.key)]
        return upper

    def advance(self, req: Req, tokens: Sequence[int], *, over: bool) -> None:
        """The full pages of `tokens`, which the request has computed, go to the tree, and it reads them from there now.

        Where the tree has equal pages already (the same prompt twice in a batch), the request's own are freed, and the
        tree's take their place in its record. Of one that is `over` nobody reads the table of slots any more.
        """
        runtime = self.runtime
        slot = runtime.sglang.slot(req)
        record = runtime.requests[slot]
        record.awaited = False
        key = runtime.sglang.key(req, tokens).page_aligned(self.page_size)
        full = len(key) // self.page_size
        if full < record.protected:
            return  # less is to be kept of it than the tree has: --strip-thinking-cache, behind a retraction
        if runtime.window is not None and not self._mend(record, key):
            return  # there is no memory for what the tree's pages lack: it keeps its own
        frames = record.frames[:full]
        result = self.insert(self.insertion(req, key, slots_of(frames, self.page_size), frames))
        leaf, had = result.last_device_node, result.prefix_len // self.page_size
        if had > record.protected:
            with runtime.memory.clock:
                runtime.memory.free(record.frames[record.protected : had])
                theirs = self.path_frames(leaf)[record.protected : had]
                record.frames[record.protected : had] = theirs
            if not over:
                where = slice(record.protected * self.page_size, had * self.page_size)
                table = self.req_to_token_pool
                slots = slots_of(theirs, self.page_size)
                table.write((slot, where), slots.to(table.req_to_token.device, non_blocking=True))
        if runtime.window is not None:
            runtime.window.hold(record.frames[max(record.protected, record.behind) : full])
        record.protected, record.leaf = full, leaf
        if runtime.window is not None:
            runtime.window.slide(record, len(tokens))
        if runtime.sharing is not None and not over:
            runtime.sharing.changed(slot)
        self.hold(req, leaf, len(key))
        if not over and len(tokens) > len(key) and self.page_size > 1:
            with runtime.memory.clock:
                self._note_begun(leaf, runtime.sglang.key(req, tokens[len(key) :]), Begun(slot, record, full))

    def note_claimed(self, req: Req, record: RequestFrames, partial: Partial) -> None:
        """A request goes on in a page that was kept: what it found there others may copy from the next batch on."""
        sglang, start = self.runtime.sglang, record.protected * self.page_size
        tokens = req.full_untruncated_fill_ids[start : start + partial.tokens]
        self._note_begun(req.last_node, sglang.key(req, tokens), Begun(sglang.slot(req), record, record.protected))

    def _note_begun(self, node: TreeNode, key: RadixKey, begun: Begun) -> None:
        """A request computed the tokens of `key` behind `node`, and goes on in their page."""
        known = [(other, one) for other, one in node.begun if one.record is not begun.record]
        node.begun = [*(pair for pair in known if self.runtime.writes_in(pair[1])), (key, begun)][-MAX_TAILS:]

    def _mend(self, record: RequestFrames, key: RadixKey) -> bool:
        """Pages of the tree that the request is to read from now on, and whose window is gone, get it again: from the
        request's own, which are equal. False where a rank has no memory for that."""
        runtime, window = self.runtime, self.runtime.window
        assert window is not None
        result = super().match_prefix(MatchPrefixParams(key=key))
        theirs = self.path_frames(result.last_device_node)
        lacking = window.lacking(record, theirs)
        if not lacking:
            return True
        frames = [theirs[n] for n in lacking]
        mended = runtime.memory.back_again(SIDE, frames)
        if not runtime.agree(mended):
            if mended:
                runtime.memory.let_go(SIDE, frames)
            return False
        runtime.copies += [(record.frames[n], theirs[n], self.page_size, (SIDE,)) for n in lacking]
        return True

    def end_request(self, req: Req, written: int, *, kept: bool) -> None:
        """The request is over, with `written` tokens. What of it is `kept`, the tree has by now (`advance`): its
        unfilled last page is remembered too. The rest goes back to the pool."""
        runtime = self.runtime
        memory = runtime.memory
        record = runtime.end_request(runtime.sglang.slot(req), runtime.sglang.allocated(req))
        if not kept:
            memory.free(record.frames[record.protected :])
            return
        full = record.protected
        # Where the tree did not take all of its full pages, there is no node that the last one follows. Where less is
        # kept than was computed, that page may be behind the window.
        tail = written // self.page_size == full and written % self.page_size > 0
        tail = tail and (runtime.window is None or runtime.window.there(record.frames[full]))
        memory.free(record.frames[full + tail :])
        with memory.clock:
            if tail:
                tokens = (req.origin_input_ids + req.output_ids)[full * self.page_size : written]
                self._keep_tail(req.last_node, runtime.sglang.key(req, tokens), record.frames[full])

    def _keep_tail(self, node: TreeNode, key: RadixKey, page: int) -> None:
        """A request ended at `node` with the tokens of `key` in a page that they do not fill."""
        node.tails = [(known, tail) for known, tail in node.tails if tail.frame is not None]
        while len(node.tails) >= MAX_TAILS:
            self.runtime.memory.forget(node.tails.pop(0)[1])
        node.tails.append((key, self.runtime.memory.keep(page, len(key))))

    # Eviction.

    def evict(self, params: EvictParams) -> EvictResult:
        """Give up unlocked leaves, in the order of the eviction policy, until `params.num_tokens` are free."""
        if self.disable:
            return EvictResult()
        start_time = time.perf_counter()
        if not self._ranks_grow:
            self._order = [(self._rank(leaf), leaf.id, leaf) for leaf in self.evictable_leaves]
            self._queued = {leaf.id for leaf in self.evictable_leaves}
            heapq.heapify(self._order)
        frames: list[int] = []
        while len(frames) * self.page_size < params.num_tokens and (leaf := self._next_leaf()) is not None:
            frames += self._give_up(leaf)
        self.runtime.memory.free(frames)
        evicted = len(frames) * self.page_size
        self.update_eviction_metrics(evicted, start_time)
        return EvictResult(num_tokens_evicted=evicted)

    def expire(self, before: float) -> int:
        """Give up every leaf that nobody has read since `before` (`time.monotonic`), what becomes a leaf by that, and
        the unfilled pages that were kept before. Returns how many tokens of the tree."""
        start_time = time.perf_counter()
        self.runtime.memory.forget_old_tails(before)
        frames: list[int] = []
        while old := [leaf for leaf in self.evictable_leaves if leaf.last_access_time < before]:
            for leaf in old:
                frames += self._give_up(leaf)
        self.runtime.memory.free(frames)
        expired = len(frames) * self.page_size
        if expired:
            # Nobody may ever evict, who takes the nodes that are gone from the order.
            self._order = [entry for entry in self._order if not entry[2].gone]
            self._queued = {leaf_id for _, leaf_id, _ in self._order}
            heapq.heapify(self._order)
            self.update_eviction_metrics(expired, start_time)
        return expired

    def _give_up(self, leaf: TreeNode) -> list[int]:
        """Take an unlocked leaf from the tree. Returns its frames, for the caller to free."""
        for _, tail in leaf.tails:
            self.runtime.memory.forget(tail)
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

    # What there is.

    def tree_stats(self) -> dict[str, int]:
        return {
            "tree_tokens": self.evictable_size() + self.protected_size(),
            "tree_evictable_tokens": self.evictable_size(),
        }

    def _rate(self, node: TreeNode) -> None:
        """The node's children are others now: so is what its branches save by sharing what comes before them."""
        saved = max(0, len(node.children) - 1) * node.depth
        if saved == node.saved:
            return
        if node.saved:
            del self._shared[bisect_left(self._shared, (node.saved, node.id))]
        node.saved = saved
        if saved:
            insort(self._shared, (saved, node.id, node))

    def shared_prefixes(self, count: int) -> list[dict[str, int]]:
        """The prefixes that branches share, by what that saves: `tokens` of each, how many `branches` go on from there,
        and the bytes that these would take if each had its own (`saved_bytes`)."""
        token_bytes = self.runtime.memory.layout.stride_bytes
        return [
            {"tokens": node.depth, "branches": len(node.children), "saved_bytes": node.saved * token_bytes}
            for node in self.most_shared(count)
        ]

    def most_shared(self, count: int) -> list[TreeNode]:
        """The nodes at the ends of these prefixes, the one that saves most first."""
        return [node for _, _, node in self._shared[: -count - 1 : -1]]

    def nodes(self) -> list[TreeNode]:
        """Every node but the root."""
        found: list[TreeNode] = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found

    def check_integrity(self) -> None:
        """Nodes and requests own all owned frames, each once; slots and frames tell the same."""
        self.runtime.check_integrity()
        nodes = self.nodes()
        owned = [frame for node in nodes for frame in node.frames]
        owned += [p for record in self.runtime.requests.values() for p in record.frames[record.protected :]]
        assert len(owned) == len(set(owned)) == self.runtime.memory.owned, (len(owned), len(set(owned)))
        for node in [self.root_node, *nodes]:
            assert node.firsts == sorted(self._first(child.key) for child in node.children.values())
            assert node.saved == max(0, len(node.children) - 1) * node.depth
        assert self._shared == sorted((node.saved, node.id, node) for node in nodes if node.saved)
        if self.runtime.window is not None:
            self.runtime.window.check_integrity(self.runtime.requests.values(), nodes)
        for node in nodes:
            assert node.depth == node.parent.depth + len(node.key)
            assert len(node.frames) * self.page_size == len(node.key) == len(node.value)
            assert node.parent.children[node.key.child_key(self.page_size)] is node
            assert (node.value[:: self.page_size] // self.page_size).tolist() == node.frames
