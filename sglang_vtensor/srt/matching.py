"""What of a request is in the tree: a match, which goes on inside a page, and what is being computed for others.

Of the page behind the last whole one, be it a child's, the unfilled last page of a request that ended there (a tail),
or the one in which a running request's prompt ended, the longest common start is taken too. So reuse is exact to the
token, and samples of one prompt compute it once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from sglang_vtensor.srt.eviction import EvictingTree
from sglang_vtensor.srt.runtime import Partial

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: A request waits for a prefix that another one is computing if so many tokens, at least, need not be computed twice.
AWAITED_TOKENS = 512
#: For so many batches it waits at most: what it waits for may be prompts of many chunks, one after another.
AWAITED_BATCHES = 64


class MatchingTree(EvictingTree):
    """A tree whose nodes have what `PagedRadixCache` says.

    `computing` are requests whose prompts are on their way into it: the extend batch in flight, and the chunked one.
    """

    computing: list[Req]

    # How a version of SGLang says it.

    @staticmethod
    def matched(result: MatchResult) -> int:
        """How many tokens a match found."""
        raise NotImplementedError

    @staticmethod
    def longer(result: MatchResult, tokens: int) -> MatchResult:
        """A match that goes on for so many tokens inside a page, which no node gives to the request."""
        raise NotImplementedError

    @staticmethod
    def branching(result: MatchResult, tokens: int) -> MatchResult:
        """A match behind which a state is to be left at so many tokens."""
        raise NotImplementedError

    # What is asked of it.

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
        if self.runtime.states is not None:
            return self._up_to_a_state(params, result)
        whole_pages = self.page_size == 1 or getattr(req, "vtensor_whole_pages", False)
        with self.runtime.memory.clock:
            found, partial = self._longest(node, params.key, whole_pages=whole_pages)
        if found < matched:
            result = super().match_prefix(replace(params, key=params.key[:found]))
        if partial is None:
            return result
        req.vtensor_partial = partial
        return self.longer(result, partial.tokens)

    def _up_to_a_state(self, params: MatchPrefixParams, result: MatchResult) -> MatchResult:
        """A match ends where there is a state. Beyond it, the tree may have keys and values of more tokens. Where other
        texts go on behind these, SGLang is told so, and the request leaves a state there for the next one. Where
        nothing follows, this is the next turn of that text, and its own end is worth more: one state is left at a time.
        """
        states, end = self.runtime.states, result.last_device_node
        assert states is not None
        anew = getattr(params.req, "vtensor_anew", False)  # what it would go on behind may be just what has to go
        found = 0 if anew else states.longest(end).depth
        if found < end.depth:
            result = super().match_prefix(replace(params, key=params.key[:found]))
        branch = states.tracked(end.depth) if end.children else 0
        return self.branching(result, branch) if branch > found else result

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
        least, most = start + AWAITED_TOKENS, req._compute_max_prefix_len(len(tokens))
        if self.disable or least > most or req.positional_embed_overrides is not None:
            return False
        batches: int = getattr(req, "vtensor_awaited", 0)
        if batches == AWAITED_BATCHES:
            return False
        for other in (*begun, *self.computing):
            theirs = other.full_untruncated_fill_ids
            end = least
            if self.runtime.states is not None:  # a match ends where the other one leaves a state
                before = sglang.prefix(other)
                end = max(end, before + self.runtime.states.tracked(len(theirs) - before))
            if (
                len(theirs) // self.page_size * self.page_size >= end  # what fills no page stays its own
                and end <= most
                and theirs[start] == tokens[start]  # most differ here
                and sglang.namespace(other) == sglang.namespace(req)
                and other.positional_embed_overrides is None
                and theirs[:end] == tokens[:end]
            ):
                self.runtime.awaited_prefixes += not batches
                req.vtensor_awaited = batches + 1
                return True
        return False

    def _first(self, key: RadixKey) -> tuple[str, tuple[int, ...]]:
        return self.runtime.sglang.namespace(key), tuple(key.token_ids[: self.page_size])
