"""SGLang 0.5.17."""

from __future__ import annotations

import argparse
import contextvars
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_vtensor.patches.common import Patch, shared_decode
from sglang_vtensor.patches.seams import SERVER_ARGS, Seam

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.server_args import ServerArgs

    from sglang_vtensor.srt.options import Refusal

_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
#: What graph keys of shared decode are told apart by.
VARIANT = "vtensor_shared"
#: Options parsed by argparse, on their way to the `ServerArgs` that is made of them.
_parsed: contextvars.ContextVar[Any] = contextvars.ContextVar("vtensor_options", default=None)


class Requests:
    """A request has a row as long as it has a `kv`; where its matched and computed tokens are, `prefix_indices` says,
    of which only the length is read."""

    def slot(self, req: Req) -> int:
        return req.req_pool_idx

    def begun(self, req: Req) -> bool:
        return req.kv is not None

    def prefix(self, req: Req) -> int:
        return len(req.prefix_indices)

    def allocated(self, req: Req) -> int:
        return req.kv.kv_allocated_len

    def committed(self, req: Req) -> int:
        return req.kv_committed_len

    def own(self, req: Req) -> int:
        return req.kv.kv_allocated_len - req.cache_protected_len

    def extended(self, req: Req, tokens: int) -> None:
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        if req.kv is None:
            req.kv = ReqKvInfo(kv_allocated_len=tokens, swa_evicted_seqlen=0)
        else:
            req.kv.kv_allocated_len = tokens

    def decoded(self, req: Req) -> None:
        req.kv.kv_allocated_len += 1

    def nothing_new(self, req: Req) -> None:
        req.set_extend_range(len(req.prefix_indices), len(req.prefix_indices))

    def release_match(self, tree: Any, req: Req) -> None:
        tree.dec_lock_ref(req.last_node)

    def retract(self, scheduler: Any, reqs: list[Req]) -> None:
        from sglang.srt.managers.schedule_batch import retract_all

        retract_all(
            reqs=reqs,
            server_args=scheduler.server_args,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )

    def key(self, req: Req, tokens: Sequence[int]) -> RadixKey:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens, req.extra_key)

    def like(self, key: RadixKey, tokens: Sequence[int]) -> RadixKey:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens, key.extra_key)

    def namespace(self, owner: Req | RadixKey) -> str:
        """A salt is part of `extra_key` here."""
        return repr(owner.extra_key)

    def idle(self, scheduler: Any) -> bool:
        return scheduler.is_fully_idle()

    def ranks(self, scheduler: Any) -> tuple[int, int]:
        return scheduler.ps.tp_rank, scheduler.ps.dp_rank or 0


def _tree_class() -> type:
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from sglang_vtensor.srt.radix_cache import PagedInsertParams, PagedRadixCache

    def length(tokens: int) -> torch.Tensor:
        """What stands for slots where SGLang reads only how many there are."""
        return torch.zeros(1, dtype=torch.int64).expand(tokens)

    class Tree(PagedRadixCache):
        @staticmethod
        def matched(result: MatchResult) -> int:
            return len(result.device_indices)

        @staticmethod
        def longer(result: MatchResult, tokens: int) -> MatchResult:
            matched = len(result.device_indices)
            return result._replace(device_indices=length(matched + tokens), cache_protected_len=matched)

        def insertion(self, req: Req, key: RadixKey, value: torch.Tensor, frames: list[int]) -> PagedInsertParams:
            return PagedInsertParams(
                key=key, value=value, chunked=self._chunked, priority=req.priority or 0, frames=frames
            )

        def hold(self, req: Req, leaf: TreeNode, tokens: int) -> None:
            self.dec_lock_ref(req.last_node)
            self.inc_lock_ref(leaf)
            req.last_node, req.cache_protected_len = leaf, tokens

        def tell_removed(self, leaf: TreeNode) -> None:
            self._record_remove_event(leaf)

        _chunked = False

        def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
            tokens = req.get_fill_ids()
            if not self.disable:
                self._chunked = chunked
                self.advance(req, tokens, over=False)
                self._chunked = False
            # The next chunk starts behind all of its tokens, those of the last, unfilled page included.
            req.prefix_indices = length(len(tokens))

        def cache_finished_req(self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
            kept = is_insert and not self.disable and not self.disable_finished_insert
            if kept:
                self.advance(req, (req.origin_input_ids + req.output_ids)[:kv_len_to_handle], over=True)
            self.end_request(req, kv_len_to_handle, kept=kept)
            # All of its pages are given back: SGLang is to free none behind its last token.
            req.kv.kv_allocated_len = kv_len_to_handle
            if req.last_node is not None:
                self.dec_lock_ref(req.last_node)

    return Tree


# Admission.


def _init_adder(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Admission counts without the memory that the driver refuses."""
    original(self, *args, **kwargs)
    missing = self.token_to_kv_pool_allocator.runtime.missing_tokens()
    self.rem_total_token_offset += missing
    self.cur_rem_token_offset += missing


def _add_one_req(original: Callable[..., Any], self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    from sglang_vtensor.srt.scheduling import passes_over

    return AddReqResult.CONTINUE if passes_over(self, req) else original(self, req, *args, **kwargs)


def _update_prefill_budget(
    original: Callable[..., None], self: Any, prefix_len: int, extend_input_len: int, *args: Any, **kwargs: Any
) -> None:
    """An extend batch may have as many tokens as it may have, not as many pages: what its requests leave free in their
    last pages is memory, but no work. With pages of 128 tokens, prompts of 1,025 made batches a tenth too short."""
    original(self, prefix_len, extend_input_len, *args, **kwargs)
    last = self.can_run_list[-1]
    if self.dllm_config is not None or last is self.new_chunked_req:
        return  # one request of a batch may be cut: what is counted of it leaves no room for another
    free = self.ceil_paged_tokens(extend_input_len) - last.extend_range.length
    self.rem_input_tokens += free
    self.log_input_tokens -= free
    if self.rem_chunk_tokens is not None:
        self.rem_chunk_tokens += free


def _check_decode_mem(batch: Any, selected_indices: list[int] | None = None) -> bool:
    from sglang_vtensor.srt.allocation import secure_decode

    reqs = batch.reqs if selected_indices is None else [batch.reqs[i] for i in selected_indices]
    return secure_decode(batch.token_to_kv_pool_allocator.runtime, batch.tree_cache, reqs)


def _retract_decode(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang_vtensor.srt.scheduling import spare

    retracted, ratio, aborted = original(self, *args, **kwargs)
    spare(self.token_to_kv_pool_allocator.runtime, retracted, aborted, may_wait=lambda req: True)
    return retracted, ratio, aborted


# Decode: batches that share are done by a backend around SGLang's own, and have graphs of their own.


def _capture_both(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Each size twice: for SGLang's own decode, and for shared decode where that has room for so many requests."""
    original(self, *args, **kwargs)
    backend = shared_decode(self)
    if backend is not None:
        sizes = self.capture_bs
        self.capture_bs = [size for size in sizes if backend.has_room_for(size)]
        backend.capturing = True
        try:
            original(self, *args, **kwargs)
        finally:
            backend.capturing = False
            self.capture_bs = sizes


def _label_graph_key(
    original: Callable[..., Any], self: Any, size: int, stream_idx: int | None = None, variant_label: str | None = None
) -> Any:
    """The key says by which decode the batch at hand is done; its metadata was made before."""
    backend = shared_decode(self)
    if backend is not None and backend.shared:
        variant_label = f"{variant_label}-{VARIANT}" if variant_label else VARIANT
    return original(self, size, stream_idx, variant_label)


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """SGLang's small indexing kernels have torch twins for backends that run without Triton."""
    from sglang_vtensor.srt.options import ATTENTION_BACKEND

    return backend != ATTENTION_BACKEND and original(backend)


class Patch0517(Patch):
    requests = Requests()

    def settings(self, server_args: ServerArgs) -> Any:
        return server_args

    def model(self, server_args: ServerArgs) -> Any:
        return server_args.get_model_config()

    def uses_mla(self, server_args: ServerArgs) -> bool:
        return server_args.use_mla_backend()

    def attn_tp_size(self, server_args: ServerArgs) -> int:
        return server_args.tp_size // (server_args.dp_size if server_args.enable_dp_attention else 1)

    def refused(self, server_args: ServerArgs) -> list[Refusal]:
        from sglang_vtensor.srt.windows import windows_of

        windows = any(window is not None for window in windows_of(self.model(server_args)))
        return [("models whose layers see a window with this version of SGLang", windows, "it takes 0.5.23")]

    def tree_class(self) -> type:
        return _tree_class()

    def allocator_class(self) -> type:
        from sglang_vtensor.srt.allocator import VTensorAllocator

        return VTensorAllocator

    def make(self, **given: Any) -> ServerArgs:
        """A `ServerArgs` by what a program gave, our options among it."""
        from sglang.srt.server_args import ServerArgs

        return ServerArgs(**given)

    def from_cli_args(self, original: Callable[..., ServerArgs], cls: type, args: argparse.Namespace) -> ServerArgs:
        from sglang_vtensor.srt.options import Options

        token = _parsed.set(None)
        try:
            with self.one_line():
                _parsed.set(Options.parsed(args))
                return original(cls, args)
        finally:
            _parsed.reset(token)

    def _init_server_args(
        self, original: Callable[..., None], server_args: ServerArgs, *args: Any, **kwargs: Any
    ) -> None:
        from sglang_vtensor.srt.attention_choice import choose_attention
        from sglang_vtensor.srt.options import Options

        options = self.take_options(kwargs) or _parsed.get() or Options()
        kwargs.update(choose_attention(kwargs, options))
        options.attach(server_args)
        original(server_args, *args, **kwargs)

    def _choose_page_size(self, server_args: ServerArgs) -> None:
        from sglang_vtensor.srt.attention_choice import choose_decode

        page_size = self.page_size(server_args)
        if page_size is not None:
            server_args.page_size = page_size
            for name, value in choose_decode(server_args, self.model(server_args)).items():
                setattr(server_args, name, value)

    def everywhere(self) -> list[Seam]:
        return [
            *super().everywhere(),
            Seam(f"{SERVER_ARGS}.__init__", self._init_server_args),
            Seam(f"{SERVER_ARGS}._handle_model_specific_adjustments", self._choose_page_size, HookType.BEFORE),
        ]

    def in_schedulers(self) -> list[Seam]:
        from sglang_vtensor.srt.allocation import alloc_for_decode

        return [
            *super().in_schedulers(),
            Seam("sglang.srt.mem_cache.registry.default_radix_cache_factory", self.build_tree, HookType.REPLACE),
            Seam("sglang.srt.mem_cache.allocation.alloc_for_decode", alloc_for_decode, HookType.REPLACE),
            Seam(f"{_BATCH}.check_decode_mem", _check_decode_mem, HookType.REPLACE),
            Seam(f"{_BATCH}.retract_decode", _retract_decode),
            Seam(f"{_ADDER}.__init__", _init_adder),
            Seam(f"{_ADDER}.add_one_req", _add_one_req),
            Seam(f"{_ADDER}._update_prefill_budget", _update_prefill_budget),
        ]

    def for_shared_decode(self) -> list[Seam]:
        return [
            *super().for_shared_decode(),
            Seam(f"{_GRAPHS}._capture_one_stream", _capture_both),
            Seam(f"{_GRAPHS}._make_graph_key", _label_graph_key),
        ]

    def on_the_host(self) -> list[Seam]:
        return [Seam("sglang.srt.utils.common.support_triton", _support_triton)]


PATCH = Patch0517()
