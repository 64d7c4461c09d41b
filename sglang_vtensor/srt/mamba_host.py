"""Mamba-2 layers on the host backend: plain torch where SGLang would launch Triton's kernels.

SGLang's own mixer and its bookkeeping of states stay; only what it launches is replaced here (by `linear_host`).

Shapes. A layer has H heads of P channels, and G groups of inputs and outputs; head i has those of group i // (H / G). A
request's state of one layer is `(H, P, N)`. Per token, in float32, with dt behind its bias and softplus:

    state = state * exp(dt * A) + dt * x B^T
    out   = state C + D * x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    *,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    initial_states: Tensor | None = None,
    track_seq_idx: Tensor | None = None,
    track_end_locs: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The new tokens of each request, one after the other. `x` is `(1, tokens, H, P)` with `cu_seqlens` where requests
    begin and end; `dt` is `(1, tokens, H)`, `A`, `D` and `dt_bias` are `(H,)`, `B` and `C` `(1, tokens, G, N)`,
    `initial_states` `(requests, H, P, N)`. Writes `out`, shaped as `x`.

    Returns states, each before a token: before the tokens 0, `chunk_size`, ... of all requests, `(1, chunks, H, P, N)`;
    behind the last one of each request, `(requests, H, P, N)`; and before those at `track_end_locs`
    `(tracked, H, P, N)`, None if there are none."""
    tokens, heads, channels, size = *x.shape[1:], B.shape[-1]
    dtype = x.dtype if state_dtype is None else state_dtype
    values, write, read = x[0].float(), _heads(B[0], heads), _heads(C[0], heads)
    step, kept = _steps(dt[0], dt_bias, A)
    grid = x.new_empty(-(-tokens // chunk_size), heads, channels, size, dtype=dtype)
    last = x.new_empty(len(cu_seqlens) - 1, heads, channels, size, dtype=dtype)
    tracked = None
    wanted: dict[int, list[int]] = {}
    if track_end_locs is not None and len(track_end_locs):
        tracked = x.new_empty(len(track_end_locs), heads, channels, size, dtype=dtype)
        for n, token in enumerate(track_end_locs.tolist()):
            wanted.setdefault(token, []).append(n)
    starts = cu_seqlens.tolist()
    for i in range(len(starts) - 1):
        state = values.new_zeros(heads, channels, size) if initial_states is None else initial_states[i].float()
        for token in range(starts[i], starts[i + 1]):
            if token % chunk_size == 0:
                grid[token // chunk_size] = state
            if tracked is not None and token in wanted:
                tracked[wanted[token]] = state.to(dtype)
            state = _moved(state, values[token], write[token], step[token], kept[token])
            out[0, token] = torch.einsum("hpn,hn->hp", state, read[token]) + D[:, None].float() * values[token]
        last[i] = state
    return grid[None], last, tracked


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    state_batch_indices: Tensor,
    out: Tensor,
    **_: Any,
) -> None:
    """One token of each request, whose slots in `state`, `(slots, H, P, N)`, are updated. `x` is `(requests, H, P)`,
    `B` and `C` are `(requests, G, N)`; `dt` is as `x`, `dt_bias` and `D` are `(H, P)` and `A` is `(H, P, N)`, each with
    one number a head. Writes `out`, shaped as `x`."""
    write, read = (_heads(each, x.shape[1]) for each in (B, C))
    step, kept = _steps(dt[..., 0], dt_bias[:, 0], A[:, 0, 0])
    new = _moved(state[state_batch_indices].float(), x.float(), write, step, kept)
    state[state_batch_indices] = new.to(state.dtype)
    out.copy_(torch.einsum("bhpn,bhn->bhp", new, read) + D.float() * x.float())


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(tokens, G, N)` as `(tokens, H, N)`, in float32."""
    return x.float().repeat_interleave(heads // x.shape[1], dim=1)


def _steps(dt: Tensor, bias: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Of `(tokens, H)`: how much of a token is written, and how much of a state is kept."""
    step = softplus(dt.float() + bias.float())
    return step, (step * A.float()).exp()


def _moved(state: Tensor, x: Tensor, write: Tensor, step: Tensor, kept: Tensor) -> Tensor:
    """The state behind one token: `state` `(..., H, P, N)`, `x` `(..., H, P)`, `write` `(..., H, N)`, `step` and `kept`
    `(..., H)`."""
    return state * kept[..., None, None] + (step[..., None] * x)[..., :, None] * write[..., None, :]
