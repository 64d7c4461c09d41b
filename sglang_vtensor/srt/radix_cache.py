"""SGLang's radix tree, with the pages of each node kept on the host beside its slots, and segments parked at leaves.

    root -- [system prompt: pages 4 9] -- [turn 1: pages 2 7 3] (parked: 4 9 2 7 3)
                                      \\-- [turn 1': page 11]    (parked: 4 9 11)

A node owns its pages. A request that matched a node has locked it, and reads the pages without owning them. Nodes are
whole pages, and SGLang's `value` of a node is the slots of its pages, on the host.

A match goes on inside a page: of the page behind the last whole one, be it a child's or the unfilled last page of a
request that ended there (a tail), the longest common start is taken too. So reuse is exact to the token.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
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

from sglang_vtensor.segments import Segment
from sglang_vtensor.srt.runtime import Partial, RequestPages, Runtime, slots_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

#: For so many requests at the head of the queue the prefix is mapped ahead: a batch or two.
MAX_PREPARED = 64
#: Unfilled last pages that are remembered at one node, the newest ones.
MAX_TAILS = 8
#: A request waits for a prefix that another one is computing if so many tokens, at least, need not be computed twice.
AWAITED_TOKENS = 512
#: For so many batches it waits at most: what it waits for may be prompts of many chunks, one after another.
AWAITED_BATCHES = 64


@dataclass
class PagedInsertParams(InsertParams):
    """An insertion that brings the pages of the whole key."""

    pages: list[int] = field(default_factory=list)


class PagedRadixCache(RadixCache):
    """What is the same for every version of SGLang; `patches` has a class for each, with the names that it calls.

    A node has `pages` (ids, in the order of its tokens), `segment` (parked there, or None, or gone since), `tails`
    (`(RadixKey, Tail)`, what followed in pages that were not filled), `firsts` (the first pages of its children, as
    tokens, sorted: of all of them, one beside where a page would stand has the longest start in common with it),
    `depth` (tokens from the root to its end) and `saved` (tokens that its children need not have each).

    With --disable-radix-cache it is `disable`d: nothing is found, nothing is kept, and requests own all of their pages.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.runtime: Runtime = params.token_to_kv_pool_allocator.runtime
        self.runtime.tree_stats = self.tree_stats
        self.runtime.use_group(params.tp_cache_group)
        #: What waiting requests find when they are scheduled, by request id; None for one that finds it at a leaf.
        self._prepared: dict[str, tuple[Req, Segment | None]] = {}
        self._inserted = 0
        #: What `prepare` saw when it last looked: as long as that is so, there is nothing new to be found.
        self._looked_at: tuple[Any, ...] = ()
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
        """Forget the tree. Its pages are freed by `VTensorAllocator.clear`, which SGLang calls with it."""
        super().reset()
        self._prepared.clear()
        self.computing.clear()
        self._order.clear()
        self._queued.clear()
        self._shared.clear()
        self.root_node.pages = []
        self._dress(self.root_node, 0)

    def _dress(self, node: TreeNode, depth: int) -> None:
        """What a node has here beside its pages while nothing hangs from it. `depth`: tokens from root to its end."""
        node.segment = None
        node.tails = []
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

    def insertion(self, req: Req, key: RadixKey, value: torch.Tensor, pages: list[int]) -> PagedInsertParams:
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
        """As SGLang does, by whole pages; and for a request, on into the next page (`req.vtensor_partial`)."""
        result = super().match_prefix(params)
        req = params.req
        if req is None:
            return result
        req.vtensor_partial = None
        if self.disable or self.page_size == 1 or getattr(req, "vtensor_whole_pages", False):
            return result
        matched = self.matched(result)
        with self.runtime.memory.clock:
            partial = self._inside_page(result.last_device_node, params.key[matched : matched + self.page_size])
        if partial is None:
            return result
        req.vtensor_partial = partial
        return self.longer(result, partial.tokens)

    def _inside_page(self, node: TreeNode, rest: RadixKey) -> Partial | None:
        """The longest start of `rest` that a page behind `node` begins with."""
        best: Partial | None = None
        if not len(rest):
            return None
        sglang = self.runtime.sglang
        mine = self._first(rest)
        for key, tail in node.tails:
            if tail.page is not None and sglang.namespace(key) == mine[0]:
                tokens = key.match(rest)
                if tokens > (best.tokens if best else 0):
                    best = Partial(tail.page, tokens, tail=tail)
        at = bisect_left(node.firsts, mine)
        for namespace, first in node.firsts[max(0, at - 1) : at + 1]:
            if namespace != mine[0]:
                continue
            child = node.children[sglang.like(rest, first).child_key(self.page_size)]
            tokens = child.key.match(rest)
            if tokens > (best.tokens if best else 0):
                best = Partial(child.pages[0], tokens, node=child)
        return best

    def path_pages(self, node: TreeNode) -> list[int]:
        """The pages from the root down to the end of `node`."""
        path = []
        while node is not self.root_node:
            path.append(node.pages)
            node = node.parent
        return [page for pages in reversed(path) for page in pages]

    def parked_segment(self, node: TreeNode | None) -> Segment | None:
        """The segment parked at `node`, if it still is."""
        if node is None or node.segment is None or node.segment.owner is not node:
            return None
        return node.segment

    def prepared_segment(self, rid: str) -> Segment | None:
        """The segment that was prepared for the waiting request of this id, if it still is."""
        req, segment = self._prepared.get(rid, (None, None))
        return segment if segment is not None and segment.owner is req else None

    def segment_for(self, req: Req, taken: Container[int] = ()) -> Segment | None:
        """The segment that a request adopts as it begins: the one parked where it continues, or one prepared for it.
        Not one of `taken` (indices): of several that continue one turn, the first takes its segment.

        What was prepared is known here until it is leased, which may fail and be tried again.
        """
        parked = self.parked_segment(req.last_node)
        if parked is not None and parked.index in taken:
            parked = None
        prepared = self.prepared_segment(req.rid)
        if parked is None or prepared is None:
            return parked or prepared
        del self._prepared[req.rid]
        self.runtime.memory.drop(prepared)
        return parked

    def prepare(self, waiting: Sequence[Req]) -> None:
        """Let the worker map the shared prefixes of the requests that wait first, each on a segment of its own."""
        with self.runtime.memory.clock:
            self._prepare(waiting)

    def _prepare(self, waiting: Sequence[Req]) -> None:
        memory, sglang, tokens = self.runtime.memory, self.runtime.sglang, self.page_size
        seen = (self._inserted, len(waiting), waiting[0].rid if waiting else None, waiting[-1].rid if waiting else None)
        if seen == self._looked_at:
            return
        self._looked_at = seen
        if self._prepared:
            still = {req.rid for req in waiting}
            for rid, (_, segment) in list(self._prepared.items()):
                prepared = self.prepared_segment(rid)
                if rid in still and segment is prepared:
                    continue  # neither leased nor given up since
                del self._prepared[rid]
                if prepared is not None:
                    memory.drop(prepared)
        for req in waiting[:MAX_PREPARED]:
            if req.rid in self._prepared or sglang.begun(req) or len(req.origin_input_ids) <= tokens:
                continue
            if sglang.key(req, req.origin_input_ids[:tokens]).child_key(tokens) not in self.root_node.children:
                continue  # told by one page: nothing of it is cached
            # Its last token is always computed, so what is matched ends before it.
            key = sglang.key(req, (req.origin_input_ids + req.output_ids)[:-1])
            node, pages = self._find(key.page_aligned(tokens))
            segment = None
            if self.parked_segment(node) is None:
                segment = memory.prepare(pages, req)
                if segment is None:
                    return
            self._prepared[req.rid] = (req, segment)

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

    def _find(self, key: RadixKey) -> tuple[TreeNode | None, list[int]]:
        """What a match would find: the node it ends at (None inside of one) and the pages. The tree stays as it is."""
        node, pages = self.root_node, []
        while len(key) and (child := node.children.get(key.child_key(self.page_size))) is not None:
            common = child.key.match(key, page_size=self.page_size)
            pages += child.pages[: common // self.page_size]
            if common < len(child.key):
                return None, pages
            node, key = child, key[common:]
        return node, pages

    # Insertion.

    def insert(self, params: InsertParams) -> InsertResult:
        """Insert as SGLang does; a new leaf takes over the pages that the tree did not have."""
        result = super().insert(params)
        leaf = result.last_device_node
        if not hasattr(leaf, "pages"):
            assert isinstance(params, PagedInsertParams), "only requests insert, and they bring their pages"
            leaf.pages = params.pages[result.prefix_len // self.page_size :]
            self._inserted += 1
            self._dress(leaf, leaf.parent.depth + len(leaf.key))
            insort(leaf.parent.firsts, self._first(leaf.key))
            self._rate(leaf.parent)
            assert len(leaf.pages) * self.page_size == len(leaf.key), (leaf.pages, len(leaf.key))
        return result

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        count = split_len // self.page_size
        upper.pages, child.pages = child.pages[:count], child.pages[count:]
        # What is parked at the child shows the whole path, and stays there, and so do its tails.
        self._dress(upper, child.depth - len(child.key))
        upper.firsts = [self._first(child.key)]
        return upper

    def advance(self, req: Req, tokens: Sequence[int], *, over: bool) -> None:
        """The full pages of `tokens`, which the request has computed, go to the tree, and it reads them from there now.

        Where the tree has equal pages already (the same prompt twice in a batch), the request's own are freed, and the
        tree's take their place in its record: its segment shows freed pages until it is mapped again. Of one that is
        `over` nobody reads the table of slots any more.
        """
        runtime = self.runtime
        slot = runtime.sglang.slot(req)
        record = runtime.requests[slot]
        key = runtime.sglang.key(req, tokens).page_aligned(self.page_size)
        full = len(key) // self.page_size
        if full < record.protected:
            return  # less is to be kept of it than the tree has: --strip-thinking-cache, behind a retraction
        pages = record.pages[:full]
        result = self.insert(self.insertion(req, key, slots_of(pages, self.page_size), pages))
        leaf, had = result.last_device_node, result.prefix_len // self.page_size
        if had > record.protected:
            with runtime.memory.clock:
                runtime.memory.free(record.pages[record.protected : had])
                theirs = self.path_pages(leaf)[record.protected : had]
                record.pages[record.protected : had] = theirs
            if not over:
                where = slice(record.protected * self.page_size, had * self.page_size)
                table = self.req_to_token_pool
                slots = slots_of(theirs, self.page_size)
                table.write((slot, where), slots.to(table.req_to_token.device, non_blocking=True))
        record.protected = full
        if runtime.sharing is not None and not over:
            runtime.sharing.changed(slot)
        self.hold(req, leaf, len(key))

    def end_request(self, req: Req, written: int, *, kept: bool) -> None:
        """The request is over, with `written` tokens. What of it is `kept`, the tree has by now (`advance`): its
        unfilled last page is remembered too, and its segment parked. The rest goes back to the pool."""
        runtime = self.runtime
        memory = runtime.memory
        record = runtime.end_request(runtime.sglang.slot(req), runtime.sglang.allocated(req))
        if not kept:
            memory.free(record.pages[record.protected :])
            if record.segment is not None:
                memory.release(record.segment)
            return
        full = record.protected
        tail = full < memory.layout.pages_for(written)
        memory.free(record.pages[full + tail :])
        with memory.clock:
            if tail:
                tokens = (req.origin_input_ids + req.output_ids)[full * self.page_size : written]
                self._keep_tail(req.last_node, runtime.sglang.key(req, tokens), record.pages[full])
            self._park(record.segment, req.last_node)

    def _keep_tail(self, node: TreeNode, key: RadixKey, page: int) -> None:
        """A request ended at `node` with the tokens of `key` in a page that they do not fill."""
        node.tails = [(known, tail) for known, tail in node.tails if tail.page is not None]
        while len(node.tails) >= MAX_TAILS:
            self.runtime.memory.forget(node.tails.pop(0)[1])
        node.tails.append((key, self.runtime.memory.keep(page, len(key))))

    def _park(self, segment: Segment | None, node: TreeNode) -> None:
        """Leave a request's segment at the node that it ends at, for the turn that continues it; or let go of it, if
        there is one already, or if it shows other pages than the tree has (the tree had equal ones)."""
        if segment is None:
            return
        memory, path = self.runtime.memory, self.path_pages(node)
        agree = memory.shown(segment, path) == min(len(segment.pages), len(path))
        if not path or not agree or self.parked_segment(node) is not None:
            memory.release(segment)
            return
        memory.park(segment, path, node)
        node.segment = segment

    def give_back(self, req: Req, record: RequestPages) -> None:
        """A request that is put off leaves its segment at the node that it matched: it, or another, comes back."""
        self._park(record.segment, req.last_node)

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
        pages: list[int] = []
        while len(pages) * self.page_size < params.num_tokens and (leaf := self._next_leaf()) is not None:
            pages += self._give_up(leaf)
        self._free(pages)
        evicted = len(pages) * self.page_size
        self.update_eviction_metrics(evicted, start_time)
        return EvictResult(num_tokens_evicted=evicted)

    def expire(self, before: float) -> int:
        """Give up every leaf that nobody has read since `before` (`time.monotonic`), what becomes a leaf by that, and
        the unfilled pages that were kept before. Returns how many tokens of the tree."""
        start_time = time.perf_counter()
        self.runtime.memory.forget_old_tails(before)
        pages: list[int] = []
        while old := [leaf for leaf in self.evictable_leaves if leaf.last_access_time < before]:
            for leaf in old:
                pages += self._give_up(leaf)
        self._free(pages)
        expired = len(pages) * self.page_size
        if expired:
            # Nobody may ever evict, who takes the nodes that are gone from the order.
            self._order = [entry for entry in self._order if not entry[2].gone]
            self._queued = {leaf_id for _, leaf_id, _ in self._order}
            heapq.heapify(self._order)
            self.update_eviction_metrics(expired, start_time)
        return expired

    def _free(self, pages: list[int]) -> None:
        """Free the pages of leaves that were given up. What was mapped of them ahead, for requests that wait, would
        keep their memory: it goes too. Leaves go first, so that of a path the last pages are gone."""
        memory = self.runtime.memory
        memory.free(pages)
        if pages:
            for rid in self._prepared:
                if (segment := self.prepared_segment(rid)) is not None:
                    memory.shorten(segment)

    def _give_up(self, leaf: TreeNode) -> list[int]:
        """Take an unlocked leaf from the tree. Returns its pages, for the caller to free."""
        segment = self.parked_segment(leaf)
        if segment is not None:
            self.runtime.memory.drop(segment)
        for _, tail in leaf.tails:
            self.runtime.memory.forget(tail)
        leaf.gone = True
        firsts = leaf.parent.firsts
        del firsts[bisect_left(firsts, self._first(leaf.key))]
        self._delete_leaf(leaf)
        self._rate(leaf.parent)
        self.tell_removed(leaf)
        pages: list[int] = leaf.pages
        return pages

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
            {"tokens": node.depth, "branches": len(node.children), "saved_bytes": saved * token_bytes}
            for saved, _, node in self._shared[: -count - 1 : -1]
        ]

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
        """Nodes and requests own all owned pages, each once; slots and pages tell the same; parked segments match."""
        self.runtime.check_integrity()
        nodes = self.nodes()
        owned = [page for node in nodes for page in node.pages]
        owned += [p for record in self.runtime.requests.values() for p in record.pages[record.protected :]]
        assert len(owned) == len(set(owned)) == self.runtime.memory.pages.owned, (len(owned), len(set(owned)))
        for node in [self.root_node, *nodes]:
            assert node.firsts == sorted(self._first(child.key) for child in node.children.values())
            assert node.saved == max(0, len(node.children) - 1) * node.depth
        assert self._shared == sorted((node.saved, node.id, node) for node in nodes if node.saved)
        for node in nodes:
            assert node.depth == node.parent.depth + len(node.key)
            assert len(node.pages) * self.page_size == len(node.key) == len(node.value)
            assert node.parent.children[node.key.child_key(self.page_size)] is node
            assert (node.value[:: self.page_size] // self.page_size).tolist() == node.pages
            segment = self.parked_segment(node)
            if segment is not None:
                # Pages born in decode are mapped behind: a parked segment may show fewer for a while.
                path = self.path_pages(node)
                shown = min(len(path), len(segment.pages))
                assert segment.pages[:shown] == path[:shown], (segment, path)
