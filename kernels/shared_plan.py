"""Shared decode, the planner: on the device, once a step, what each team of programs does, and where the partial
results of each request will be. `shared_decode` says how the work is divided.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vtensor.sharing import DEPTH

#: What a tile of rows costs beside its keys, and the shortest share, in tiles of keys: measured, and an estimate.
COST, SHORTEST = 1, 4
#: Of a unit: where it begins on the line, or -1 less its first team if its tiles are side by side; its tiles of keys;
#: the tiles of rows of the units before it on the line; its first token, and one past its last one; where its requests
#: begin in `members`, the first of which is read for all; and how many there are.
UNIT_FIELDS = tl.constexpr(7)
UNIT_BEGIN, UNIT_TILES, UNIT_BEFORE, UNIT_LOW, UNIT_HIGH, UNIT_MEMBERS, UNIT_COUNT = map(tl.constexpr, range(7))
#: Of a team: its part of the line, from and to, and the unit there; the unit of which it has a tile beside others, or
#: -1, which tile, and its part of that, from and to; and its number among the teams that have a part of the line.
TEAM_FIELDS = tl.constexpr(8)
TEAM_AT, TEAM_END, TEAM_UNIT, TEAM_BESIDE, TEAM_TILE, TEAM_FROM, TEAM_TO, TEAM_TURN = map(tl.constexpr, range(8))
#: Of all: what a team has to do at most; the tiles of rows of shared runs on the line; the teams that have tiles side
#: by side; and what these have left of their shares.
LINE_FIELDS = tl.constexpr(4)
LINE_SHARE, LINE_RUN_TILES, LINE_BESIDE, LINE_LEFT = map(tl.constexpr, range(4))
#: Rows whose order one program of `_arrange` finds, and how many rows it looks at in one step; requests whose partial
#: results one of `_locate` finds.
ARRANGED, LOOKED, LOCATED = 32, 256, 8
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
    contexts_ptr,
    chains_ptr,
    members_ptr,
    ranks_ptr,
    starts_ptr,
    shortest_ptr,
    rows,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    ARRANGED: tl.constexpr,
    LOOKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Level by level, the batch's rows in the order of their units: where each unit begins, and who stands where. With
    WINDOWED, also the shortest context of each unit's requests."""
    level = tl.program_id(0)
    row = tl.program_id(1) * ARRANGED + tl.arange(0, ARRANGED)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=0).to(tl.int64)
    mine = tl.load(chains_ptr + slot * DEPTH + level, mask=row < rows, other=-1)
    there = mine >= 0
    rank = tl.zeros([ARRANGED], tl.int32)
    before = tl.zeros([ARRANGED], tl.int32)
    shortest = tl.full([ARRANGED], 2147483647, tl.int32)
    for first in range(0, rows, LOOKED):
        other = first + tl.arange(0, LOOKED)
        theirs = tl.load(slots_ptr + other, mask=other < rows, other=0).to(tl.int64)
        unit = tl.load(chains_ptr + theirs * DEPTH + level, mask=other < rows, other=-1)
        same = (unit[None, :] == mine[:, None]) & (other[None, :] < row[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
        # Rows without a unit, -1, count for nobody: they stand behind `members` of this level.
        before += tl.sum(((unit[None, :] < mine[:, None]) & (unit[None, :] >= 0)).to(tl.int32), 1)
        if WINDOWED:
            context = tl.load(contexts_ptr + other, mask=other < rows, other=0).to(tl.int32)
            of_unit = tl.where(unit[None, :] == mine[:, None], context[None, :], 2147483647)
            shortest = tl.minimum(shortest, tl.min(of_unit, 1))
    start = level * ROWS + before
    tl.store(members_ptr + start + rank, row, mask=there)
    tl.store(ranks_ptr + level * ROWS + row, rank, mask=there)
    tl.store(starts_ptr + mine, start, mask=there & (rank == 0))
    if WINDOWED:
        tl.store(shortest_ptr + mine, shortest, mask=there & (rank == 0))


@triton.jit(do_not_specialize=["rows"])
def _divide(
    slots_ptr,
    contexts_ptr,
    chains_ptr,
    lows_ptr,
    highs_ptr,
    counts_ptr,
    starts_ptr,
    shortest_ptr,
    units_ptr,
    numbers_ptr,
    teams_ptr,
    line_ptr,
    window,
    rows,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TEAMS: tl.constexpr,
    COST: tl.constexpr,
    SHORTEST: tl.constexpr,
    WINDOWED: tl.constexpr,
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
    if WINDOWED:
        # The first tile that the one of its requests with the shortest context sees. A unit behind all windows is none.
        shortest = tl.where(own, high, tl.load(shortest_ptr + lane, mask=run & (count > 0), other=0))
        low = tl.maximum(low, tl.maximum(shortest - 1 - window, 0) // BLOCK_N * BLOCK_N)
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
    work = teams_ptr + team * TEAM_FIELDS
    tl.store(work + TEAM_AT, at)
    tl.store(work + TEAM_END, tl.minimum(at + share - used_here, tl.sum(cost)))
    tl.store(work + TEAM_UNIT, tl.sum((narrow & (end <= at)).to(tl.int32)))
    tl.store(work + TEAM_BESIDE, tl.sum(tl.where(mine, number + 1, 0)) - 1)
    tl.store(work + TEAM_TILE, tl.sum(tl.where(mine, (team - column) % width, 0)))
    tl.store(work + TEAM_FROM, tl.sum(tl.where(mine, inside, 0)))
    tl.store(work + TEAM_TO, tl.sum(tl.where(mine, stop, 0)))
    tl.store(work + TEAM_TURN, team - without)
    if team == 0:
        lined = tl.where(narrow, tile_rows, 0)
        unit = units_ptr + number * UNIT_FIELDS
        tl.store(unit + UNIT_BEGIN, tl.where(beside, -1 - column, end - cost), mask=there)
        tl.store(unit + UNIT_TILES, tiles, mask=there)
        tl.store(unit + UNIT_BEFORE, tl.cumsum(lined, 0) - lined, mask=there)
        tl.store(unit + UNIT_LOW, low, mask=there)
        tl.store(unit + UNIT_HIGH, high, mask=there)
        tl.store(unit + UNIT_MEMBERS, start, mask=there)
        tl.store(unit + UNIT_COUNT, count, mask=there)
        tl.store(numbers_ptr + lane, tl.where(there, number, -1))
        tl.store(line_ptr + LINE_SHARE, share)
        tl.store(line_ptr + LINE_RUN_TILES, tl.sum(tl.where(run, lined, 0)))
        tl.store(line_ptr + LINE_BESIDE, tl.sum(columns))
        all_used = tl.where(beside, full * share + tile_rows * rest, 0)
        tl.store(line_ptr + LINE_LEFT, tl.sum(columns) * share - tl.sum(all_used))


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
    unit = units_ptr + number * UNIT_FIELDS
    begin = tl.load(unit + UNIT_BEGIN, mask=number >= 0, other=0)
    tiles = tl.load(unit + UNIT_TILES, mask=number >= 0, other=0)
    tile = rank // EACH
    tile_rows = (tl.load(unit + UNIT_COUNT, mask=number >= 0, other=0) + EACH - 1) // EACH
    share = tl.load(line_ptr + LINE_SHARE)
    columns = tl.load(line_ptr + LINE_BESIDE)
    # On the line: from the team that has the first key to the one that has the last. Only teams that have tiles side by
    # side have less of the line than a whole share, or nothing, and are then not counted.
    first = begin + tile * (tiles + COST) + COST
    last = first + tiles - 1
    beyond = tl.load(line_ptr + LINE_LEFT)
    team = tl.maximum(first - beyond, 0) // share
    last_team = tl.maximum(last - beyond, 0) // share
    for i in range(0, columns):
        end = tl.load(teams_ptr + i * TEAM_FIELDS + TEAM_END)
        counts = end > tl.load(teams_ptr + i * TEAM_FIELDS + TEAM_AT)
        team += (counts & (end <= first)).to(tl.int32)
        last_team += (counts & (end <= last)).to(tl.int32)
    on_line = begin >= 0
    part = tl.load(unit + UNIT_BEFORE, mask=number >= 0, other=0) + tile + team
    count = tl.where(on_line, last_team - team + 1, (tiles + COST + share - 1) // share)
    count = tl.where(number >= 0, count, 0)
    before = tl.cumsum(count, 1) - count
    tl.store(parts_ptr + row, tl.sum(count, 1)[:, None], mask=row < rows)
    in_run = tl.where(on_line, TEAMS + part, -1 - begin + tile) * (KV_HEADS * BLOCK_M) + rank % EACH * GROUP
    in_own = own_rows + (part - tl.load(line_ptr + LINE_RUN_TILES)) * (KV_HEADS * OWN)
    place = tl.where(level < DEPTH, in_run, in_own)
    step = tl.where(level < DEPTH, tl.where(on_line, 1, tile_rows) * (KV_HEADS * BLOCK_M), KV_HEADS * OWN)
    for i in range(0, tl.max(tl.max(count, 1), 0)):
        tl.store(places_ptr + row * MOST + before + i, place + i * step, mask=i < count)
