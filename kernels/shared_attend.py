"""Shared decode, the attention: each team's work, whose partial results `shared_merge` puts together."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vtensor.kernels.attend import (
    _divided,
    _dot,
    _inside,
    _queries,
    _scores,
    _tile_in_part,
    _whole_tiles,
    _widened,
)
from sglang_vtensor.kernels.shared_plan import (
    LINE_RUN_TILES,
    TEAM_AT,
    TEAM_BESIDE,
    TEAM_END,
    TEAM_FIELDS,
    TEAM_FROM,
    TEAM_TILE,
    TEAM_TO,
    TEAM_TURN,
    TEAM_UNIT,
    UNIT_BEFORE,
    UNIT_BEGIN,
    UNIT_COUNT,
    UNIT_FIELDS,
    UNIT_HIGH,
    UNIT_LOW,
    UNIT_MEMBERS,
    UNIT_TILES,
)


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
    contexts_ptr,
    members_ptr,
    units_ptr,
    teams_ptr,
    line_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    cap,
    window,
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
    WINDOWED: tl.constexpr,
    SCALED: tl.constexpr,
    NARROW: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A team's work, for one KV head: what it has of a tile beside others, and its part of the line, tile after tile,
    against the keys of it that are in the share."""
    EACH: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % KV_HEADS
    team = tl.program_id(0) // KV_HEADS
    run_tiles = tl.load(line_ptr + LINE_RUN_TILES)
    work = teams_ptr + team * TEAM_FIELDS
    at = tl.load(work + TEAM_AT)
    end = tl.load(work + TEAM_END)
    number = tl.load(work + TEAM_UNIT)
    beside = tl.load(work + TEAM_BESIDE)
    in_turn = tl.load(work + TEAM_TURN)
    if SCALED:
        scale *= tl.load(k_scale_ptr)
    dims = tl.arange(0, DIM_PADDED)
    while (beside >= 0) | (at < end):
        on_line = beside < 0
        unit = units_ptr + tl.where(on_line, number, beside) * UNIT_FIELDS
        begin = tl.load(unit + UNIT_BEGIN)
        length = tl.load(unit + UNIT_TILES) + COST
        low = tl.load(unit + UNIT_LOW)
        high = tl.load(unit + UNIT_HIGH)
        start = tl.load(unit + UNIT_MEMBERS)
        count = tl.load(unit + UNIT_COUNT)
        tile = tl.where(on_line, (at - begin) // length, tl.load(work + TEAM_TILE))
        inside = tl.where(on_line, at - begin - tile * length, tl.load(work + TEAM_FROM))
        stop = tl.where(on_line, tl.minimum(inside + end - at, length), tl.load(work + TEAM_TO))
        key_low = low + tl.maximum(inside - COST, 0) * BLOCK_N
        key_high = tl.minimum(low + tl.maximum(stop - COST, 0) * BLOCK_N, high)
        tile_before = tl.load(unit + UNIT_BEFORE) + tile
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
            q = _queries(
                tl.load(q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0), k_ptr.dtype.element_ty, NARROW
            )
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)

            # The unit's first request is read for all of them.
            pages = pages_ptr + tl.load(members_ptr + start).to(tl.int64) * stride_pages
            k_head = k_ptr + head * stride_k_head
            v_head = v_ptr + head * stride_v_head
            whole = key_low + (key_high - key_low) // BLOCK_N * BLOCK_N
            edge = key_low
            if WINDOWED:
                # Each request of the tile sees `window` tokens before its new one. Tiles that are behind the window of
                # some of them are masked, and what is behind all windows is not loaded.
                first_seen = tl.load(contexts_ptr + member, mask=valid, other=0).to(tl.int32) - 1 - window
                nearest = tl.min(tl.where(valid, first_seen, 2147483647), 0)
                behind = tl.maximum(tl.max(first_seen, 0) - key_low, 0)
                edge = tl.minimum(key_low + (behind + BLOCK_N - 1) // BLOCK_N * BLOCK_N, whole)
                for n in range(key_low, edge, BLOCK_N):
                    keys = n + tl.arange(0, BLOCK_N)
                    slot = (tl.load(pages + n // PAGE) * PAGE + n % PAGE + tl.arange(0, BLOCK_N)).to(tl.int64)
                    highest, total, acc = _tile_in_part(
                        q,
                        k_head,
                        v_head,
                        slot,
                        keys >= nearest,
                        keys[None, :] >= first_seen[:, None],
                        highest,
                        total,
                        acc,
                        scale,
                        cap,
                        stride_k_token,
                        stride_v_token,
                        DIM,
                        DIM_PADDED,
                        CAP,
                        WIDE,
                    )
            highest, total, acc, _ = _whole_tiles(
                q,
                k_head,
                v_head,
                k_tiles,
                v_tiles,
                pages,
                0,
                head,
                edge,
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
                slot = (tl.load(pages + whole // PAGE) * PAGE + whole % PAGE + in_keys).to(tl.int64)
                if WINDOWED:
                    highest, total, acc = _tile_in_part(
                        q,
                        k_head,
                        v_head,
                        slot,
                        seen & (whole + in_keys >= nearest),
                        seen[None, :] & (whole + in_keys[None, :] >= first_seen[:, None]),
                        highest,
                        total,
                        acc,
                        scale,
                        cap,
                        stride_k_token,
                        stride_v_token,
                        DIM,
                        DIM_PADDED,
                        CAP,
                        WIDE,
                    )
                else:
                    mask = _inside(seen, dims, DIM, DIM_PADDED)
                    k = tl.load(k_head + slot[:, None] * stride_k_token + dims[None, :], mask=mask, other=0.0)
                    v = _widened(tl.load(v_head + slot[:, None] * stride_v_token + dims[None, :], mask=mask, other=0.0))
                    scores = tl.where(seen[None, :], _scores(q, k, scale, cap, CAP, WIDE), float("-inf"))
                    new_highest = tl.maximum(highest, tl.max(scores, 1))
                    weights = tl.exp2(scores - new_highest[:, None])
                    decay = tl.exp2(highest - new_highest)
                    total = total * decay + tl.sum(weights, 1)
                    acc = _dot(weights.to(v.dtype), v, acc * decay[:, None], WIDE)
                    highest = new_highest

            out = _divided(acc, total, v_scale_ptr, SCALED)
            rows = at_row + in_tile
            tl.store(part_out_ptr + rows[:, None] * DIM_PADDED + dims[None, :], out, mask=q_mask)
            tl.store(part_lse_ptr + rows, highest + tl.log2(total), mask=valid)
