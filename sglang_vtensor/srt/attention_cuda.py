"""Extend on an NVIDIA GPU: FlashAttention-3 over segments.

A layer's K of all segments is one tensor `(segments, max_tokens, kv_heads, head_dim)`, and a request is one row of it:
FlashAttention-3 takes the row numbers as `cache_batch_idx` and needs no page table. Decode stays with SGLang's own
kernel, by slot over the identity region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_vtensor.srt.runtime import Runtime

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(slots=True)
class _Metadata:
    """Of one forward pass; int32 on the device."""

    segments: torch.Tensor  # (requests,)
    contexts: torch.Tensor  # (requests,) tokens
    starts: torch.Tensor  # (requests + 1,) first row of each request's new tokens
    longest_new: int
    longest_context: int


class SegmentPrefillBackend(AttentionBackend):
    """The prefill half of SGLang's hybrid attention backend."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache
        self.pool = runner.token_to_kv_pool
        self.runtime: Runtime = self.pool.runtime
        self.runtime.extend_reads_segments = True
        self.segments = [self.runtime.memory.segment_views(layer) for layer in range(self.pool.layer_num)]
        self.max_tokens = self.segments[0][0].shape[1]
        self.tile = self.runtime.memory.vmm.tile_tokens
        self.metadata: _Metadata | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        new = forward_batch.extend_seq_lens
        longest_new = max(forward_batch.extend_seq_lens_cpu)
        prefixes = forward_batch.extend_prefix_lens_cpu
        contexts = [int(a) + int(b) for a, b in zip(prefixes, forward_batch.extend_seq_lens_cpu, strict=True)]
        # Whole tiles, so that the kernel's choice of splits follows the batch and not the segment's length.
        longest = -(-max(contexts) // self.tile) * self.tile
        self.metadata = _Metadata(
            segments=self.runtime.device_segments(forward_batch.req_pool_indices),
            contexts=forward_batch.seq_lens.to(torch.int32),
            starts=torch.nn.functional.pad(torch.cumsum(new, 0, dtype=torch.int32), (1, 0)),
            longest_new=int(longest_new),
            longest_context=min(longest, self.max_tokens),
        )

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
        metadata = self.metadata
        assert metadata is not None
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale)
        keys, values = self.segments[layer.layer_id - self.pool.start_layer]
        heads, dim = layer.tp_q_head_num, layer.head_dim
        out = getattr(forward_batch, "_attn_output", None)
        extra = {} if sinks is None else {"sinks": sinks}
        result = self._attend(
            q=q.contiguous().view(-1, heads, dim),
            k_cache=keys[:, : metadata.longest_context],
            v_cache=values[:, : metadata.longest_context],
            cache_seqlens=metadata.contexts,
            cache_batch_idx=metadata.segments,
            cu_seqlens_q=metadata.starts,
            max_seqlen_q=metadata.longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            softcap=layer.logit_cap,
            out=None if out is None else out.view(-1, heads, layer.v_head_dim),
            **extra,
        )
        return result.view(-1, heads * layer.v_head_dim)
