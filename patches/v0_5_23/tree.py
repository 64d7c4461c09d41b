"""The tree as SGLang 0.5.23 calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.radix_cache import TreeNode

from sglang_vtensor.srt.radix_cache import PagedInsertParams, PagedRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey


class Tree(PagedRadixCache):
    @staticmethod
    def matched(result: MatchResult) -> int:
        return result.device_prefix_len

    @staticmethod
    def longer(result: MatchResult, tokens: int) -> MatchResult:
        matched = result.device_prefix_len
        return result._replace(device_prefix_len=matched + tokens, cache_protected_len=matched)

    @staticmethod
    def branching(result: MatchResult, tokens: int) -> MatchResult:
        return result._replace(mamba_branching_seqlen=tokens)

    def insertion(self, req: Req, key: RadixKey, value: Any, frames: list[int]) -> PagedInsertParams:
        inserted = req.kv.cache_inserted_len
        req.kv.cache_inserted_len = max(inserted, len(key))
        return PagedInsertParams(key=key, value=value, inserted_len=inserted, priority=req.priority or 0, frames=frames)

    def hold(self, req: Req, leaf: TreeNode, tokens: int) -> None:
        self.unlock(req.lock)
        req.lock = self.lock(leaf)
        req.last_node, req.kv.cache_protected_len = leaf, tokens

    def tell_removed(self, leaf: TreeNode) -> None:
        self.kv_events.record_remove(leaf)

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        if not self.disable:
            self.advance(req, req.full_untruncated_fill_ids[:up_to], over=req.finished())

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """What a request has is freed by page, all of it in `on_release`: rows are not read back."""

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        self.end_request(req, req.owned_kv_len(), kept=checkpointed and not self.disable)
