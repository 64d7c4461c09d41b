"""Shared decode, the merge: what is on the path of each request, which `shared_attend` left in parts, becomes one."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vtensor.kernels.attend import _LOG2E, _inside


@triton.jit
def _partial(
    part_out_ptr,
    part_lse_ptr,
    places_ptr,
    i,
    parts,
    in_run,
    in_own,
    own_rows,
    valid,
    dims,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Partial result `i` of a request, with its log-sum-exp; -inf for what is none. `in_run`, `in_own`: where the rows
    of a KV head are, from the place of the first one."""
    there = valid & (i < parts)
    place = tl.load(places_ptr + i, mask=i < parts, other=0)
    at_row = (place + tl.where(place < own_rows, in_run, in_own)).to(tl.int64)
    mask = _inside(there, dims, DIM, DIM_PADDED)
    lse = tl.load(part_lse_ptr + at_row, mask=there, other=float("-inf"))
    return lse, tl.load(part_out_ptr + at_row[:, None] * DIM_PADDED + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _together(
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    parts_ptr,
    places_ptr,
    stride_out_token,
    stride_out_head,
    own_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OWN: tl.constexpr,
    MOST: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The partial results of one request, for the query heads of one KV head: four at a time, no row waiting for
    another."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    parts = tl.load(parts_ptr + row)
    if parts == 0:
        return
    places_ptr += row * MOST
    in_group = tl.arange(0, OWN)
    dims = tl.arange(0, DIM_PADDED)
    q_head = head * GROUP + in_group
    valid = in_group < GROUP
    in_run = head * BLOCK_M + in_group
    in_own = head * OWN + in_group
    highest = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, DIM_PADDED], tl.float32)
    if SINKS:
        highest = tl.load(sink_ptr + q_head, mask=valid, other=float("-inf")).to(tl.float32) * _LOG2E
        total += 1.0
    for i in range(0, parts, 4):
        lse_0, out_0 = _partial(
            part_out_ptr, part_lse_ptr, places_ptr, i, parts, in_run, in_own, own_rows, valid, dims, DIM, DIM_PADDED
        )
        lse_1, out_1 = _partial(
            part_out_ptr, part_lse_ptr, places_ptr, i + 1, parts, in_run, in_own, own_rows, valid, dims, DIM, DIM_PADDED
        )
        lse_2, out_2 = _partial(
            part_out_ptr, part_lse_ptr, places_ptr, i + 2, parts, in_run, in_own, own_rows, valid, dims, DIM, DIM_PADDED
        )
        lse_3, out_3 = _partial(
            part_out_ptr, part_lse_ptr, places_ptr, i + 3, parts, in_run, in_own, own_rows, valid, dims, DIM, DIM_PADDED
        )
        new_highest = tl.maximum(highest, tl.maximum(tl.maximum(lse_0, lse_1), tl.maximum(lse_2, lse_3)))
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        decay = tl.exp2(highest - finite)
        weight_0 = tl.exp2(lse_0 - finite)
        weight_1 = tl.exp2(lse_1 - finite)
        weight_2 = tl.exp2(lse_2 - finite)
        weight_3 = tl.exp2(lse_3 - finite)
        total = total * decay + (weight_0 + weight_1) + (weight_2 + weight_3)
        acc = acc * decay[:, None] + (out_0 * weight_0[:, None] + out_1 * weight_1[:, None])
        acc += out_2 * weight_2[:, None] + out_3 * weight_3[:, None]
        highest = new_highest
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = out_ptr + row.to(tl.int64) * stride_out_token + q_head * stride_out_head
    mask = valid[:, None] & (dims < DIM)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
