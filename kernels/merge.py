"""Prefill, the merge: the parts of one tile, which `attend` left with their log-sum-exps, become one result."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vtensor.kernels.attend import (
    _LOG2E,
    MERGE_FIELDS,
    MERGE_NEW,
    MERGE_PART,
    MERGE_PARTS,
    MERGE_ROW,
    MERGE_TILE,
    _inside,
)


@triton.jit
def _put_together(highest, total, acc, lse, out):
    """Add partial results, the first dimension of `lse` and `out`, to the maximum, the total and the result of rows."""
    new_highest = tl.maximum(highest, tl.max(lse, 0))
    finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    decay = tl.exp2(highest - finite)
    weights = tl.exp2(lse - finite[None, :])
    total = total * decay + tl.sum(weights, 0)
    acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * out, 0)
    return new_highest, total, acc


@triton.jit
def _merge(
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    merge_ptr,
    stride_out_token,
    stride_out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Put the parts of one tile together: BLOCK_R of its rows a program, PARTS of its parts at a time."""
    item = merge_ptr + (tl.program_id(0) // KV_HEADS) * MERGE_FIELDS
    head = tl.program_id(0) % KV_HEADS
    parts = tl.load(item + MERGE_PARTS)
    if parts < 2:
        return
    first_row = tl.load(item + MERGE_ROW).to(tl.int64)
    new = tl.load(item + MERGE_NEW)
    tile = tl.load(item + MERGE_TILE)
    part = tl.load(item + MERGE_PART).to(tl.int64)
    in_tile = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tile * BLOCK_M + in_tile
    token = rows // GROUP
    if tile * BLOCK_M + tl.program_id(1) * BLOCK_R >= new * GROUP:
        return
    valid = token < new
    q_head = head * GROUP + rows % GROUP
    dims = tl.arange(0, DIM_PADDED)
    mask = _inside(valid, dims, DIM, DIM_PADDED)

    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, DIM_PADDED], tl.float32)
    if SINKS:
        highest = tl.load(sink_ptr + q_head).to(tl.float32) * _LOG2E
        total += 1.0
    several = tl.arange(0, PARTS)
    for i in range(0, parts, PARTS):
        at_row = ((part + i + several[:, None]) * KV_HEADS + head) * BLOCK_M + in_tile[None, :]
        there = (i + several < parts)[:, None] & valid[None, :]
        lse = tl.load(part_lse_ptr + at_row, mask=there, other=float("-inf"))
        at = at_row[:, :, None] * DIM_PADDED + dims[None, None, :]
        out = tl.load(part_out_ptr + at, mask=there[:, :, None] & (dims < DIM)[None, None, :], other=0.0)
        highest, total, acc = _put_together(highest, total, acc, lse, out)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = out_ptr + (first_row + token) * stride_out_token + q_head * stride_out_head
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
