"""Extend on an NVIDIA GPU: attention over segments, by FlashAttention-3 or by our Triton kernel.

A layer's K of all segments is one tensor `(segments, max_tokens, kv_heads, head_dim)`, and a request is one row of it.
FlashAttention-3 takes the row numbers as `cache_batch_idx`; our kernel, the tensor without the first dimension and
where in it each context begins. Neither needs a page table. A batch that would have to wait for its segments is read
by pages, in the identity region, by FlashAttention-3: where pages are whole tiles, as here, that is about as fast.
Decode is in `shared_decode.py`, and where that does not pay SGLang's own, by slot over the identity region.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_vtensor.kernels.configs import ours_before_fa3, segments_pay
from sglang_vtensor.kernels.launch import DIMS
from sglang_vtensor.kernels.prefix_prefill import Plan, compile_prefill, plan_prefill, prefix_prefill
from sglang_vtensor.srt.options import Options, Refused
from sglang_vtensor.srt.runtime import Runtime

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class SegmentPrefillBackend(AttentionBackend):
    """The prefill half of SGLang's hybrid attention backend: writes K and V by slot, and reads segments."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.runtime: Runtime = self.pool.runtime
        self.runtime.extend_reads_segments = True
        self.segments = [self.runtime.memory.segment_views(layer) for layer in range(self.pool.layer_num)]
        self.max_tokens = self.segments[0][0].shape[1]

    @classmethod
    def choose(cls, runner: ModelRunner) -> SegmentPrefillBackend:
        """The kernel that the user named; else ours, or the faster one where FlashAttention-3 runs too (sm_90)."""
        kernel = Options.of(runner.server_args).vtensor_prefill_kernel
        hopper = torch.cuda.get_device_capability(runner.device) == (9, 0)
        if kernel == "fa3" or (kernel == "auto" and hopper and runner.model_config.head_dim not in DIMS):
            return FlashAttention3(runner)
        return Fastest(runner) if kernel == "auto" and hopper else TritonPrefill(runner)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale)
        heads, dim = layer.tp_q_head_num, layer.head_dim
        out = getattr(forward_batch, "_attn_output", None)
        keys, values = self.segments[layer.layer_id - self.pool.start_layer]
        result = self.attend(
            q.contiguous().view(-1, heads, dim),
            keys,
            values,
            layer,
            sinks,
            None if out is None else out.view(-1, heads, layer.v_head_dim),
        )
        return result.view(-1, heads * layer.v_head_dim)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(rows, heads, dim)` of the batch that `init_forward_metadata` was told of, over one layer's segments."""
        raise NotImplementedError


@dataclass(slots=True)
class _Metadata:
    """Of one forward pass; int32 on the device."""

    segments: torch.Tensor | None  # (requests,)
    pages: torch.Tensor | None  # (requests, most pages); these or the segments are read
    contexts: torch.Tensor  # (requests,) tokens
    starts: torch.Tensor  # (requests + 1,) first row of each request's new tokens
    longest_new: int
    longest_context: int


class FlashAttention3(SegmentPrefillBackend):
    """SGLang's FlashAttention-3, on rows instead of pages; or on pages, where `Runtime.by_pages` says so."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache
        self.tile = self.runtime.memory.vmm.tile_tokens
        self.runtime.extend_reads_pages = True
        self.runtime.segments_pay = segments_pay
        self.page_tokens = tokens = self.runtime.page_tokens
        layers = [self.runtime.memory.identity_views(layer) for layer in range(self.pool.layer_num)]
        self.pages = [tuple(x.unflatten(0, (-1, tokens)) for x in layer) for layer in layers]
        self.slots = runner.req_to_token_pool.req_to_token
        self.metadata: _Metadata | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        new = forward_batch.extend_seq_lens
        longest_new = max(forward_batch.extend_seq_lens_cpu)
        # Whole tiles, so that the kernel's choice of splits follows the batch and not the segment's length.
        longest = -(-max(_contexts(forward_batch)) // self.tile) * self.tile
        segments = pages = None
        if self.runtime.by_pages:
            pages = self.slots[forward_batch.req_pool_indices, : longest : self.page_tokens] // self.page_tokens
        else:
            segments = self.runtime.device_segments(forward_batch.req_pool_indices)
        self.metadata = _Metadata(
            segments=segments,
            pages=pages,
            contexts=forward_batch.seq_lens.to(torch.int32),
            starts=torch.nn.functional.pad(torch.cumsum(new, 0, dtype=torch.int32), (1, 0)),
            longest_new=int(longest_new),
            longest_context=min(longest, self.max_tokens),
        )

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        metadata = self.metadata
        assert metadata is not None
        extra: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
        if metadata.pages is None:
            keys, values = (x[:, : metadata.longest_context] for x in (keys, values))
            extra["cache_batch_idx"] = metadata.segments
        else:
            keys, values = self.pages[layer.layer_id - self.pool.start_layer]
            extra["page_table"] = metadata.pages
        return self._attend(
            q=q,
            k_cache=keys,
            v_cache=values,
            cache_seqlens=metadata.contexts,
            cu_seqlens_q=metadata.starts,
            max_seqlen_q=metadata.longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            softcap=layer.logit_cap,
            out=out,
            **extra,
        )


class TritonPrefill(SegmentPrefillBackend):
    """Our prefix-prefill kernel. What it may need is compiled here, and nothing while serving."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        dim = self.segments[0][0].shape[3]
        if dim not in DIMS:
            raise Refused(
                f"the prefix-prefill kernel takes head dimensions {', '.join(map(str, DIMS))}, not this model's {dim}: "
                "use --attention-backend flashinfer, which reads pages by slot"
            )
        self.q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        self.plan: Plan | None = None
        self.first: torch.Tensor | None = None
        start = time.perf_counter()
        keys, values = (x.flatten(0, 1) for x in self.segments[0])
        padding = int(self.runtime.segment_of[0]) * self.max_tokens  # every address of it may be read
        self.readable = self.runtime.memory.vmm.tile_tokens  # pages are whole tiles
        for done, of in compile_prefill(
            keys, values, padding, q_heads=self.q_heads, max_tokens=self.max_tokens, readable=self.readable
        ):
            logger.info("prefix-prefill kernel: %d of %d shapes compiled", done, of)
        torch.cuda.synchronize()
        logger.info("prefix-prefill kernel: ready after %.1f s", time.perf_counter() - start)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        kv_heads, dim = self.segments[0][0].shape[2:]
        self.plan = plan_prefill(
            forward_batch.extend_seq_lens_cpu,
            _contexts(forward_batch),
            q_heads=self.q_heads,
            kv_heads=kv_heads,
            head_dim=dim,
            device=self.segments[0][0].device,
            readable=self.readable,
        )
        segments = self.runtime.device_segments(forward_batch.req_pool_indices)
        self.first = segments.to(torch.int64) * self.max_tokens

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self.plan is not None
        assert self.first is not None
        # A captured batch is padded: rows behind those of the plan belong to no request.
        rows = self.plan.rows
        out = torch.empty_like(q) if out is None else out
        prefix_prefill(
            q[:rows],
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self.first,
            self.plan,
            scale=layer.scaling,
            out=out[:rows],
            soft_cap=layer.logit_cap,
            sinks=sinks,
        )
        return out


class Fastest(SegmentPrefillBackend):
    """FlashAttention-3 or our kernel, whichever is the faster for a batch by the measured table."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.fa3 = FlashAttention3(runner)
        self.ours = TritonPrefill(runner)
        self.chosen: SegmentPrefillBackend = self.fa3
        self.runtime.segments_pay = lambda new, contexts: self._ours(new, contexts) or segments_pay(new, contexts)

    def _ours(self, new: Sequence[int], contexts: Sequence[int]) -> bool:
        keys = self.segments[0][0]
        return ours_before_fa3(new, contexts, self.ours.q_heads, keys.shape[2], keys.shape[3], str(keys.device))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        ours = not self.runtime.by_pages and self._ours(forward_batch.extend_seq_lens_cpu, _contexts(forward_batch))
        self.chosen = self.ours if ours else self.fa3
        self.chosen.init_forward_metadata(forward_batch)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.chosen.forward_extend(*args, **kwargs)


def _contexts(forward_batch: ForwardBatch) -> list[int]:
    """Tokens of each request, the new ones included, as the host knows them."""
    prefixes, new = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    return [int(a) + int(b) for a, b in zip(prefixes, new, strict=True)]
