"""SGLang's radix tree, with the frames of each node kept on the host beside its slots.

    root -- [system prompt: frames 1 2] -- [turn 1: frames 3 4 5]
                                       \\-- [turn 1': frames 9 10]

A node owns its frames. A request that matched a node has locked it, and reads the frames without owning them. Nodes are
whole pages, and SGLang's `value` of a node is the slots of its frames, on the host. Where the frames of a node lie is
nothing that the tree depends on: it is one run as long as placement had room. How a match goes on inside a page is in
`matching.py`, and what goes where memory is short in `eviction.py`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from sglang_vtensor.srt.matching import MatchingTree
from sglang_vtensor.srt.runtime import Begun, Partial, RequestFrames, Runtime, slots_of
from sglang_vtensor.srt.window_side import SIDE

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

#: Unfilled pages that are remembered at one node, of requests that ended and of requests that run: the newest ones.
MAX_TAILS = 8


@dataclass
class PagedInsertParams(InsertParams):
    """An insertion that brings the frames of the whole key."""

    frames: list[int] = field(default_factory=list)


class PagedRadixCache(MatchingTree):
    """What is the same for every version of SGLang; `patches` has a class for each, with the names that it calls.

    A node has `frames` (in the order of its tokens), `tails` (`(RadixKey, Tail)`, what followed in pages that were not
    filled), `begun` (`(RadixKey, Begun)`, the same of requests that run), `firsts` (the first pages of its children, as
    tokens, sorted: of all of them, one beside where a page would stand has the longest start in common with it),
    `depth` (tokens from the root to its end), `saved` (tokens that its children need not have each), `window` (frames
    that have memory for its end on the side of windows, `WindowSide.keep`), `state` (the slot of the state at its end,
    `StateSide`; None: it has none), `state_epoch` (of the last batch that may use that) and `epoch` (of the last batch
    that may read it, noted when the last request lets go of it).

    With --disable-radix-cache it is `disable`d: nothing is found or kept, and requests own all of their frames.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.runtime: Runtime = params.token_to_kv_pool_allocator.runtime
        self.runtime.tree_stats = self.tree_stats
        self.runtime.use_group(params.tp_cache_group)
        #: Requests whose prompts are on their way into the tree: the extend batch in flight, and the chunked one.
        self.computing: list[Req] = []
        #: Requests begin one at a time, and those that were tried alone oftener than so are passed over; None: they do
        #: not.
        self.fewest_tries: int | None = None
        #: Nodes with several children, by the tokens that these save together (`_rate`); sorted.
        self._shared: list[tuple[int, int, TreeNode]] = []
        super().__init__(params)

    def reset(self) -> None:
        """Forget the tree. Its frames are freed by `VTensorAllocator.clear`, which SGLang calls with it."""
        super().reset()
        self.computing.clear()
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
        node.window = []
        node.state = None
        node.epoch = self.runtime.memory.next_epoch

    # How a version of SGLang says it.

    def insertion(self, req: Req, key: RadixKey, value: torch.Tensor, frames: list[int]) -> PagedInsertParams:
        """Of the start of a request."""
        raise NotImplementedError

    def hold(self, req: Req, leaf: TreeNode, tokens: int) -> None:
        """From now on the request's first `tokens` are the tree's: it locks `leaf`, and no longer what it matched."""
        raise NotImplementedError

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
        upper.epoch = child.epoch
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
                runtime.changes += 1
                record.frames[record.protected : had] = theirs
            if not over:
                where = slice(record.protected * self.page_size, had * self.page_size)
                table = self.req_to_token_pool
                slots = slots_of(theirs, self.page_size)
                table.write((slot, where), slots.to(table.req_to_token.device, non_blocking=True))
        if runtime.window is not None:
            runtime.window.hold(record.frames[max(record.protected, record.behind) : full])
            node = leaf
            while node.depth > record.protected * self.page_size:
                runtime.window.keep(node, record.frames[: node.depth // self.page_size])
                node = node.parent
        record.protected, record.leaf = full, leaf
        if runtime.window is not None:
            runtime.window.slide(record, len(tokens))
        if runtime.sharing is not None and not over:
            runtime.sharing.changed(slot)
        self.hold(req, leaf, len(key))
        if runtime.states is not None:  # it may evict: the leaf is locked
            runtime.states.keep(self, req, record, leaf, over=over)
        inside = self.page_size > 1 and runtime.states is None  # a match ends inside a page
        if inside and not over and len(tokens) > len(key):
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
        result = self.match_prefix(MatchPrefixParams(key=key))
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
        if runtime.states is not None:
            runtime.states.over(req, record)
        if not kept:
            memory.free(record.frames[record.protected :], runtime.last_reader)
            return
        full = record.protected
        # Where the tree did not take all of its full pages, there is no node that the last one follows. Where less is
        # kept than was computed, that page may be behind the window.
        tail = runtime.states is None and written // self.page_size == full and written % self.page_size > 0
        tail = tail and (runtime.window is None or runtime.window.there(record.frames[full]))
        memory.free(record.frames[full + tail :], runtime.last_reader)
        with memory.clock:
            if tail:
                tokens = (req.origin_input_ids + req.output_ids)[full * self.page_size : written]
                self._keep_tail(req.last_node, runtime.sglang.key(req, tokens), record.frames[full])

    def _keep_tail(self, node: TreeNode, key: RadixKey, page: int) -> None:
        """A request ended at `node` with the tokens of `key` in a page that they do not fill."""
        node.tails = [(known, tail) for known, tail in node.tails if tail.frame is not None]
        while len(node.tails) >= MAX_TAILS:
            self.runtime.memory.tails.forget(node.tails.pop(0)[1])
        node.tails.append((key, self.runtime.memory.tails.keep(page, len(key))))

    def ending_at(self, leaf: TreeNode, tokens: int) -> TreeNode:
        """The node that ends so many tokens, whole pages of them, from the root on the way to the end of `leaf`. A node
        that these end inside of is split there."""
        while leaf.parent.depth >= tokens:
            leaf = leaf.parent
        return leaf if leaf.depth == tokens else self._split_node(leaf.key, leaf, tokens - leaf.parent.depth)

    # What SGLang asks of a tree with states: how many of these there are, where none is held by requests.

    def supports_mamba(self) -> bool:
        return self.runtime.states is not None

    def full_evictable_size(self) -> int:
        return int(self.evictable_size())

    def full_protected_size(self) -> int:
        return int(self.protected_size())

    def mamba_evictable_size(self) -> int:
        return 0 if self.runtime.states is None else len(self.runtime.states.nodes)

    def mamba_protected_size(self) -> int:
        return 0

    def all_mamba_values_flatten(self) -> torch.Tensor:
        """The slots of the states that nodes keep: SGLang's watchdog counts them when a server hangs."""
        kept = [] if self.runtime.states is None else self.runtime.states.nodes.values()
        return torch.tensor([node.state for node in kept], dtype=torch.int64)

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
        if self.runtime.ends is not None:
            self.runtime.ends.check_integrity(self.runtime.requests.values(), nodes)
        for node in nodes:
            assert node.depth == node.parent.depth + len(node.key)
            assert len(node.frames) * self.page_size == len(node.key) == len(node.value)
            assert node.parent.children[node.key.child_key(self.page_size)] is node
            assert (node.value[:: self.page_size] // self.page_size).tolist() == node.frames
