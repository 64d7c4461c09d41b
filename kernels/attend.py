"""Attention of packed query rows over contiguous contexts: the Triton kernels beneath prefill and decode.

A request's context is a run of tokens at a constant stride: token `n` of KV head `h` is `k[first + n, h]`, whatever
lies between two tokens (other layers, other heads). There is no page table, so a tile of keys is one rectangular load.

The query heads that share a KV head are packed into the rows of a tile, heads fastest:

    row r of a request  =  token r // group, query head  kv_head * group + r % group

A work item is one tile of rows against a run of keys. A tile whose keys are divided into parts leaves a partial result
of each part, in float32 with its log-sum-exp, and `_merge` puts them together. Scores are kept in base 2.

Work items are int32 rows, made on the host (prefill) or on the device (decode):

    0 FIRST_ROW     first row of the request in q          4 TILE   which BLOCK_M rows of the request
    1 NEW           its new tokens                         5 LOW    first key
    2 CONTEXT       its tokens, the new ones included      6 HIGH   one past the last key; LOW: nothing to do
    3 REQUEST       its index in `first`                   7 PART   where the partial result goes, or -1

and of `_merge`:

    0 FIRST_ROW     1 NEW     2 TILE     3 PART, the first one     4 PARTS: below 2 nothing to do
"""

from __future__ import annotations

import triton
import triton.language as tl

WORK_FIELDS = 8
MERGE_FIELDS = 5

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """`acc + a @ b` in float32. WIDE is for Triton's interpreter, which would multiply the bits of bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


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
    first,
    pages_ptr,
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
    """Add keys `low` to `high`, whole tiles that every row sees, to the maximum, the total and the result of rows. They
    follow one another from `first` on, which `k_head` and `v_head` are at; or, with PAGE, where `pages_ptr` says, which
    is read one tile ahead: a load in front of a load would take one of Triton's stages."""
    dims = tl.arange(0, DIM_PADDED)
    begin = low
    if PAGE:
        begin = tl.load(pages_ptr + low // PAGE) * PAGE + low % PAGE
    for n in range(low, high, BLOCK_N):
        if TMA:
            start = (first + begin).to(tl.int32)
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
        acc = _dot(weights.to(v.dtype), v, acc, WIDE)
        begin = n + BLOCK_N
        if PAGE:
            begin = tl.load(pages_ptr + begin // PAGE) * PAGE + begin % PAGE
    return highest, total, acc


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
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    work_ptr,
    first_ptr,
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
    stride_lse_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = work_ptr + (tl.program_id(0) // KV_HEADS) * 8
    head = tl.program_id(0) % KV_HEADS
    low = tl.load(item + 5)
    high = tl.load(item + 6)
    if low >= high:
        return
    first_row = tl.load(item).to(tl.int64)
    new = tl.load(item + 1)
    context = tl.load(item + 2)
    request = tl.load(item + 3)
    tile = tl.load(item + 4)
    part = tl.load(item + 7)
    first = tl.load(first_ptr + request)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // GROUP
    valid = token < new
    q_head = head * GROUP + rows % GROUP
    # The last key that a row sees is its own token. Rows past the end follow the last token, and are not stored.
    position = context - new + tl.minimum(token, new - 1)
    dims = tl.arange(0, DIM_PADDED)
    q_rows = q_ptr + (first_row + token) * stride_q_token + q_head * stride_q_head
    q_mask = _inside(valid, dims, DIM, DIM_PADDED)
    q = tl.load(q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    k_head = k_ptr + first * stride_k_token + head * stride_k_head
    v_head = v_ptr + first * stride_v_token + head * stride_v_head

    # Whole tiles of keys that every row sees.
    middle = low
    if not WINDOW:
        seen_by_all = tl.minimum(context - new + tile * BLOCK_M // GROUP + 1, high)
        middle = low + tl.maximum(seen_by_all - low, 0) // BLOCK_N * BLOCK_N
        highest, total, acc = _whole_tiles(
            q,
            k_head,
            v_head,
            k_tiles,
            v_tiles,
            first,
            first_ptr,
            head,
            low,
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

    # Tiles that some row sees only in part. What lies behind the context is neither loaded nor mapped.
    for n in tl.range(middle, high, BLOCK_N, num_stages=1):
        keys = n + tl.arange(0, BLOCK_N)
        mask = _inside(keys < high, dims, DIM, DIM_PADDED)
        at = keys.to(tl.int64)
        k = tl.load(k_head + at[:, None] * stride_k_token + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_head + at[:, None] * stride_v_token + dims[None, :], mask=mask, other=0.0)
        seen = (keys[None, :] <= position[:, None]) & (keys < high)[None, :]
        if WINDOW:
            seen = seen & (keys[None, :] >= position[:, None] - window)
        scores = tl.where(seen, _scores(q, k, scale, cap, CAP, WIDE), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf for its maximum, and -inf - -inf is no number.
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(highest - finite)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        highest = new_highest
        # Zero times infinity, or NaN, is NaN: a bad value must not reach the rows that do not see it.
        values = v.to(tl.float32)
        bad = (values - values) != 0
        if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
            touched = tl.dot(seen.to(tl.float16), bad.to(tl.float16)) > 0
            acc = tl.where(touched, float("nan"), acc)
            v = tl.where(bad, 0.0, v)
        acc = _dot(weights.to(v.dtype), v, acc, WIDE)

    if part < 0:
        if SINKS:
            sink = tl.load(sink_ptr + q_head).to(tl.float32) * _LOG2E
            with_sink = tl.maximum(highest, sink)
            decay = tl.exp2(highest - with_sink)
            total = total * decay + tl.exp2(sink - with_sink)
            acc = acc * decay[:, None]
            highest = with_sink
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = out_ptr + (first_row + token) * stride_out_token + q_head * stride_out_head
        tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)
        if LSE:
            lse = (highest + tl.log2(total)) * _LN2
            tl.store(lse_ptr + (first_row + token) * stride_lse_token + q_head, lse, mask=valid)
    else:
        at_row = (part.to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(part_out_ptr + at_row[:, None] * DIM_PADDED + dims[None, :], out, mask=q_mask)
        tl.store(part_lse_ptr + at_row, highest + tl.log2(total), mask=valid)


@triton.jit
def _merge(
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    merge_ptr,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):
    """Put the parts of one tile together: BLOCK_R of its rows a program, PARTS of its parts at a time."""
    item = merge_ptr + (tl.program_id(0) // KV_HEADS) * 5
    head = tl.program_id(0) % KV_HEADS
    parts = tl.load(item + 4)
    if parts < 2:
        return
    first_row = tl.load(item).to(tl.int64)
    new = tl.load(item + 1)
    tile = tl.load(item + 2)
    part = tl.load(item + 3).to(tl.int64)
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
    if LSE:
        tl.store(
            lse_ptr + (first_row + token) * stride_lse_token + q_head, (highest + tl.log2(total)) * _LN2, mask=valid
        )
