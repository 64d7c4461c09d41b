"""Store the K and V of new tokens into their slots.

k, v     (tokens, kv_heads, head_dim), any token stride, heads and elements contiguous
slots    (tokens,) int64
k_cache  (slots, kv_heads, head_dim), any constant token stride (token-major over all layers included)

One program a token and a block of its row: K and V of a row are `kv_heads * head_dim` elements each, and a program
copies the same block of both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _store_kv(  # type: ignore[no-untyped-def]
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_stride,
    v_stride,
    cache_stride,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < ROW
    slot = tl.load(slots + token).to(tl.int64)
    key = tl.load(k + token * k_stride + columns, mask=mask)
    value = tl.load(v + token * v_stride + columns, mask=mask)
    tl.store(k_cache + slot * cache_stride + columns, key, mask=mask)
    tl.store(v_cache + slot * cache_stride + columns, value, mask=mask)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write `k[i]` and `v[i]` to `k_cache[slots[i]]` and `v_cache[slots[i]]`. Shapes and strides as above.

    Raises `ValueError` for shapes, dtypes or strides that do not fit. Two equal slots leave either token's bytes.
    """
    tokens, heads, dim = k.shape
    row = heads * dim
    if v.shape != k.shape or k_cache.shape[1:] != (heads, dim) or v_cache.shape != k_cache.shape:
        raise ValueError(f"k {k.shape}, v {v.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape} do not fit")
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"one dtype wanted, got {k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if slots.shape != (tokens,) or slots.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"slots are ({tokens},) int64 or int32, got {tuple(slots.shape)} {slots.dtype}")
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.stride()[1:] != (dim, 1):
            raise ValueError(f"{name} has strides {tensor.stride()}: heads and elements must be contiguous")
    if k_cache.stride(0) != v_cache.stride(0):
        raise ValueError(
            f"K and V tokens lie {k_cache.stride(0)} and {v_cache.stride(0)} elements apart: one stride wanted"
        )
    if not tokens:
        return
    block = min(1024, triton.next_power_of_2(row))
    _store_kv[(tokens, triton.cdiv(row, block))](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        ROW=row,
        BLOCK=block,
        num_warps=4,
    )
