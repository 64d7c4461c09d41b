"""Prefix-prefill for Hopper in Gluon, Triton's lower level: a warp loads, one or two warpgroups of 64 rows compute.

The same work items and the same results as `attend._attend`. A program goes through a list of them: the loader is
already at the next item while the last one is written. What differs also is who waits for whom:

    loader      K(0) V(0) K(1) V(1) ...      by TMA, as far ahead as there are stages
    a consumer  S(0) = Q K(0);  then, while the tensor cores compute S(i) = Q K(i) and out += P(i-1) V(i-1),
                the softmax of S(i) as soon as it is there: P(i)

Two consumers share what is loaded, and are otherwise on their own: one computes weights while the other multiplies.
With one of them two programs run on a multiprocessor, which suits few rows and short contexts.

Tiles are taken from the last to the first, so that those that need a mask come first; the loader walks the runs of a
context in that order too. A tile is loaded whole: what is behind a context, up to a multiple of the tile, must be
mapped (it is: pages are whole tiles).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_vtensor.kernels.attend import ITEM_LAST_RUN, RUN_FIELDS, RUN_SHIFT, RUN_START
from sglang_vtensor.kernels.hopper_consumer import consume, item_of
from sglang_vtensor.kernels.plan import Config


@gluon.jit
def _load(
    loads,
    work_ptr,
    runs_ptr,
    lists_ptr,
    schedule_ptr,
    KV_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every tile of K and V of every item, into whatever stage is free."""
    k_tiles, v_tiles, k_smem, v_smem, k_full, k_empty, v_full, v_empty = loads
    loaded = 0
    for j in range(gl.load(lists_ptr + gl.program_id(0)), gl.load(lists_ptr + gl.program_id(0) + 1)):
        item, head, low, high = item_of(work_ptr, gl.load(schedule_ptr + j), KV_HEADS)
        tiles = (high - low + BLOCK_N - 1) // BLOCK_N
        # The last tile is in the run of the last key. One tile before another is in the same run, or in the one before.
        run = gl.load(item + ITEM_LAST_RUN)
        n = low + tiles * BLOCK_N
        for i in range(tiles):
            # Added here: Triton 3.6 takes a carried number for dead that is only a bound of an inner loop.
            stage = (loaded + i) % STAGES
            phase = ((loaded + i) // STAGES) & 1
            n -= BLOCK_N
            run -= (n < gl.load(runs_ptr + run * RUN_FIELDS + RUN_START)).to(gl.int32)
            at = n + gl.load(runs_ptr + run * RUN_FIELDS + RUN_SHIFT)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(k_tiles, [at, head * DIM], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(v_tiles, [at, head * DIM], v_full.index(stage), v_smem.index(stage))
        loaded += tiles


@gluon.jit
def _attend_hopper(
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
    lists_ptr,
    schedule_ptr,
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
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CAP: gl.constexpr,
    SINKS: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, DIM], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], k_tiles.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], v_tiles.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    shared = (
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
    )
    loads = (k_tiles, v_tiles, k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (
                    consume,
                    (q_smem.index(0), shared, KV_HEADS, GROUP, DIM, BLOCK_N, STAGES, CAP, SINKS, CONSUMERS, 0),
                ),
                (_load, (loads, work_ptr, runs_ptr, lists_ptr, schedule_ptr, KV_HEADS, DIM, BLOCK_N, STAGES)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (q_smem.index(0), shared, KV_HEADS, GROUP, DIM, BLOCK_N, STAGES, CAP, SINKS, CONSUMERS, 0),
                ),
                (
                    consume,
                    (q_smem.index(1), shared, KV_HEADS, GROUP, DIM, BLOCK_N, STAGES, CAP, SINKS, CONSUMERS, 1),
                ),
                (_load, (loads, work_ptr, runs_ptr, lists_ptr, schedule_ptr, KV_HEADS, DIM, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )


def descriptors(k: torch.Tensor, v: torch.Tensor, config: Config) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tiles of K and V for the copy engine. Raises `ValueError` if the heads of a token do not lie behind one another,
    which they need."""
    kv_heads, dim = k.shape[1:]
    if k.stride(1) != dim or v.stride(1) != dim:
        raise ValueError(f"k has strides {k.stride()}, v {v.stride()}: heads {dim} elements apart wanted")
    box = [config.block_n, dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.float16 if k.dtype is torch.float16 else gl.bfloat16)
    k_tiles, v_tiles = (
        TensorDescriptor(x, [x.shape[0], kv_heads * dim], [x.stride(0), 1], box, layout) for x in (k, v)
    )
    return k_tiles, v_tiles


def options(config: Config) -> dict[str, int]:
    """What a configuration is to this kernel. With one consumer, two programs share a multiprocessor's registers."""
    consumers = config.block_m // 64
    registers = {"maxnreg": 128} if consumers == 1 else {}
    return {"STAGES": config.num_stages, "CONSUMERS": consumers, "num_warps": 4} | registers
