"""Shared decode, the attention: each team's work, and the merge of what is on the path of each request."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vtensor.kernels.attend import _LOG2E, _dot, _inside, _scores, _whole_tiles


@triton.jit
def _pieces(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    part_out_ptr,
    part_lse_ptr,
    pages_ptr,
    members_ptr,
    units_ptr,
    teams_ptr,
    line_ptr,
    scale,
    cap,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_pages,
    own_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    OWN: tl.constexpr,
    TEAMS: tl.constexpr,
    COST: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A team's work, for one KV head: what it has of a tile beside others, and its part of the line, tile after tile,
    against the keys of it that are in the share."""
    EACH: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % KV_HEADS
    team = tl.program_id(0) // KV_HEADS
    run_tiles = tl.load(line_ptr + 1)
    work = teams_ptr + team * 8
    at = tl.load(work)
    end = tl.load(work + 1)
    number = tl.load(work + 2)
    beside = tl.load(work + 3)
    in_turn = tl.load(work + 7)
    dims = tl.arange(0, DIM_PADDED)
    while (beside >= 0) | (at < end):
        on_line = beside < 0
        unit = units_ptr + tl.where(on_line, number, beside) * 7
        begin = tl.load(unit)
        length = tl.load(unit + 1) + COST
        low = tl.load(unit + 3)
        high = tl.load(unit + 4)
        start = tl.load(unit + 5)
        count = tl.load(unit + 6)
        tile = tl.where(on_line, (at - begin) // length, tl.load(work + 4))
        inside = tl.where(on_line, at - begin - tile * length, tl.load(work + 5))
        stop = tl.where(on_line, tl.minimum(inside + end - at, length), tl.load(work + 6))
        key_low = low + tl.maximum(inside - COST, 0) * BLOCK_N
        key_high = tl.minimum(low + tl.maximum(stop - COST, 0) * BLOCK_N, high)
        tile_before = tl.load(unit + 2) + tile
        # On the line a team and a tile of rows both only go forward, so their sum is a place of its own. What is a
        # request's own has few rows, and places of that size, behind those of the runs. Beside others there is one.
        place = tl.where(on_line, TEAMS + tile_before + in_turn, team).to(tl.int64)
        in_own = (tile_before + in_turn - run_tiles).to(tl.int64)
        in_run = (place * KV_HEADS + head) * BLOCK_M
        in_own = own_rows + (in_own * KV_HEADS + head) * OWN
        at_row = tl.where(on_line & (tile_before >= run_tiles), in_own, in_run)
        beside = -1
        if on_line:
            at += stop - inside
            if at >= begin + (count + EACH - 1) // EACH * length:
                number += 1
        if key_low < key_high:
            in_tile = tl.arange(0, BLOCK_M)
            rank = tile * EACH + in_tile // GROUP
            valid = (in_tile < EACH * GROUP) & (rank < count)
            member = tl.load(members_ptr + start + rank, mask=valid, other=0).to(tl.int64)
            q_rows = q_ptr + member * stride_q_token + (head * GROUP + in_tile % GROUP) * stride_q_head
            q_mask = _inside(valid, dims, DIM, DIM_PADDED)
            q = tl.load(q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)

            # The unit's first request is read for all of them.
            pages = pages_ptr + tl.load(members_ptr + start).to(tl.int64) * stride_pages
            k_head = k_ptr + head * stride_k_head
            v_head = v_ptr + head * stride_v_head
            whole = key_low + (key_high - key_low) // BLOCK_N * BLOCK_N
            highest, total, acc, _ = _whole_tiles(
                q,
                k_head,
                v_head,
                k_tiles,
                v_tiles,
                pages,
                0,
                head,
                key_low,
                whole,
                highest,
                total,
                acc,
                scale,
                cap,
                stride_k_token,
                stride_v_token,
                DIM,
                DIM_PADDED,
                BLOCK_N,
                PAGE,
                CAP,
                TMA,
                WIDE,
            )
            # The last tile of a context: what lies behind it in its page is whatever was there before.
            if whole < key_high:
                in_keys = tl.arange(0, BLOCK_N)
                seen = whole + in_keys < key_high
                mask = _inside(seen, dims, DIM, DIM_PADDED)
                slot = (tl.load(pages + whole // PAGE) * PAGE + whole % PAGE + in_keys).to(tl.int64)
                k = tl.load(k_head + slot[:, None] * stride_k_token + dims[None, :], mask=mask, other=0.0)
                v = tl.load(v_head + slot[:, None] * stride_v_token + dims[None, :], mask=mask, other=0.0)
                scores = tl.where(seen[None, :], _scores(q, k, scale, cap, CAP, WIDE), float("-inf"))
                new_highest = tl.maximum(highest, tl.max(scores, 1))
                weights = tl.exp2(scores - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                total = total * decay + tl.sum(weights, 1)
                acc = _dot(weights.to(v.dtype), v, acc * decay[:, None], WIDE)
                highest = new_highest

            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            rows = at_row + in_tile
            tl.store(part_out_ptr + rows[:, None] * DIM_PADDED + dims[None, :], out, mask=q_mask)
            tl.store(part_lse_ptr + rows, highest + tl.log2(total), mask=valid)


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
