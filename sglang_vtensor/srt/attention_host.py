"""Attention on the host backend: torch's scaled dot product over the runs of a context, without a copy of K or V;
FP8 is converted, one run at a time.

Shapes: q `(tokens, q_heads, head_dim)`; a run's K and V `(tokens of the run, kv_heads, head_dim)` at the token stride.
The query heads that share a KV head are a dimension of their own:

    q  (kv_heads, group, new, head_dim)
    k  (kv_heads, run, head_dim)            strides (head_dim, token, 1)
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
    """One request of a batch: its new tokens are rows `[first, first + new)`, its context is in `runs`."""

    runs: list[slice]
    first: int
    new: int
    context: int
    mask: torch.Tensor | None

    def behind(self, window: int, page: int) -> _Work:
        """For a layer that sees so many tokens before each: without the pages that no token sees."""
        gone = max(0, self.context - self.new - window) // page * page
        runs, at = [], 0
        for run in self.runs:
            end = at + run.stop - run.start
            if end > gone:
                runs.append(slice(run.start + max(0, gone - at), run.stop))
            at = end
        context = self.context - gone
        mask = _causal_mask(self.new, context).triu(context - self.new - window)
        return _Work(runs, self.first, self.new, context, mask)


class HostAttentionBackend(AttentionBackend):
    """Reads the runs of every request's context, in extend and in decode."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        # Models ask an attention backend for these, and SGLang's backend of linear attention does.
        self.pool = self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.kv_index_translator = getattr(runner, "kv_index_translator", None)  # newer versions have it
        self.runtime: Runtime = self.pool.runtime
        self.work: list[_Work] = []

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        contexts = forward_batch.seq_lens.tolist()
        new = [1] * len(contexts)
        if not forward_batch.forward_mode.is_decode():
            new = forward_batch.extend_seq_lens.tolist()
        self.work, first = [], 0
        for slot, count, context in zip(forward_batch.req_pool_indices.tolist(), new, contexts, strict=True):
            mask = None if count in (1, context) else _causal_mask(count, context)
            runs = [slice(start, start + tokens) for start, tokens in self.runtime.runs(slot, context)]
            self.work.append(_Work(runs, first, count, context, mask))
            first += count

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
        group = layer.tp_q_head_num // layer.tp_k_head_num
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        k_scale, v_scale = self.pool.scales(layer, q.dtype) or (1.0, 1.0)
        rows = q.reshape(-1, layer.tp_k_head_num, group, layer.qk_head_dim)
        out = torch.empty_like(rows)
        # SGLang's window is exclusive: so many tokens before one, beside itself, are seen.
        window = layer.sliding_window_size or -1
        page = self.runtime.page_tokens
        for work in [work.behind(window, page) for work in self.work] if window > 0 else self.work:
            tokens = slice(work.first, work.first + work.new)
            k_runs, v_runs = ([x[run].to(q.dtype).transpose(0, 1) for run in work.runs] for x in (keys, values))
            causal = work.mask is None and work.new == work.context > 1
            scale = layer.scaling * float(k_scale)
            result = _attend(rows[tokens].permute(1, 2, 0, 3), k_runs, v_runs, work.mask, causal, scale, sinks)
            out[tokens] = result.permute(2, 0, 1, 3) * v_scale
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # A decode step is an extend of one token.
    forward_decode = forward_extend


def _attend(
    q: torch.Tensor,
    k_runs: list[torch.Tensor],
    v_runs: list[torch.Tensor],
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over the runs as over one tensor: scores of all of them have one softmax. `q` is
    `(kv_heads, group, new, head_dim)`, a run's `k` and `v` `(kv_heads, run, head_dim)`. `sinks`, one a query head, are
    scores that take weight and give no value."""
    kv_heads, group, new, dim = q.shape
    if len(k_runs) == 1 and sinks is None:
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k_runs[0], v_runs[0]))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    # The heads that share a KV head are rows of one product, so that nothing of K and V is copied.
    rows = q.reshape(kv_heads, group * new, dim).float() * scale
    scores = torch.cat([rows @ k.float().transpose(1, 2) for k in k_runs], dim=-1)
    if causal:
        mask = _causal_mask(new, new)
    if mask is not None:
        scores.unflatten(1, (group, new)).masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        of_rows = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, new, 1).reshape(kv_heads, group * new, 1)
        scores = torch.cat([scores, of_rows], dim=-1)
    weights_of_all = scores.softmax(-1)[..., : sum(k.shape[1] for k in k_runs)]
    out = torch.zeros_like(rows)
    for weights, v in zip(weights_of_all.split([k.shape[1] for k in k_runs], dim=-1), v_runs, strict=True):
        out = torch.baddbmm(out, weights, v.float())
    return out.view(q.shape).to(q.dtype)


def _causal_mask(new: int, context: int) -> torch.Tensor:
    """`(new, context)`: the last row sees all of the context, each row before it one token less."""
    return torch.ones(new, context, dtype=torch.bool).tril(context - new)
