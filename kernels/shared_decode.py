"""Shared decode: one new token of each request attends to its context, and a run of tokens that several requests share
is read once for all of them.

    sharing = Sharing(slots=1024, requests=256, page_tokens=128)     who shares what (`sglang_vtensor.sharing`)
    decoder = SharedDecoder(max_requests=256, slots=1024, page_tokens=128, max_tokens=8192, ...)
    decoder.update(sharing.tables)                                   when it has changed
    decoder.find_pages(table, slots, contexts)                       once a step
    decoder.plan(slots, contexts)                                    once a step: three small kernels
    decoder(q, k, v, scale=scale)                                    once a layer

A unit is a run of tokens and the requests that read it: a shared run, or what a request has for itself. Its queries,
of all its requests with all their grouped heads, are packed into tiles of BLOCK_M rows, as many whole requests as there
is room for, and each tile goes along all keys of the unit. The work is divided equally among teams of programs (one
program a KV head), so nothing is waited for, however unequal the units are:

    time    | run: tile 0 | run: tile 1 | own 2 |       The tiles of a run go along its keys side by side, at the same
     |      | - - - - - - | - - - - - - | own 3 |       time, so that the keys come from memory once. Everything else
     v      | own 0  own 1| own 1  own 2|       |       is one line, which fills what is left of each team's share.
              team 0        team 1        team 2

Where a tile is cut, each share leaves a partial result with its log-sum-exp. A merge puts together what is on the path
of each request, whose places are found once a step.

A tile costs COST tiles of keys beside its keys: they stand before its keys, and nothing is done there.

Keys are read by pages, which are whole tiles: one load from a page table, and a tile is a rectangle in memory. Nothing
needs to be mapped for this, no request's context to be contiguous. The page table is taken from SGLang's table of slots
before a step: that one may change while the step runs, as requests end whose slots are others' then.

Safe in a CUDA graph: grids and buffers are fixed; who shares what, and all lengths, are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.attend import _LN2, _LOG2E, _dot, _inside, _scores, _whole_tiles
from sglang_vtensor.kernels.launch import DIMS, base_two, check, tile_descriptors
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.sharing import DEPTH, Tables

#: What a tile of rows costs beside its keys, and the shortest share, in tiles of keys: measured, and an estimate.
COST, SHORTEST = 1, 4
#: What `_divide` says of a unit. Where it begins on the line, or -1 less its first team if its tiles are side by side;
#: its tiles of keys; tiles of rows of the units before it on the line; its first and one past its last token; where its
#: requests begin in `members`, the first of which is read, and how many there are.
UNIT_FIELDS = 7
#: And of a team: its part of the line, from and to, and the unit there; the unit of which it has a tile beside others,
#: or -1, which tile, and its part of that, from and to; and its number among the teams that have a part of the line.
TEAM_FIELDS = 8
#: Rows whose order one program of `_arrange` finds; requests whose partial results one of `_locate` finds.
ARRANGED, LOCATED = 32, 8
#: Pages of a request that one program of `_find_pages` looks up, at most.
FOUND = 1024
#: The levels of a request, its own run, and room to a power of two.
LEVELS = triton.next_power_of_2(DEPTH + 1)


@triton.jit
def _find_pages(
    slots_ptr, contexts_ptr, table_ptr, pages_ptr, stride_table, stride_pages, PAGE: tl.constexpr, FOUND: tl.constexpr
):
    """The pages of the batch's requests, from the slots of their tokens."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * FOUND + tl.arange(0, FOUND)
    there = page * PAGE < tl.load(contexts_ptr + row)
    slots = table_ptr + tl.load(slots_ptr + row).to(tl.int64) * stride_table
    first = tl.load(slots + page * PAGE, mask=there, other=0)
    tl.store(pages_ptr + row * stride_pages + page, first // PAGE, mask=there)


@triton.jit(do_not_specialize=["rows"])
def _arrange(
    slots_ptr,
    chains_ptr,
    members_ptr,
    ranks_ptr,
    starts_ptr,
    rows,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    ARRANGED: tl.constexpr,
):
    """Level by level, the batch's rows in the order of their units: where each unit begins, and who stands where."""
    level = tl.program_id(0)
    all_rows = tl.arange(0, ROWS)
    slot = tl.load(slots_ptr + all_rows, mask=all_rows < rows, other=0).to(tl.int64)
    unit = tl.load(chains_ptr + slot * DEPTH + level, mask=all_rows < rows, other=-1)
    row = tl.program_id(1) * ARRANGED + tl.arange(0, ARRANGED)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=0).to(tl.int64)
    mine = tl.load(chains_ptr + slot * DEPTH + level, mask=row < rows, other=-1)
    there = mine >= 0
    same = (unit[None, :] == mine[:, None]) & (all_rows[None, :] < row[:, None])
    rank = tl.sum(same.to(tl.int32), 1)
    # Rows without a unit, -1, count for nobody: they stand behind `members` of this level.
    before = tl.sum(((unit[None, :] < mine[:, None]) & (unit[None, :] >= 0)).to(tl.int32), 1)
    start = level * ROWS + before
    tl.store(members_ptr + start + rank, row, mask=there)
    tl.store(ranks_ptr + level * ROWS + row, rank, mask=there)
    tl.store(starts_ptr + mine, start, mask=there & (rank == 0))


@triton.jit(do_not_specialize=["rows"])
def _divide(
    slots_ptr,
    contexts_ptr,
    chains_ptr,
    lows_ptr,
    highs_ptr,
    counts_ptr,
    starts_ptr,
    units_ptr,
    numbers_ptr,
    teams_ptr,
    line_ptr,
    rows,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TEAMS: tl.constexpr,
    COST: tl.constexpr,
    SHORTEST: tl.constexpr,
):
    """What each team does. Every program knows all units, and writes one team's work; the first one also writes the
    units that there are, without gaps: those on the line, shared runs first, and then those of tiles side by side.

    Lanes are unit numbers below ROWS, and rows from there on.
    """
    lane = tl.arange(0, 2 * ROWS)
    run = lane < UNITS
    row = lane - ROWS
    own = (row >= 0) & (row < rows)
    slot = tl.load(slots_ptr + row, mask=own, other=0).to(tl.int64)
    low = tl.load(lows_ptr + lane, mask=run, other=0)
    high = tl.load(highs_ptr + lane, mask=run, other=0)
    count = tl.load(counts_ptr + lane, mask=run, other=1)
    for level in range(DEPTH):
        unit = tl.load(chains_ptr + slot * DEPTH + level, mask=own, other=-1)
        low = tl.where(own & (unit >= 0), tl.load(highs_ptr + unit, mask=own & (unit >= 0), other=0), low)
    high = tl.where(own, tl.load(contexts_ptr + row, mask=own, other=0).to(tl.int32), high)
    start = tl.where(own, DEPTH * ROWS + row, tl.load(starts_ptr + lane, mask=run & (count > 0), other=0))
    tiles = tl.where(count > 0, (tl.maximum(high - low, 0) + BLOCK_N - 1) // BLOCK_N, 0)
    there = (tiles > 0) & (run | own)
    tile_rows = tl.where(there, (count + EACH - 1) // EACH, 0)
    length = tiles + COST
    share = tl.maximum((tl.sum(tile_rows * length) + TEAMS - 1) // TEAMS, SHORTEST)
    team = tl.program_id(0)

    # Side by side: a share of each tile to a team of its own, from the first team on, while there are teams.
    shares = (length + share - 1) // share
    columns = tl.where(tile_rows > 1, tile_rows * shares, 0)
    column = tl.cumsum(columns, 0)
    beside = (columns > 0) & (column <= TEAMS)
    columns = tl.where(beside, columns, 0)
    column -= columns
    full = tile_rows * (shares - 1)
    rest = length - (shares - 1) * share
    before = tl.minimum(tl.maximum(team - column, 0), columns)
    used = tl.sum(tl.minimum(before, full) * share + tl.maximum(before - full, 0) * rest)
    mine = (team >= column) & (team < column + columns)
    width = tl.maximum(tile_rows, 1)
    inside = (team - column) // width * share
    stop = tl.minimum(inside + share, length)
    used_here = tl.sum(tl.where(mine, stop - inside, 0))
    without = tl.sum(tl.minimum(before, tl.where(rest == share, columns, full)))

    # The line: what is left of each team's share, one team's behind the other's.
    narrow = there & (columns == 0)
    cost = tl.where(narrow, tile_rows * length, 0)
    end = tl.cumsum(cost, 0)
    narrows = tl.cumsum(narrow.to(tl.int32), 0)
    in_line = tl.sum(narrow.to(tl.int32))
    number = tl.where(narrow, narrows, in_line + tl.cumsum(beside.to(tl.int32), 0)) - 1
    at = team * share - used
    work = teams_ptr + team * 8
    tl.store(work, at)
    tl.store(work + 1, tl.minimum(at + share - used_here, tl.sum(cost)))
    tl.store(work + 2, tl.sum((narrow & (end <= at)).to(tl.int32)))
    tl.store(work + 3, tl.sum(tl.where(mine, number + 1, 0)) - 1)
    tl.store(work + 4, tl.sum(tl.where(mine, (team - column) % width, 0)))
    tl.store(work + 5, tl.sum(tl.where(mine, inside, 0)))
    tl.store(work + 6, tl.sum(tl.where(mine, stop, 0)))
    tl.store(work + 7, team - without)
    if team == 0:
        lined = tl.where(narrow, tile_rows, 0)
        unit = units_ptr + number * 7
        tl.store(unit, tl.where(beside, -1 - column, end - cost), mask=there)
        tl.store(unit + 1, tiles, mask=there)
        tl.store(unit + 2, tl.cumsum(lined, 0) - lined, mask=there)
        tl.store(unit + 3, low, mask=there)
        tl.store(unit + 4, high, mask=there)
        tl.store(unit + 5, start, mask=there)
        tl.store(unit + 6, count, mask=there)
        tl.store(numbers_ptr + lane, tl.where(there, number, -1))
        tl.store(line_ptr, share)
        tl.store(line_ptr + 1, tl.sum(tl.where(run, lined, 0)))
        tl.store(line_ptr + 2, tl.sum(columns))
        all_used = tl.where(beside, full * share + tile_rows * rest, 0)
        tl.store(line_ptr + 3, tl.sum(columns) * share - tl.sum(all_used))


@triton.jit(do_not_specialize=["rows"])
def _locate(
    slots_ptr,
    contexts_ptr,
    chains_ptr,
    ranks_ptr,
    units_ptr,
    numbers_ptr,
    teams_ptr,
    line_ptr,
    parts_ptr,
    places_ptr,
    own_rows,
    rows,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OWN: tl.constexpr,
    TEAMS: tl.constexpr,
    COST: tl.constexpr,
    MOST: tl.constexpr,
    LOCATED: tl.constexpr,
):
    """The partial results of each request, for its first KV head: how many there are, and the first row of each."""
    EACH: tl.constexpr = BLOCK_M // GROUP
    row = (tl.program_id(0) * LOCATED + tl.arange(0, LOCATED))[:, None]
    level = tl.arange(0, LEVELS)[None, :]
    work = (row < rows) & (tl.load(contexts_ptr + row, mask=row < rows, other=0) > 0)
    slot = tl.load(slots_ptr + row, mask=work, other=0).to(tl.int64)
    lane = tl.load(chains_ptr + slot * DEPTH + level, mask=work & (level < DEPTH), other=-1)
    rank = tl.load(ranks_ptr + level * ROWS + row, mask=lane >= 0, other=0)
    lane = tl.where(work & (level == DEPTH), ROWS + row, lane)
    # Its own is nothing where a context ends with a shared run.
    number = tl.load(numbers_ptr + lane, mask=lane >= 0, other=-1)
    unit = units_ptr + number * 7
    begin = tl.load(unit, mask=number >= 0, other=0)
    tiles = tl.load(unit + 1, mask=number >= 0, other=0)
    tile = rank // EACH
    tile_rows = (tl.load(unit + 6, mask=number >= 0, other=0) + EACH - 1) // EACH
    share = tl.load(line_ptr)
    columns = tl.load(line_ptr + 2)
    # On the line: from the team that has the first key to the one that has the last. Only teams that have tiles side by
    # side have less of the line than a whole share, or nothing, and are then not counted.
    first = begin + tile * (tiles + COST) + COST
    last = first + tiles - 1
    beyond = tl.load(line_ptr + 3)
    team = tl.maximum(first - beyond, 0) // share
    last_team = tl.maximum(last - beyond, 0) // share
    for i in range(0, columns):
        end = tl.load(teams_ptr + i * 8 + 1)
        counts = end > tl.load(teams_ptr + i * 8)
        team += (counts & (end <= first)).to(tl.int32)
        last_team += (counts & (end <= last)).to(tl.int32)
    on_line = begin >= 0
    part = tl.load(unit + 2, mask=number >= 0, other=0) + tile + team
    count = tl.where(on_line, last_team - team + 1, (tiles + COST + share - 1) // share)
    count = tl.where(number >= 0, count, 0)
    before = tl.cumsum(count, 1) - count
    tl.store(parts_ptr + row, tl.sum(count, 1)[:, None], mask=row < rows)
    in_run = tl.where(on_line, TEAMS + part, -1 - begin + tile) * (KV_HEADS * BLOCK_M) + rank % EACH * GROUP
    in_own = own_rows + (part - tl.load(line_ptr + 1)) * (KV_HEADS * OWN)
    place = tl.where(level < DEPTH, in_run, in_own)
    step = tl.where(level < DEPTH, tl.where(on_line, 1, tile_rows) * (KV_HEADS * BLOCK_M), KV_HEADS * OWN)
    for i in range(0, tl.max(tl.max(count, 1), 0)):
        tl.store(places_ptr + row * MOST + before + i, place + i * step, mask=i < count)


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
            highest, total, acc = _whole_tiles(
                q,
                k_head,
                v_head,
                k_tiles,
                v_tiles,
                0,
                pages,
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
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    parts_ptr,
    places_ptr,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    own_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OWN: tl.constexpr,
    MOST: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
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
    if LSE:
        lse = (highest + tl.log2(total)) * _LN2
        tl.store(lse_ptr + row.to(tl.int64) * stride_lse_token + q_head, lse, mask=valid)


class SharedDecoder:
    """Decode over what requests share, for up to `max_requests` requests of one token each, on static buffers.

    Requests are known by their slots, below `slots`, and have up to `max_tokens` tokens, in pages of `page_tokens`. One
    decoder serves all layers of a geometry; two streams must not share one.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        slots: int,
        page_tokens: int,
        max_tokens: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        config: Config | None = None,
    ) -> None:
        if max_requests < 1 or slots < 1 or q_heads % kv_heads:
            raise ValueError(
                f"{max_requests} requests, {slots} slots, {q_heads} query heads over {kv_heads} KV heads: at least 1, "
                "at least 1, and a multiple, wanted"
            )
        if head_dim not in DIMS:
            raise ValueError(f"head_dim {head_dim}: one of {', '.join(map(str, DIMS))} wanted")
        self.max_requests, self.slots = max_requests, slots
        self.q_heads, self.kv_heads, self.head_dim = q_heads, kv_heads, head_dim
        self.group = q_heads // kv_heads
        self.config = config or configs.shared_decode(head_dim, configs.capability(device))
        if self.group > self.config.block_m:
            raise ValueError(f"{self.group} query heads a KV head: up to {self.config.block_m} wanted")
        if page_tokens % self.config.block_n:
            raise ValueError(f"pages of {page_tokens} tokens: whole tiles of {self.config.block_n} tokens wanted")
        self.page_tokens, self.max_pages = page_tokens, -(-max_tokens // page_tokens)
        #: Whole requests that a tile of rows takes.
        self.each = self.config.block_m // self.group
        self.teams = max(1, configs.multiprocessors(device) * self.config.occupancy // kv_heads)
        #: Tiles of rows that shared runs may take: twice what all requests fill, and some that are not full.
        self.max_tiles = 2 * -(-max_requests // self.each) + max(16, max_requests // 4)
        self.rows = triton.next_power_of_2(max_requests)
        self.own = triton.next_power_of_2(self.group)
        self.padded = triton.next_power_of_2(head_dim)

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tables = Tables(slots, max_requests, buffer(Tables.size(slots, max_requests)))
        # One more than a request can have, which is looked up ahead and not used.
        self.pages = buffer(max_requests, self.max_pages + 1)
        self.members = buffer((DEPTH + 1) * self.rows)
        self.members[DEPTH * self.rows :] = torch.arange(self.rows)
        self.ranks = buffer(DEPTH * self.rows)
        self.starts = buffer(max_requests)
        self.units = buffer(2 * self.rows, UNIT_FIELDS)
        self.numbers = buffer(2 * self.rows)
        # A request has one partial result of each level and each share that ends within one, or of each team.
        self.most = 2 * self.teams + DEPTH + 1
        self.parts = buffer(self.rows)
        self.places = buffer(self.rows, self.most)
        self.work = buffer(self.teams, TEAM_FIELDS)
        self.line = buffer(4)
        self.own_rows = (self.max_tiles + 2 * self.teams) * kv_heads * self.config.block_m
        parts = self.own_rows + (self.rows + self.teams) * kv_heads * self.own
        self.part_out = buffer(parts * self.padded, dtype=torch.float32)
        self.part_lse = buffer(parts, dtype=torch.float32)
        self.step = (buffer(0), buffer(0))

    def fits(self, tables: Tables) -> bool:
        """Whether the shared runs take no more tiles of rows than there is room for."""
        return int((-(-tables.counts // self.each)).sum()) <= self.max_tiles

    def update(self, tables: Tables) -> None:
        """From now on, who shares what is as in these tables, on the host. One copy, on the current stream. Raises
        `ValueError` for tables of another size, or with more than `fits`."""
        array = torch.from_numpy(tables.array)
        if array.shape != self.tables.array.shape or not self.fits(tables):
            raise ValueError(
                f"tables of {array.shape[0]} numbers, {tables.counts.tolist()} requests a run: tables for {self.slots} "
                f"slots and {self.max_requests} requests wanted, with up to {self.max_tiles} tiles of {self.each} "
                "requests"
            )
        if self.members.is_cuda:
            array = array.pin_memory()  # the tables may change while the copy is under way
        self.tables.array.copy_(array, non_blocking=True)

    def find_pages(self, table: torch.Tensor, slots: torch.Tensor, contexts: torch.Tensor) -> None:
        """Look up the pages of a step's requests, before the step: in front of the graph that has it, where there is
        one, for the table may change while that runs.

        `table`: `(slots, longest context)` int32, the slot of each token, pages aligned. `slots`, `contexts`: as of
        `plan`.
        """
        requests = self._requests(slots, contexts)
        if table.ndim != 2 or table.shape[0] < self.slots or table.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(f"table is {tuple(table.shape)} {table.dtype}: ({self.slots}, tokens) torch.int32 wanted")
        if requests:
            found = min(FOUND, triton.next_power_of_2(self.max_pages))
            _find_pages[(requests, triton.cdiv(self.max_pages, found))](
                slots,
                contexts,
                table,
                self.pages,
                table.stride(0),
                self.pages.stride(0),
                PAGE=self.page_tokens,
                FOUND=found,
                num_warps=4,
            )

    def plan(self, slots: torch.Tensor, contexts: torch.Tensor) -> None:
        """Divide a step's work. In a graph, this belongs to what is captured.

        `slots`, `contexts`: `(requests,)`, int32 or int64 on the device; who the requests are, and their tokens with
        the new one, which is behind all that they share. 0 is no work, and the row of that request is not written. Of
        the requests in the tables none may be missing.
        """
        requests = self._requests(slots, contexts)
        self.step = (slots, contexts)
        if not requests:
            return
        tables = self.tables
        _arrange[(DEPTH, triton.cdiv(requests, ARRANGED))](
            slots,
            tables.chains,
            self.members,
            self.ranks,
            self.starts,
            requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            ARRANGED=ARRANGED,
            num_warps=4,
        )
        _divide[(self.teams,)](
            slots,
            contexts,
            tables.chains,
            tables.lows,
            tables.highs,
            tables.counts,
            self.starts,
            self.units,
            self.numbers,
            self.work,
            self.line,
            requests,
            UNITS=self.max_requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            EACH=self.each,
            BLOCK_N=self.config.block_n,
            TEAMS=self.teams,
            COST=COST,
            SHORTEST=SHORTEST,
            num_warps=4 if self.rows <= 256 else 8,
        )
        _locate[(triton.cdiv(requests, LOCATED),)](
            slots,
            contexts,
            tables.chains,
            self.ranks,
            self.units,
            self.numbers,
            self.work,
            self.line,
            self.parts,
            self.places,
            self.own_rows,
            requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            LEVELS=LEVELS,
            KV_HEADS=self.kv_heads,
            GROUP=self.group,
            BLOCK_M=self.config.block_m,
            OWN=self.own,
            TEAMS=self.teams,
            COST=COST,
            MOST=self.most,
            LOCATED=LOCATED,
            num_warps=4,
        )

    def _requests(self, slots: torch.Tensor, contexts: torch.Tensor) -> int:
        """How many a step has. Raises `ValueError` if these do not say who they are."""
        requests = slots.shape[0]
        for name, tensor in (("slots", slots), ("contexts", contexts)):
            if tensor.shape != (requests,) or requests > self.max_requests or tensor.dtype.is_floating_point:
                raise ValueError(
                    f"{name} are {tuple(tensor.shape)} {tensor.dtype}: the same number of integers, up to "
                    f"{self.max_requests}, wanted"
                )
        return requests

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the planned step, `(requests, q_heads, head_dim)` as `q`.

        `k`, `v`: `(slots, kv_heads, head_dim)`, every page that `find_pages` saw readable to its end. Errors as of
        `prefix_prefill`.
        """
        out = torch.empty_like(q) if out is None else out
        slots, _ = self.step
        check(q, k, v, out, lse, sinks, slots.shape[0])
        if q.shape[1:] != (self.q_heads, self.head_dim) or k.shape[1] != self.kv_heads:
            raise ValueError(
                f"q {tuple(q.shape)} over k {tuple(k.shape)}: {self.q_heads} query heads of {self.head_dim} over "
                f"{self.kv_heads} wanted"
            )
        if not slots.shape[0]:
            return out
        config = self.config
        shape = {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "DIM": self.head_dim,
            "DIM_PADDED": self.padded,
            "BLOCK_M": config.block_m,
            "OWN": self.own,
        }
        _pieces[(self.teams * self.kv_heads,)](
            q,
            k,
            v,
            *tile_descriptors(k, v, config),
            self.part_out,
            self.part_lse,
            self.pages,
            self.members,
            self.units,
            self.work,
            self.line,
            base_two(scale, soft_cap),
            soft_cap,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            self.pages.stride(0),
            self.own_rows,
            BLOCK_N=config.block_n,
            PAGE=self.page_tokens,
            TEAMS=self.teams,
            COST=COST,
            CAP=soft_cap > 0,
            TMA=config.tma,
            WIDE=q.device.type == "cpu" and q.dtype is torch.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shape,
        )
        _together[(slots.shape[0], self.kv_heads)](
            out,
            self.part_lse if lse is None else lse,
            self.part_out,
            self.part_lse,
            self.part_lse if sinks is None else sinks,
            self.parts,
            self.places,
            out.stride(0),
            out.stride(1),
            0 if lse is None else lse.stride(0),
            self.own_rows,
            MOST=self.most,
            SINKS=sinks is not None,
            LSE=lse is not None,
            num_warps=4,
            **shape,
        )
        return out
