"""Attention on the host backend: torch's scaled dot product over segment views, without a copy of K or V.

Shapes: q `(tokens, q_heads, head_dim)`; a segment's K and V `(context, kv_heads, head_dim)` at the token stride. The
query heads that share a KV head are a dimension of their own, over which K and V have stride 0:

    q  (kv_heads, group, new,     head_dim)
    k  (kv_heads, group, context, head_dim)     strides (head_dim, 0, token, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from sglang_vtensor.srt.runtime import Runtime

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(slots=True)
class _Work:
    """One request of a batch: its new tokens are rows `[first, first + new)`, its context the segment's start; or what
    is at `slots`."""

    segment: int
    slots: torch.Tensor | None
    first: int
    new: int
    context: int
    mask: torch.Tensor | None


class HostAttentionBackend(AttentionBackend):
    """Reads every request's context from its segment, in extend and in decode; or by slot, with a copy, as a GPU's
    kernels read pages: in extend where `Runtime.by_pages` says so, in decode without `decode_reads_segments`."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.runtime: Runtime = self.pool.runtime
        self.runtime.extend_reads_segments = True
        self.runtime.decode_reads_segments = True
        self.runtime.extend_reads_pages = True
        self.runtime.segments_pay = lambda new, contexts: True  # pages are copied first, here
        self.table = runner.req_to_token_pool.req_to_token
        self.segments = [self.runtime.memory.segment_views(layer) for layer in range(self.pool.layer_num)]
        self.slots = [self.runtime.memory.identity_views(layer) for layer in range(self.pool.layer_num)]
        self.work: list[_Work] = []

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        segments = self.runtime.segment_of[forward_batch.req_pool_indices.numpy()].tolist()
        contexts = forward_batch.seq_lens.tolist()
        new = [1] * len(contexts)
        by_slot = not self.runtime.decode_reads_segments
        if not forward_batch.forward_mode.is_decode():
            new = forward_batch.extend_seq_lens.tolist()
            by_slot = self.runtime.by_pages
        self.work, first = [], 0
        requests = forward_batch.req_pool_indices.tolist()
        for request, segment, count, context in zip(requests, segments, new, contexts, strict=True):
            mask = None if count in (1, context) else _causal_mask(count, context)
            slots = self.table[request, :context].to(torch.int64) if by_slot else None
            self.work.append(_Work(segment, slots, first, count, context, mask))
            first += count

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        group = layer.tp_q_head_num // layer.tp_k_head_num
        keys, values = self.segments[layer.layer_id - self.pool.start_layer]
        rows = q.reshape(-1, layer.tp_k_head_num, group, layer.qk_head_dim)
        out = torch.empty_like(rows)
        by_slot = self.slots[layer.layer_id - self.pool.start_layer]
        for work in self.work:
            tokens = slice(work.first, work.first + work.new)
            if work.slots is None:
                k, v = (x[work.segment, : work.context] for x in (keys, values))
            else:
                k, v = (x[work.slots] for x in by_slot)
            result = scaled_dot_product_attention(
                rows[tokens].permute(1, 2, 0, 3),
                _heads_first(k, group),
                _heads_first(v, group),
                attn_mask=work.mask,
                is_causal=work.new == work.context > 1,
                scale=layer.scaling,
            )
            out[tokens] = result.permute(2, 0, 1, 3)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # A decode step is an extend of one token: the same tokens, the same segments.
    forward_decode = forward_extend


def _heads_first(x: torch.Tensor, group: int) -> torch.Tensor:
    """`(context, kv_heads, dim)` as `(kv_heads, group, context, dim)`, without a copy."""
    return x.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)


def _causal_mask(new: int, context: int) -> torch.Tensor:
    """`(new, context)`: the last row sees all of the context, each row before it one token less."""
    return torch.ones(new, context, dtype=torch.bool).tril(context - new)
