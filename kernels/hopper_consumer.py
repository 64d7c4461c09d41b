"""What a consumer of the Hopper kernel does with a work item (`hopper`): scores, weights, and the rows that it writes.

A value that no row may see has weight zero, and zero times NaN is NaN. Looking for such values in every tile would cost
more than it is worth; rows whose sum of weights is a number and whose values are not are computed again, key by key.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sglang_vtensor.kernels.attend import (
    ITEM_CONTEXT,
    ITEM_FIELDS,
    ITEM_HIGH,
    ITEM_LOW,
    ITEM_NEW,
    ITEM_PART,
    ITEM_ROW,
    ITEM_RUN,
    ITEM_TILE,
    RUN_END,
    RUN_FIELDS,
    RUN_SHIFT,
)

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def item_of(work_ptr, at, KV_HEADS: gl.constexpr):
    """The work item and the head that `at` of a schedule stands for, and its keys."""
    item = work_ptr + (at // KV_HEADS) * ITEM_FIELDS
    return item, at % KV_HEADS, gl.load(item + ITEM_LOW), gl.load(item + ITEM_HIGH)


@gluon.jit
def _mask(scores, keys, position, high, n, seen_by_all, BLOCK_N: gl.constexpr):
    """Scores of what a row does not see become -inf, in the tiles that have such."""
    if n + BLOCK_N > seen_by_all:
        at = n + keys
        seen = (at[None, :] <= position[:, None]) & (at < high)[None, :]
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, highest, total, scale, cap, CAP: gl.constexpr):
    """Weights of a tile, and the new maximum, sum and decay of what came before."""
    if CAP:
        x = scores * (scale / cap)
        # -inf stays what it is: nothing is seen there.
        capped = (1 - 2 / (1 + gl.exp2(x * (2 * _LOG2E)))) * (cap * _LOG2E)
        scores = gl.where(scores == float("-inf"), scores, capped)
        factor = 1.0
    else:
        factor = scale
    new_highest = gl.maximum(highest, gl.max(scores, 1) * factor)
    finite = gl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = gl.exp2(scores * factor - finite[:, None])
    decay = gl.exp2(highest - finite)
    return weights, new_highest, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _again(
    q_smem,
    k_ptr,
    v_ptr,
    runs_ptr,
    run,
    position,
    low,
    high,
    scale,
    cap,
    stride_k_token,
    stride_v_token,
    DIM: gl.constexpr,
    CAP: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Attention of a warpgroup's rows, one key at a time: slow, and touching no value that a row does not see."""
    dims = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    q = q_smem.load(LAYOUT).to(gl.float32)
    highest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.full([64, DIM], 0.0, gl.float32, LAYOUT)
    for n in range(low, high):
        run += (n >= gl.load(runs_ptr + run * RUN_FIELDS + RUN_END)).to(gl.int32)
        at = (n + gl.load(runs_ptr + run * RUN_FIELDS + RUN_SHIFT)).to(gl.int64)
        k = gl.load(k_ptr + at * stride_k_token + dims).to(gl.float32)
        v = gl.load(v_ptr + at * stride_v_token + dims).to(gl.float32)
        score = gl.sum(q * k[None, :], 1)
        score = (1 - 2 / (1 + gl.exp2(score * (scale / cap * 2 * _LOG2E)))) * (cap * _LOG2E) if CAP else score * scale
        seen = n <= position
        new_highest = gl.where(seen, gl.maximum(highest, score), highest)
        weight = gl.where(seen, gl.exp2(score - new_highest), 0.0)
        decay = gl.where(highest == new_highest, 1.0, gl.exp2(highest - new_highest))
        acc = acc * decay[:, None] + gl.where(seen[:, None], weight[:, None] * v[None, :], 0.0)
        total = total * decay + weight
        highest = new_highest
    return acc, highest, total


@gluon.jit
def consume(
    q_smem,
    shared,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CAP: gl.constexpr,
    SINKS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """A warpgroup's 64 rows of each tile."""
    (
        q_ptr,
        k_ptr,
        v_ptr,
        out_ptr,
        part_out_ptr,
        part_lse_ptr,
        sink_ptr,
        work_ptr,
        runs_ptr,
        lists_ptr,
        schedule_ptr,
        k_smem,
        v_smem,
        k_full,
        k_empty,
        v_full,
        v_empty,
        scale,
        cap,
        stride_q_token,
        stride_q_head,
        stride_k_token,
        stride_k_head,
        stride_v_token,
        stride_v_head,
        stride_out_token,
        stride_out_head,
    ) = shared
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Eight elements a thread, as many threads along a row as it has.
    along: gl.constexpr = DIM // 8
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // along, along], [4, 1], [1, 0])

    done = 0
    for j in range(gl.load(lists_ptr + gl.program_id(0)), gl.load(lists_ptr + gl.program_id(0) + 1)):
        item, head, low, high = item_of(work_ptr, gl.load(schedule_ptr + j), KV_HEADS)
        first_row = gl.load(item + ITEM_ROW).to(gl.int64)
        new = gl.load(item + ITEM_NEW)
        prefix = gl.load(item + ITEM_CONTEXT) - new
        first_of_tile = gl.load(item + ITEM_TILE) * (64 * CONSUMERS) + 64 * CONSUMER
        part = gl.load(item + ITEM_PART)
        tiles = (high - low + BLOCK_N - 1) // BLOCK_N
        # All of the warpgroup's rows see the keys before this one.
        seen_by_all = gl.minimum(prefix + first_of_tile // GROUP + 1, high)

        rows = first_of_tile + gl.arange(0, 64, gl.SliceLayout(1, rows_layout))
        dims = gl.arange(0, DIM, gl.SliceLayout(0, rows_layout))
        valid = (rows // GROUP < new)[:, None]
        q_rows = (first_row + rows // GROUP) * stride_q_token + (head * GROUP + rows % GROUP) * stride_q_head
        q_smem.store(gl.load(q_ptr + (q_rows[:, None] + dims[None, :]), mask=valid, other=0.0))
        fence_async_shared()

        position = prefix + gl.minimum((first_of_tile + gl.arange(0, 64, s_rows)) // GROUP, new - 1)
        keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        highest = gl.full([64], float("-inf"), gl.float32, s_rows)
        total = gl.full([64], 0.0, gl.float32, s_rows)
        acc = gl.full([64, DIM], 0.0, gl.float32, o_layout)
        none = gl.full([64, BLOCK_N], 0.0, gl.float32, s_layout)

        n = low + (tiles - 1) * BLOCK_N
        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        s_token = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _mask(scores, keys, position, high, n, seen_by_all, BLOCK_N)
        weights, highest, total, decay = _softmax(scores, highest, total, scale, cap, CAP)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        for i in range(done + 1, done + tiles):
            stage = i % STAGES
            before = (i - 1) % STAGES
            n -= BLOCK_N
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            s_token = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            o_token = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            scores = _mask(scores, keys, position, high, n, seen_by_all, BLOCK_N)
            weights, highest, total, decay = _softmax(scores, highest, total, scale, cap, CAP)
            acc, _ = warpgroup_mma_wait(0, deps=[o_token, p])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(decay, o_rows)[:, None]
            p = gl.convert_layout(weights.to(dtype), p_layout)
        done += tiles
        last = (done - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((done - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=[o_token, p])
        mbarrier.arrive(v_empty.index(last), count=1)

        highest = gl.convert_layout(highest, o_rows)
        total = gl.convert_layout(total, o_rows)
        o_row = gl.arange(0, 64, o_rows)
        lost = (acc != acc) & (total == total)[:, None]
        if gl.max(gl.max(lost.to(gl.int32), 1), 0) > 0:
            acc, highest, total = _again(
                q_smem,
                k_ptr + head * stride_k_head,
                v_ptr + head * stride_v_head,
                runs_ptr,
                gl.load(item + ITEM_RUN),
                prefix + gl.minimum((first_of_tile + o_row) // GROUP, new - 1),
                low,
                high,
                scale,
                cap,
                stride_k_token,
                stride_v_token,
                DIM,
                CAP,
                o_layout,
            )

        o_token_of = (first_of_tile + o_row) // GROUP
        o_head = head * GROUP + (first_of_tile + o_row) % GROUP
        o_valid = o_token_of < new
        if part < 0:
            if SINKS:
                sink = gl.load(sink_ptr + o_head).to(gl.float32) * _LOG2E
                with_sink = gl.maximum(highest, sink)
                shrink = gl.exp2(highest - with_sink)
                total = total * shrink + gl.exp2(sink - with_sink)
                acc = acc * shrink[:, None]
                highest = with_sink
            out = acc / gl.where(total == 0.0, 1.0, total)[:, None]
            # Through the memory of q, which nobody reads any more, so that rows are written in long runs.
            q_smem.store(out.to(dtype))
            out_rows = (first_row + rows // GROUP) * stride_out_token + (head * GROUP + rows % GROUP) * stride_out_head
            gl.store(out_ptr + (out_rows[:, None] + dims[None, :]), q_smem.load(rows_layout), mask=valid)
        else:
            at_row = (part.to(gl.int64) * KV_HEADS + head) * (64 * CONSUMERS) + 64 * CONSUMER + o_row
            out = acc / gl.where(total == 0.0, 1.0, total)[:, None]
            o_dims = gl.arange(0, DIM, gl.SliceLayout(0, o_layout))
            gl.store(part_out_ptr + (at_row[:, None] * DIM + o_dims[None, :]), out, mask=o_valid[:, None])
            gl.store(part_lse_ptr + at_row, highest + gl.log2(total), mask=o_valid)
