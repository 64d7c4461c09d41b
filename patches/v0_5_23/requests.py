"""How SGLang 0.5.23 says what a request has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey


class Requests:
    """What a request has, `req.kv` says; its row is there as long as it holds any."""

    def slot(self, req: Req) -> int:
        return req.kv.req_pool_idx

    def begun(self, req: Req) -> bool:
        return req.kv.holds_kv

    def prefix(self, req: Req) -> int:
        return req.prefix_len

    def allocated(self, req: Req) -> int:
        return req.kv.kv_allocated_len

    def committed(self, req: Req) -> int:
        return req.kv.kv_committed_len

    def own(self, req: Req) -> int:
        return req.kv.kv_allocated_len - req.kv.cache_protected_len

    def extended(self, req: Req, tokens: int) -> None:
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens

    def decoded(self, req: Req) -> None:
        req.kv.kv_allocated_len += 1
        req.kv.kv_committed_len += 1

    def nothing_new(self, req: Req) -> None:
        req.extend_end = req.prefix_len

    def release_match(self, tree: Any, req: Req) -> None:
        tree.unlock(req.lock)
        req.lock = None

    def retract(self, scheduler: Any, reqs: list[Req]) -> None:
        from sglang.srt.managers.schedule_batch import retract_all

        retract_all(
            reqs=reqs,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )

    def key(self, req: Req, tokens: Sequence[int]) -> RadixKey:
        return self.like(req, tokens)

    def like(self, key: Req | RadixKey, tokens: Sequence[int]) -> RadixKey:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens, key.extra_key, cache_salt=key.cache_salt)

    def namespace(self, owner: Req | RadixKey) -> str:
        return repr((owner.extra_key, owner.cache_salt or None))

    def idle(self, scheduler: Any) -> bool:
        return scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused)

    def ranks(self, scheduler: Any) -> tuple[int, int]:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_rank, get_parallel().dp_rank or 0
