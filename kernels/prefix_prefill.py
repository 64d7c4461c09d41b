"""Prefix-prefill: the new tokens of each request attend to its whole context, read straight from its runs.

plan = plan_prefill(new, runs, q_heads=32, kv_heads=8, head_dim=128, device=q.device, page_tokens=128)    once a batch
prefix_prefill(q, k, v, plan, scale=scale)                                                                once a layer
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.launch import FP8, Scales, check, check_window, launch, workspace
from sglang_vtensor.kernels.plan import Config, Plan
from sglang_vtensor.kernels.plan import plan_prefill as _plan
from sglang_vtensor.layout import SLOTS

#: Of a layer: its soft cap, scales and sinks.
Kind = tuple[float, Scales, torch.Tensor | None]

__all__ = ["Config", "Kind", "Plan", "plan_prefill", "prefill_calls", "prefix_prefill"]


def plan_prefill(
    new: Sequence[int],
    runs: Sequence[Sequence[tuple[int, int]]],
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    page_tokens: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    config: Config | None = None,
) -> Plan:
    """How a ragged batch is divided over the GPU; the same for all layers of one geometry and one window.

    Request `i` has `new[i]` new tokens at the end of a context that is `runs[i]`: of each run the first slot and the
    tokens. All but the last run of a context are whole pages of `page_tokens`, which tiles of keys divide. 0 new tokens
    are no work. A page is mapped whole, so that a context may be read to the end of its last page: pages of whole tiles
    allow the kernel for Hopper, which loads such; it reads no FP8 (`kv_dtype`, of the cache), and has no windows.
    `config` is chosen from the table of configurations.

    With a `window`, as SGLang's `sliding_window_size` counts it, a token sees so many tokens before it, and itself.
    Pages that are behind the window of a request's first new token are not read, and need no memory.
    Raises `ValueError` for lengths that cannot be.
    """
    check_window(window)
    group = q_heads // kv_heads
    for request, some in enumerate(runs):
        if any(first < 0 or tokens < 1 or first + tokens > SLOTS for first, tokens in some):
            raise ValueError(
                f"request {request} has runs {list(some)}: at least 1 token in each, in slots 0 to {SLOTS - 1}, "
                "wanted; leave out runs without tokens"
            )
        if any(tokens % page_tokens for _, tokens in some[:-1]):
            raise ValueError(
                f"request {request} has runs {list(some)}: whole pages of {page_tokens} tokens in all but the last "
                "wanted; divide contexts at page bounds"
            )
    if config is None:
        contexts = [sum(tokens for _, tokens in some) for some in runs]
        context = sum(a * b for a, b in zip(new, contexts, strict=False)) / max(1, sum(new))
        if window is not None:
            context = min(context, window + sum(new) / max(1, len(new)))
        hopper = page_tokens % configs.HOPPER_TILE == 0 and kv_dtype not in FP8 and window is None
        config = configs.prefill(max(new, default=0) * group, context, head_dim, configs.capability(device), hopper)
    if config.hopper and window is not None:
        raise ValueError(f"a window of {window} tokens, and the kernel for Hopper, which has none: leave config out")
    if page_tokens % config.block_n and (config.hopper or any(len(some) > 1 for some in runs)):
        raise ValueError(
            f"tiles of {config.block_n} keys, and pages of {page_tokens} tokens: a tile would cross two runs. Use "
            f"pages of a multiple of {config.block_n} tokens"
        )
    slots = configs.multiprocessors(device) * config.occupancy
    return _plan(new, runs, group=group, kv_heads=kv_heads, config=config, slots=slots, device=device, window=window)


def prefix_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scales: Scales = None,
) -> torch.Tensor:
    """Causal attention of the new tokens of every request over its context.

    Args:
        q: `(rows, q_heads, head_dim)`, float16 or bfloat16: the new tokens of all requests, one after another.
        k, v: `(slots, kv_heads, head_dim)` of that dtype, or float8_e4m3fn or float8_e5m2; any token and head stride.
        plan: of `plan_prefill`, for these lengths and this dtype of k.
        scale: what scores are multiplied by, usually `head_dim ** -0.5`.
        out: as `q`; made if None.
        soft_cap: if above 0, scores become `soft_cap * tanh(score / soft_cap)`.
        sinks: `(q_heads,)`: a score for each head that takes weight and gives no value.
        scales: what keys and what values were divided by as they were stored, each one float32 on the device; read as
            the kernel runs, in a CUDA graph too.

    Returns `out`. Raises `ValueError`, before anything is launched, for what it does not take.
    """
    out = torch.empty_like(q) if out is None else out
    check(q, k, v, out, sinks, scales, plan.rows)
    if plan.config.hopper and (k.dtype in FP8 or scales is not None):
        raise ValueError(
            f"keys of {k.dtype} {'without' if scales is None else 'with'} scales, and a plan for the kernel for "
            f"Hopper, which reads neither FP8 nor scales: plan with kv_dtype={FP8[0]}"
        )
    if plan.work.shape[0]:
        partial = workspace(plan.parts, k.shape[1], plan.config, k.shape[2], q.device)
        launch(q, k, v, out, sinks, plan, partial=partial, scale=scale, soft_cap=soft_cap, scales=scales)
    return out


def prefill_calls(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_dtype: torch.dtype,
    q_heads: int,
    max_tokens: int,
    page_tokens: int,
    window: int | None = None,
    kinds: Collection[Kind] = ((0.0, None, None),),
) -> dict[Config, list[Callable[[], torch.Tensor]]]:
    """Calls that need every kernel of every class of shapes up to `max_tokens`, by their configuration: to be compiled
    ahead, so that nothing compiles while serving. `k` and `v` are those that will be read; only their first page, the
    padding one, is read by these calls. `window` is that of the layers whose keys these are, and `kinds` are a soft
    cap, scales and sinks for each kind of them, as `prefix_prefill` takes them.
    """
    kv_heads, dim = k.shape[1:]
    plans: dict[Config, Plan] = {}
    for rows in (1, 16, 64, 256):
        new = max(1, rows // (q_heads // kv_heads))
        for context in (max_tokens, 256):  # the long one first: it has parts to merge
            if new <= context <= max_tokens:
                pages, rest = divmod(context, page_tokens)
                plan = plan_prefill(
                    [new],
                    [[(0, page_tokens)] * pages + [(0, rest)] * bool(rest)],
                    q_heads=q_heads,
                    kv_heads=kv_heads,
                    head_dim=dim,
                    device=k.device,
                    page_tokens=page_tokens,
                    kv_dtype=k.dtype,
                    window=window,
                )
                plans.setdefault(plan.config, plan)

    def calls(plan: Plan) -> Iterator[Callable[[], torch.Tensor]]:
        q = torch.zeros(plan.rows, q_heads, dim, dtype=q_dtype, device=k.device)
        for soft_cap, scales, sinks in kinds:
            kind = {"soft_cap": soft_cap, "scales": scales, "sinks": sinks}
            yield partial(prefix_prefill, q, k, v, plan, scale=dim**-0.5, **kind)

    return {config: list(calls(plan)) for config, plan in plans.items()}
