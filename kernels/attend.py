"""Attention of packed query rows over contexts that are runs of tokens: the Triton kernels beneath prefill and decode.

A run is contiguous memory: token `n` of it is in slot `shift + n`, at a constant stride, whatever lies between two
tokens (other layers, other heads). So a tile of keys is one rectangular load: tiles divide pages, and a run is whole
pages, but for the end of the last one.

Keys and values may be of an 8-bit type: products are those of float16 then, which has all of their values, and
conversion to it is one instruction for two of them. Queries are converted to it, and saturate, while
a NaN stays one; or, with NARROW, to the type of the keys, and their products are of that.

The query heads that share a KV head are packed into the rows of a tile, heads fastest:

    row r of a request  =  token r // group, query head  kv_head * group + r % group

With WINDOWED, a token sees `window` tokens before it, beside itself. The plan begins with the first tile that some row
of a tile sees; nothing before that is read, and needs no memory. Sinks are scores that take weight and give no value.

A work item is one tile of rows against some keys. A tile whose keys are divided into parts leaves a partial result of
each part, in float32 with its log-sum-exp, and `merge` puts them together. Scores are kept in base 2.

The plan is int32 rows, made on the host: of work items the fields `ITEM_*`, of merges `MERGE_*`, of runs `RUN_*`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Of a work item: the first row of its request in q; the request's new tokens, and all of them; which BLOCK_M rows of
#: the request; its first key, and one past its last one (equal: nothing to do); the runs that the first and the last
#: key are in; and where the partial result goes, or -1.
ITEM_FIELDS = tl.constexpr(9)
ITEM_ROW, ITEM_NEW, ITEM_CONTEXT, ITEM_TILE, ITEM_LOW, ITEM_HIGH, ITEM_RUN, ITEM_LAST_RUN, ITEM_PART = map(
    tl.constexpr, range(9)
)
#: Of a merge: the first row, the new tokens and the tile as above; its first part; and how many there are.
MERGE_FIELDS = tl.constexpr(5)
MERGE_ROW, MERGE_NEW, MERGE_TILE, MERGE_PART, MERGE_PARTS = map(tl.constexpr, range(5))
#: Of a run: the position of its first token in its context, one past that of its last one, and what is to be added to a
#: position for its slot.
RUN_FIELDS = tl.constexpr(3)
RUN_START, RUN_END, RUN_SHIFT = map(tl.constexpr, range(3))

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """`acc + a @ b` in float32. WIDE is for Triton's interpreter, which would multiply the bits of bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _widened(x):
    """Keys or values as they are multiplied."""
    return x.to(tl.float16) if x.dtype.primitive_bitwidth == 8 else x


@triton.jit
def _queries(q, cache: tl.constexpr, NARROW: tl.constexpr):
    """Queries as they are multiplied with keys of that type. NARROW is for float8_e4m3fn."""
    if NARROW:
        q = tl.clamp(q.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL).to(cache)
    elif cache.primitive_bitwidth == 8 and q.dtype != tl.float16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0, tl.PropagateNan.ALL).to(tl.float16)
    return q


@triton.jit
def _divided(acc, total, v_scale_ptr, SCALED: tl.constexpr):
    """The result of rows that have seen all of their keys."""
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SCALED:
        out *= tl.load(v_scale_ptr)
    return out


@triton.jit
def _inside(valid, dims, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """The mask of a block of rows: those that are valid, and of a padded head dimension what is there."""
    mask = valid[:, None]
    if DIM != DIM_PADDED:
        mask = mask & (dims < DIM)[None, :]
    return mask


@triton.jit
def _scores(q, k, scale, cap, CAP: tl.constexpr, WIDE: tl.constexpr):
    """Scores in base 2 before the mask, float32. `scale` has log2(e) in it, unless there is a soft cap."""
    if q.dtype != k.dtype:
        k = _widened(k)
    scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), WIDE)
    if CAP:
        # tanh by exp2, which every target has: 1 - 2 / (1 + e^2x) is -1 and 1 at the ends, without a NaN.
        x = scores * (scale / cap)
        scores = (1 - 2 / (1 + tl.exp2(x * (2 * _LOG2E)))) * (cap * _LOG2E)
    else:
        scores = scores * scale
    return scores


@triton.jit
def _whole_tiles(
    q,
    k_head,
    v_head,
    k_tiles,
    v_tiles,
    pages_ptr,
    run,
    head,
    low,
    high,
    highest,
    total,
    acc,
    scale,
    cap,
    stride_k_token,
    stride_v_token,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add keys `low` to `high`, whole tiles that every row sees, to the maximum, the total and the result of rows. The
    first one is in `run` of the runs at `pages_ptr`; or, with PAGE, that is a page table. Where a tile begins is read
    one tile ahead: a load in front of a load would take one of Triton's stages. Returns also the run of `high`."""
    dims = tl.arange(0, DIM_PADDED)
    if PAGE:
        begin = tl.load(pages_ptr + low // PAGE) * PAGE + low % PAGE
        end = high
    else:
        begin = low + tl.load(pages_ptr + run * RUN_FIELDS + RUN_SHIFT)
        end = tl.load(pages_ptr + run * RUN_FIELDS + RUN_END)
    for n in range(low, high, BLOCK_N):
        if TMA:
            start = begin.to(tl.int32)
            k = k_tiles.load([start, head, 0]).reshape(BLOCK_N, DIM_PADDED)
        else:
            at = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
            k_at = k_head + at[:, None] * stride_k_token + dims[None, :]
            k = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(k_at)
        scores = _scores(q, k, scale, cap, CAP, WIDE)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        highest = new_highest
        if TMA:
            v = v_tiles.load([start, head, 0]).reshape(BLOCK_N, DIM_PADDED)
        else:
            v_at = v_head + at[:, None] * stride_v_token + dims[None, :]
            v = tl.load(v_at, mask=(dims < DIM)[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(v_at)
        v = _widened(v)
        acc = _dot(weights.to(v.dtype), v, acc, WIDE)
        begin = n + BLOCK_N
        if PAGE:
            begin = tl.load(pages_ptr + begin // PAGE) * PAGE + begin % PAGE
        else:
            run += (begin >= end).to(tl.int32)
            begin += tl.load(pages_ptr + run * RUN_FIELDS + RUN_SHIFT)
            end = tl.load(pages_ptr + run * RUN_FIELDS + RUN_END)
    return highest, total, acc, run


@triton.jit
def _tile_in_part(
    q,
    k_head,
    v_head,
    at,
    loaded,
    seen,
    highest,
    total,
    acc,
    scale,
    cap,
    stride_k_token,
    stride_v_token,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add a tile of keys, in slots `at`, to the maximum, the total and the result of rows: `seen` says which row sees
    which key. Keys that are not `loaded` are seen by no row."""
    dims = tl.arange(0, DIM_PADDED)
    mask = _inside(loaded, dims, DIM, DIM_PADDED)
    k = tl.load(k_head + at[:, None] * stride_k_token + dims[None, :], mask=mask, other=0.0)
    v = _widened(tl.load(v_head + at[:, None] * stride_v_token + dims[None, :], mask=mask, other=0.0))
    scores = tl.where(seen, _scores(q, k, scale, cap, CAP, WIDE), float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen nothing yet has -inf for its maximum, and -inf - -inf is no number.
    finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(highest - finite)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    # Zero times infinity, or NaN, is NaN: a bad value must not reach the rows that do not see it.
    values = v.to(tl.float32)
    bad = (values - values) != 0
    if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
        touched = tl.dot(seen.to(tl.float16), bad.to(tl.float16)) > 0
        acc = tl.where(touched, float("nan"), acc)
        v = tl.where(bad, 0.0, v)
    return new_highest, total, _dot(weights.to(v.dtype), v, acc, WIDE)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    work_ptr,
    runs_ptr,
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
    stride_out_token,
    stride_out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    NARROW: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = work_ptr + (tl.program_id(0) // KV_HEADS) * ITEM_FIELDS
    head = tl.program_id(0) % KV_HEADS
    low = tl.load(item + ITEM_LOW)
    high = tl.load(item + ITEM_HIGH)
    if low >= high:
        return
    first_row = tl.load(item + ITEM_ROW).to(tl.int64)
    new = tl.load(item + ITEM_NEW)
    context = tl.load(item + ITEM_CONTEXT)
    tile = tl.load(item + ITEM_TILE)
    run = tl.load(item + ITEM_RUN)
    part = tl.load(item + ITEM_PART)
    if SCALED:
        scale *= tl.load(k_scale_ptr)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // GROUP
    valid = token < new
    q_head = head * GROUP + rows % GROUP
    # The last key that a row sees is its own token. Rows past the end follow the last token, and are not stored.
    position = context - new + tl.minimum(token, new - 1)
    first_seen = context - new + tile * BLOCK_M // GROUP - window
    dims = tl.arange(0, DIM_PADDED)
    q_rows = q_ptr + (first_row + token) * stride_q_token + q_head * stride_q_head
    q_mask = _inside(valid, dims, DIM, DIM_PADDED)
    q = _queries(tl.load(q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0), k_ptr.dtype.element_ty, NARROW)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    k_head = k_ptr + head * stride_k_head
    v_head = v_ptr + head * stride_v_head

    # Whole tiles of keys that every row sees are from `edge` to `middle`.
    seen_by_all = tl.minimum(context - new + tile * BLOCK_M // GROUP + 1, high)
    middle = low + tl.maximum(seen_by_all - low, 0) // BLOCK_N * BLOCK_N
    edge = low
    if WINDOWED:
        last = context - new + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, new - 1)
        edge = low + (tl.maximum(last - window - low, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        edge = tl.minimum(edge, middle)
        # Tiles that are behind the window of some row. What is behind those of all rows is not loaded.
        for n in tl.range(low, edge, BLOCK_N, num_stages=1):
            run += (n >= tl.load(runs_ptr + run * RUN_FIELDS + RUN_END)).to(tl.int32)
            keys = n + tl.arange(0, BLOCK_N)
            at = (keys + tl.load(runs_ptr + run * RUN_FIELDS + RUN_SHIFT)).to(tl.int64)
            highest, total, acc = _tile_in_part(
                q,
                k_head,
                v_head,
                at,
                keys >= first_seen,
                keys[None, :] >= position[:, None] - window,
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
        run += (edge >= tl.load(runs_ptr + run * RUN_FIELDS + RUN_END)).to(tl.int32)
    highest, total, acc, run = _whole_tiles(
        q,
        k_head,
        v_head,
        k_tiles,
        v_tiles,
        runs_ptr,
        run,
        head,
        edge,
        middle,
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
        0,
        CAP,
        TMA,
        WIDE,
    )

    # Tiles that some row sees only in part. What lies behind the context is not loaded.
    for n in tl.range(middle, high, BLOCK_N, num_stages=1):
        run += (n >= tl.load(runs_ptr + run * RUN_FIELDS + RUN_END)).to(tl.int32)
        keys = n + tl.arange(0, BLOCK_N)
        at = (keys + tl.load(runs_ptr + run * RUN_FIELDS + RUN_SHIFT)).to(tl.int64)
        loaded = keys < high
        seen = (keys[None, :] <= position[:, None]) & loaded[None, :]
        if WINDOWED:
            loaded = loaded & (keys >= first_seen)
            seen = seen & (keys[None, :] >= position[:, None] - window)
        highest, total, acc = _tile_in_part(
            q,
            k_head,
            v_head,
            at,
            loaded,
            seen,
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

    if part < 0:
        if SINKS:
            sink = tl.load(sink_ptr + q_head).to(tl.float32) * _LOG2E
            with_sink = tl.maximum(highest, sink)
            decay = tl.exp2(highest - with_sink)
            total = total * decay + tl.exp2(sink - with_sink)
            acc = acc * decay[:, None]
            highest = with_sink
        out = _divided(acc, total, v_scale_ptr, SCALED)
        out_rows = out_ptr + (first_row + token) * stride_out_token + q_head * stride_out_head
        tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        at_row = (part.to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        out = _divided(acc, total, v_scale_ptr, SCALED)
        tl.store(part_out_ptr + at_row[:, None] * DIM_PADDED + dims[None, :], out, mask=q_mask)
        tl.store(part_lse_ptr + at_row, highest + tl.log2(total), mask=valid)
