"""Other people's attention kernels, as they are called by SGLang: each a `layer -> out` over the same tokens as ours.

`case` has a batch (`benchmarks.kernels`): its queries `(new tokens, q_heads, dim)`, and K and V of several layers on
pages, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.kernels import Case, Paged, SharedCase

Call = Callable[[int], torch.Tensor]


def fa3(case: Case | Paged, page: int) -> Call:
    """FlashAttention-3 as SGLang calls it, on pages of that size."""
    return fa3_on(case, *case.paged(page))


def fa3_on(case: Case | Paged, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> Call:
    """FlashAttention-3 on K and V `(layers, pages, page, kv_heads, dim)`, by a page table. Over FP8 it takes queries of
    that type too; that SGLang makes them so in each layer is left out."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    longest, q = max(case.new), case.q.to(k.dtype)
    return lambda layer: flash_attn_with_kvcache(
        q=q,
        k_cache=k[layer],
        v_cache=v[layer],
        page_table=table,
        cache_seqlens=case.context_lens,
        cu_seqlens_q=case.starts,
        max_seqlen_q=longest,
        softmax_scale=case.scale,
        causal=True,
    )


def sglang_triton(case: Case, decode: bool, page: int) -> Call:
    """SGLang's own Triton kernels, with its own choice of splits."""
    k, v, table = case.paged(page)
    k, v = (x.view(case.rotation, -1, case.kv_heads, case.dim) for x in (k, v))
    prefixes = [prefix for prefix, _ in case.shape]
    lengths = case.contexts if decode else prefixes
    pages = [table[i, : -(-length // page)].long() for i, length in enumerate(case.contexts)]
    slots = [(p[:, None] * page + torch.arange(page, device="cuda")).view(-1) for p in pages]
    kv_starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    indices = torch.cat([s[:length] for s, length in zip(slots, lengths, strict=True)])
    if decode:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        requests, most = len(lengths), 8
        splits = torch.empty(requests, dtype=torch.int32, device="cuda")
        get_num_kv_splits_triton[(1,)](
            splits,
            case.context_lens,
            requests,
            1,
            case.q_heads,
            case.kv_heads,
            most,
            torch.cuda.get_device_properties(0).multi_processor_count,
            MAX_NUM_SEQ=256,
        )
        partial = torch.empty(requests, case.q_heads, most, case.dim, dtype=torch.float32, device="cuda")
        lse = torch.empty(requests, case.q_heads, most, dtype=torch.float32, device="cuda")
        out = torch.empty_like(case.q)

        def step(layer: int) -> torch.Tensor:
            decode_attention_fwd(
                case.q, k[layer], v[layer], out, kv_starts, indices, partial, lse, splits, most, case.scale, 1.0, 1.0
            )
            return out

        return step
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    fresh = torch.cat([s[p:c] for s, p, c in zip(slots, prefixes, case.contexts, strict=True)])
    new_k, new_v = k[:, fresh].contiguous(), v[:, fresh].contiguous()
    out = torch.empty_like(case.q)
    longest = max(case.new)

    def extend(layer: int) -> torch.Tensor:
        extend_attention_fwd(
            case.q,
            new_k[layer],
            new_v[layer],
            out,
            k[layer],
            v[layer],
            case.starts,
            kv_starts,
            indices,
            None,
            True,
            None,
            longest,
            1.0,
            1.0,
            case.scale,
        )
        return out

    return extend


def flashinfer_decode(case: Case) -> Call:
    """FlashInfer's decode, on pages of one token. Compiles on first use, as the others below."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    k, v, table = case.paged(1)
    starts, pages, last = _pages(table, case.contexts)
    tensor_cores = case.q_heads // case.kv_heads >= 4
    step = BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2", use_tensor_cores=tensor_cores)
    step.plan(starts, pages, last, case.q_heads, case.kv_heads, case.dim, 1, **_types(case))
    return lambda layer: step.run(case.q, (k[layer], v[layer]))


def flashinfer_paged(case: Case) -> Call:
    """FlashInfer's prefill, all of it on pages of one token: what SGLang calls in a graph."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    k, v, table = case.paged(1)
    paged = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    heads = (case.q_heads, case.kv_heads, case.dim)
    paged.plan(case.starts, *_pages(table, case.contexts), *heads, 1, causal=True, **_types(case))
    return lambda layer: paged.run(case.q, (k[layer], v[layer]))


def flashinfer_ragged(case: Case) -> Call:
    """FlashInfer's prefill as SGLang calls it: new tokens from contiguous K and V, by the backend that FlashInfer
    chooses; the prefix, if any, from pages of one token; then both are merged."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper, merge_state

    k, v, table = case.paged(1)
    prefixes = [prefix for prefix, _ in case.shape]
    each = zip(table, prefixes, case.contexts, strict=True)
    fresh = torch.cat([row[prefix:context] for row, prefix, context in each]).long()
    new_k, new_v = (x[:, fresh].squeeze(2).contiguous() for x in (k, v))
    heads = (case.q_heads, case.kv_heads, case.dim)
    ragged = BatchPrefillWithRaggedKVCacheWrapper(_workspace(), "NHD", backend="auto")
    ragged.plan(case.starts, case.starts, *heads, causal=True, **_types(case))
    if not any(prefixes):
        return lambda layer: ragged.run(case.q, new_k[layer], new_v[layer])
    paged = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    paged.plan(case.starts, *_pages(table, prefixes), *heads, 1, causal=False, **_types(case))

    def call(layer: int) -> torch.Tensor:
        new = ragged.run(case.q, new_k[layer], new_v[layer], return_lse=True)
        old = paged.run(case.q, (k[layer], v[layer]), return_lse=True)
        return merge_state(*new, *old)[0]

    return call


def flashinfer_cascade(case: SharedCase, page: int, backend: str = "auto") -> Call:
    """FlashInfer's `MultiLevelCascadeAttentionWrapper`, on pages of that size: what all requests share, what each group
    shares and what each request has of its own are levels, of which those without tokens are left out.

    For "auto" FlashInfer chooses, and takes fa3 on Hopper. That kernel does not divide a level's tokens, nor does it
    pack the query heads of a KV head, as fa2 does."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, MultiLevelCascadeAttentionWrapper

    k, v, table = case.paged(page)
    workspace = _workspace()
    cascade = MultiLevelCascadeAttentionWrapper(len(case.levels), workspace, "NHD")
    # It has no argument for this. Levels run one after the other, so they have one workspace, as it gives them.
    cascade._batch_prefill_wrappers[:] = [
        BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend) for _ in case.levels
    ]
    levels = cascade_levels(table, case.levels, page)
    cascade.plan(*levels, case.q_heads, case.kv_heads, case.dim, page, **_types(case))
    return lambda layer: cascade.run(case.q, (k[layer], v[layer]))


def cascade_levels(
    table: torch.Tensor, levels: list[tuple[int, int, int]], page: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """FlashInfer's account of each level: where each group's queries begin, where its pages begin, which they are, and
    the tokens in its last one; int32. `table` `(requests, pages)` has each request's pages; a level is how many
    requests share, and from which token to which, whole pages."""
    queries, starts, pages, last = [], [], [], []
    device = table.device
    for group, first, end in levels:
        rows = table[::group, first // page : end // page]
        queries.append(torch.arange(0, len(table) + 1, group, dtype=torch.int32, device=device))
        starts.append(torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32, device=device))
        pages.append(rows.flatten())
        last.append(torch.full((len(rows),), page, dtype=torch.int32, device=device))
    return queries, starts, pages, last


def _workspace() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def _types(case: Case | Paged) -> dict[str, Any]:
    return {"sm_scale": case.scale, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


def _pages(table: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's account of pages of one token, so many for each request: where each request's begin `(requests +
    1,)`, which they are, and the tokens in each one's last page. A request without a page has none there."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    pages = torch.cat([row[:length] for row, length in zip(table, lengths, strict=True)])
    return starts, pages, torch.tensor([min(1, length) for length in lengths], dtype=torch.int32, device="cuda")
