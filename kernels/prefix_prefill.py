"""Prefix-prefill: the new tokens of each request attend to its whole context, read straight from its segment.

plan = plan_prefill(new, contexts, q_heads=32, kv_heads=8, head_dim=128, device=q.device)    once a batch
prefix_prefill(q, k, v, first, plan, scale=scale)                                            once a layer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.launch import check, check_first, launch, workspace
from sglang_vtensor.kernels.plan import Config, Plan
from sglang_vtensor.kernels.plan import plan_prefill as _plan

__all__ = ["Config", "Plan", "compile_prefill", "plan_prefill", "prefix_prefill"]


def plan_prefill(
    new: Sequence[int],
    contexts: Sequence[int],
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    window: int = -1,
    readable: int = 1,
    config: Config | None = None,
) -> Plan:
    """How a ragged batch is divided over the GPU; the same for all layers of one geometry.

    Request `i` has `new[i]` new tokens at the end of a context of `contexts[i]`; 0 new tokens are no work. `window`, if
    0 or more, is how many tokens before itself a token sees. `readable` says that every context may be read up to the
    next multiple of so many tokens, whatever stands there: 128 of them allow the kernel for Hopper, which loads whole
    tiles. `config` is chosen from the table of configurations.
    Raises `ValueError` for lengths that cannot be.
    """
    group = q_heads // kv_heads
    if config is None:
        context = sum(a * b for a, b in zip(new, contexts, strict=False)) / max(1, sum(new))
        hopper = readable % configs.HOPPER_TILE == 0 and window < 0
        config = configs.prefill(max(new, default=0) * group, context, head_dim, configs.capability(device), hopper)
    slots = configs.multiprocessors(device) * config.occupancy
    return _plan(
        new, contexts, group=group, kv_heads=kv_heads, config=config, slots=slots, device=device, window=window
    )


def prefix_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the new tokens of every request over its context.

    Args:
        q: `(rows, q_heads, head_dim)`, float16 or bfloat16: the new tokens of all requests, one after another.
        k, v: `(tokens, kv_heads, head_dim)` of that dtype, any token and head stride; usually a view of all segments.
        first: `(requests,)` int64: where in `k` and `v` each request's context begins.
        plan: of `plan_prefill`, for these lengths.
        scale: what scores are multiplied by, usually `head_dim ** -0.5`.
        out: as `q`; made if None.
        lse: `(rows, q_heads)` float32, gets the natural log-sum-exp of the scores (and of the sink).
        soft_cap: if above 0, scores become `soft_cap * tanh(score / soft_cap)`.
        sinks: `(q_heads,)`: a score for each head that takes weight and gives no value.

    Returns `out`. Raises `ValueError`, before anything is launched, for what it does not take.
    """
    out = torch.empty_like(q) if out is None else out
    check(q, k, v, out, lse, sinks, plan.rows)
    check_first(first, plan.requests, q)
    if not plan.work.shape[0]:
        return out
    launch(
        q,
        k,
        v,
        first,
        out,
        lse,
        sinks,
        work=plan.work,
        merges=plan.merges,
        lists=plan.lists,
        schedule=plan.schedule,
        partial=workspace(plan.parts, k.shape[1], plan.config, k.shape[2], q.device),
        config=plan.config,
        scale=scale,
        soft_cap=soft_cap,
        window=plan.window,
    )
    return out


def compile_prefill(
    k: torch.Tensor, v: torch.Tensor, first: int, *, q_heads: int, max_tokens: int, readable: int = 1
) -> Iterator[tuple[int, int]]:
    """Compile for every class of shapes up to `max_tokens`, so that nothing compiles while serving: yields how many of
    how many are done. `k` and `v` are those that will be read; `max_tokens` tokens from `first` on may be read now.
    """
    kv_heads, dim = k.shape[1:]
    plans: dict[Config, Plan] = {}
    for rows in (1, 16, 64, 256):
        new = max(1, rows // (q_heads // kv_heads))
        for context in (max_tokens, 256):  # the long one first: it has parts to merge
            if new <= context <= max_tokens:
                plan = plan_prefill(
                    [new],
                    [context],
                    q_heads=q_heads,
                    kv_heads=kv_heads,
                    head_dim=dim,
                    device=k.device,
                    readable=readable,
                )
                plans.setdefault(plan.config, plan)
    at = torch.tensor([first], dtype=torch.int64, device=k.device)
    for done, plan in enumerate(plans.values(), start=1):
        q = torch.zeros(plan.rows, q_heads, dim, dtype=k.dtype, device=k.device)
        prefix_prefill(q, k, v, at, plan, scale=dim**-0.5)
        yield done, len(plans)
