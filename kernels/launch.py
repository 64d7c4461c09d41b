"""What is checked before a launch, and the launches of prefill."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_vtensor.kernels import attend, hopper, merge
from sglang_vtensor.kernels.compiling import on
from sglang_vtensor.kernels.plan import Config, Plan

DTYPES = (torch.float16, torch.bfloat16)
#: Of keys and values beside those.
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: What keys, and what values, were divided by as they were stored: each one float32 on the device; None: by nothing.
Scales = tuple[torch.Tensor, torch.Tensor] | None
DIMS = (64, 80, 96, 128, 192, 256)
#: Rows that a program of `_merge` takes, and parts that it loads at a time.
MERGED_ROWS, MERGED_PARTS = 2, 16


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    scales: Scales,
    rows: int,
) -> None:
    """Raise `ValueError` for what the kernels do not take, with the value seen and the value wanted."""
    if q.dtype not in DTYPES or q.dtype != out.dtype or k.dtype != v.dtype or k.dtype not in (q.dtype, *FP8):
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, out {out.dtype}: one dtype wanted, float16 or bfloat16; or for "
            "k and v float8_e4m3fn or float8_e5m2"
        )
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape != out.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: (rows, q_heads, "
            "head_dim) twice and (tokens, kv_heads, head_dim) twice wanted"
        )
    if q.shape[2] not in DIMS:
        raise ValueError(f"head_dim {q.shape[2]}: one of {', '.join(map(str, DIMS))} wanted")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} KV heads: a multiple wanted")
    if q.shape[0] != rows:
        raise ValueError(f"q has {q.shape[0]} rows, the plan {rows}")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last one must be 1")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    for factor in scales or ():
        if factor.numel() != 1 or factor.dtype != torch.float32 or factor.device != q.device:
            raise ValueError(
                f"a scale is {tuple(factor.shape)} {factor.dtype} on {factor.device}: one float32 on {q.device} wanted"
            )
    if sinks is not None and (sinks.shape != (q.shape[1],) or not sinks.is_contiguous()):
        raise ValueError(f"sinks are {tuple(sinks.shape)}: ({q.shape[1]},) wanted")


def check_window(window: int | None) -> None:
    """Raise `ValueError` for what is no window."""
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens: at least 1 wanted, or None where all tokens are seen")


def narrow(k: torch.Tensor, config: Config) -> bool:
    """Whether products of queries and keys are of the keys' type."""
    return config.narrow and k.dtype == torch.float8_e4m3fn


def base_two(scale: float, soft_cap: float) -> float:
    """The scale of scores in base 2, as `attend._scores` takes it."""
    return scale if soft_cap > 0 else scale * math.log2(math.e)


def tile_descriptors(k: torch.Tensor, v: torch.Tensor, config: Config) -> tuple[Any, ...]:
    """What tiles of keys and values are loaded by; the tensors, which are not read so, where it is not by TMA."""
    if not config.tma:
        return k, v
    box = [config.block_n, 1, triton.next_power_of_2(k.shape[2])]
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (k, v))


def workspace(parts: int, kv_heads: int, config: Config, dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What partial results are left in: values and log-sum-exps, float32."""
    rows = parts * kv_heads * config.block_m
    out = torch.empty(rows * triton.next_power_of_2(dim), dtype=torch.float32, device=device)
    return out, torch.empty(rows, dtype=torch.float32, device=device)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    *,
    partial: tuple[torch.Tensor, ...],
    scale: float,
    soft_cap: float,
    scales: Scales,
) -> None:
    """Run the two kernels. Nothing is checked, and nothing waits."""
    kv_heads, dim = k.shape[1:]
    config = plan.config
    # Sinks that are not there are not touched, but a pointer they must be.
    outputs = (out, *partial, partial[1] if sinks is None else sinks)
    out_strides = (out.stride(0), out.stride(1))
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *out_strides)
    shape = {"KV_HEADS": kv_heads, "GROUP": q.shape[1] // kv_heads, "DIM": dim, "SINKS": sinks is not None}
    cap = soft_cap > 0
    scale = base_two(scale, soft_cap)
    padded = triton.next_power_of_2(dim)
    if config.hopper:
        on(hopper._attend_hopper, (plan.lists.shape[0] - 1,))(
            q,
            k,
            v,
            *hopper.descriptors(k, v, config),
            *outputs,
            plan.work,
            plan.runs,
            plan.lists,
            plan.schedule,
            scale,
            soft_cap,
            *strides,
            BLOCK_N=config.block_n,
            CAP=cap,
            **shape,
            **hopper.options(config),
        )
    else:
        on(attend._attend, (plan.work.shape[0] * kv_heads,))(
            q,
            k,
            v,
            *tile_descriptors(k, v, config),
            *outputs,
            plan.work,
            plan.runs,
            *(scales or partial),
            scale,
            soft_cap,
            plan.window or 0,
            *strides,
            DIM_PADDED=padded,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            CAP=cap,
            WINDOWED=plan.window is not None,
            SCALED=scales is not None,
            NARROW=narrow(k, config),
            TMA=config.tma,
            WIDE=q.device.type == "cpu" and k.dtype is torch.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
            **shape,
        )
    if plan.merges.shape[0]:
        on(merge._merge, (plan.merges.shape[0] * kv_heads, config.block_m // MERGED_ROWS))(
            *outputs,
            plan.merges,
            *out_strides,
            DIM_PADDED=padded,
            BLOCK_M=config.block_m,
            BLOCK_R=MERGED_ROWS,
            PARTS=MERGED_PARTS,
            num_warps=4,
            **shape,
        )
