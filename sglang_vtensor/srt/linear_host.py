"""Linear attention (gated delta nets) on the host backend: plain torch where SGLang would launch Triton's kernels.

SGLang's own backend for these layers stays, with its bookkeeping of states; only what it launches is replaced here.
What Mamba-2 needs beside it is in `mamba_host`.

Shapes. A layer has H key heads and HV value heads; value head i reads key head i // (HV / H). A slot is one request's
state of one layer, in two tensors of the pool, which may be views with any strides:

    conv   (slots, channels, width - 1)   the inputs before the next token, the oldest first
    state  (slots, HV, V, K)              a matrix for each value head

Per token, in float32, with k and q of length one, and q divided by the root of K:

    state = state * exp(g)
    state = state + beta * (v - state k) k^T
    out   = state q
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

from sglang_vtensor.srt import mamba_host

#: After so many tokens of an extend SGLang counts one chunk; a state is tracked at the start of a chunk.
CHUNK_TOKENS = 64


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: list[int],
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | None = "silu",
    **_: Any,
) -> Tensor:
    """Convolve each request's new tokens behind what its slot has, and leave the last inputs in the slot.

    `x` is `(channels, tokens)` of all requests, `weight` `(channels, width)`. Returns a tensor like `x`."""
    assert cache_indices is not None
    assert has_initial_state is not None
    before = weight.shape[1] - 1
    out = torch.empty_like(x)
    starts = query_start_loc.tolist()
    for i, (slot, known) in enumerate(zip(cache_indices.tolist(), has_initial_state.tolist(), strict=True)):
        tokens = slice(starts[i], starts[i + 1])
        past = conv_states[slot].to(x.dtype) if known else x.new_zeros(x.shape[0], before)
        inputs = torch.cat([past, x[:, tokens]], dim=1)
        out[:, tokens] = _activate(conv1d(inputs[None], weight[:, None], bias, groups=x.shape[0])[0], activation)
        conv_states[slot] = inputs[:, -before:].to(conv_states.dtype)
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The same for one token of each request: `x` is `(requests, channels)`."""
    assert x.dim() == 2, "several tokens of a request at once are for speculative decoding, which the host has not"
    assert conv_state_indices is not None
    inputs = torch.cat([conv_state[conv_state_indices].to(x.dtype), x[:, :, None]], dim=2)
    conv_state[conv_state_indices] = inputs[:, :, 1:].to(conv_state.dtype)
    out = (inputs * weight).sum(2)
    return _activate(out if bias is None else out + bias, activation)


def gates(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, beta: float = 1.0, threshold: float = 20.0
) -> tuple[Tensor, Tensor]:
    """By `a` and `b`, which are `(tokens, HV)`: the logarithm of what is kept of a state, and how much of a value is
    written. Both are `(1, tokens, HV)` in float32."""
    g = -A_log.float().exp() * softplus(a.float() + dt_bias.float(), beta, threshold)
    return g[None], b.float().sigmoid()[None]


class HostGDNKernel:
    """What SGLang's dispatcher calls. `q` and `k` are `(1, tokens, H, K)`, `v` is `(1, tokens, HV, V)`."""

    uses_state_checkpoints = False
    supports_fused_chain_verify = False
    supports_packed_decode = False
    supports_strided_target_verify_qkv = False
    #: `extend` writes the states to track in a tensor of its own, and SGLang puts them in their slots.
    supports_track_state_snapshot = True

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        **_: Any,
    ) -> Tensor:
        """One token of each request; returns `(1, requests, HV, V)` and updates the states in their slots."""
        (g,), (beta,) = gates(A_log, a, b, dt_bias)
        q, k = _heads(q[0], k[0], v.shape[2])
        states, out = _step(ssm_states[cache_indices].float(), q, k, v[0].float(), g, beta)
        ssm_states[cache_indices] = states.to(ssm_states.dtype)
        return out[None].to(v.dtype)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        inplace_update: bool = True,
        track_state: Tensor | None = None,
        track_chunk_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        """The new tokens of each request, one after the other, from the state in its slot, which is updated.

        Where `track_chunk_idx[i]` is not -1, the state of request i at the start of that chunk goes to `track_state[i]`
        `(requests, HV, V, K)`. Returns `(1, tokens, HV, V)`; SGLang asks for no other state then."""
        assert inplace_update, "multi-item scoring is for GPUs"
        queries, keys = _heads(q[0], k[0], v.shape[2])
        values = v[0].float()
        out = torch.empty_like(values)
        starts = query_start_loc.tolist()
        tracked = [-1] * len(cache_indices) if track_chunk_idx is None else track_chunk_idx.tolist()
        for i, slot in enumerate(cache_indices.tolist()):
            state = ssm_states[slot].float()
            for token in range(starts[i], starts[i + 1]):
                if track_state is not None and token - starts[i] == tracked[i] * CHUNK_TOKENS:
                    track_state[i] = state
                state, out[token] = _step(
                    state, queries[token], keys[token], values[token], g[0, token], beta[0, token]
                )
            ssm_states[slot] = state.to(ssm_states.dtype)
        return out[None].to(v.dtype), None, None


def track_states(
    conv_states_pool: Tensor,
    ssm_states_pool: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """After a decode step: copy the states of the requests in the mask to their track slots, in all layers at once:
    both tensors have a dimension of layers before that of slots. A negative slot has been freed, and is left alone."""
    wanted = mamba_track_mask[:batch_size] & (mamba_track_indices[:batch_size] >= 0)
    source, target = cache_indices[:batch_size][wanted].long(), mamba_track_indices[:batch_size][wanted]
    for states in (conv_states_pool, ssm_states_pool):
        states[:, target] = states[:, source]


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> Tensor:
    """`x`, `(rows, V)`, normed and weighted, times what is activated of the gate `z`."""
    if not is_rms_norm or not norm_before_gate or group_size is not None or bias is not None or z is None:
        raise NotImplementedError("on the host a gated norm has a gate behind it, and neither groups nor a bias")
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * weight.float()
    gate = z.float().sigmoid() if activation == "sigmoid" else silu(z.float())
    return (normed * gate).to(x.dtype)


def rms_norm_gated_by(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """As `rms_norm_gated`, with the gate `g` behind `x`. There is no residual, so the last two say nothing."""
    assert residual is None
    return rms_norm_gated(x, weight, bias, g, eps, is_rms_norm=True, activation=activation)


def split_projections(
    mixed_qkvz: Tensor, mixed_ba: Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows `[q | k | v | z]` and `[b | a]` apart: q, k and v together, `z` `(tokens, HV, V)`, `b` and `a`."""
    gate = num_heads_v * head_v
    mixed_qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + gate, gate], dim=-1)
    b, a = mixed_ba.chunk(2, dim=-1)
    return mixed_qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


def split_projections_by_head(
    mixed_qkvz: Tensor, mixed_ba: Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of rows that have `[q | k | v | z]` and `[b | a]` of each key head together, with its value heads."""
    each = num_heads_v // num_heads_qk
    q, k, v, z = mixed_qkvz.unflatten(-1, (num_heads_qk, -1)).split([head_qk] * 2 + [each * head_v] * 2, dim=-1)
    b, a = mixed_ba.unflatten(-1, (num_heads_qk, -1)).chunk(2, dim=-1)
    mixed_qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=-1)
    return mixed_qkv, z.reshape(-1, num_heads_v, head_v), b.flatten(1).contiguous(), a.flatten(1).contiguous()


def sigmoid_mul(attn_output: Tensor, gate: Tensor, inplace: bool = False, quant: bool = False) -> Tensor:
    """What full attention says `(tokens, heads * dim)`, times the sigmoid of its gate."""
    assert not quant
    factor = gate.reshape(attn_output.shape).float().sigmoid().to(attn_output.dtype)
    return attn_output.mul_(factor) if inplace else attn_output * factor


def add_gated(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor) -> None:
    """To what experts say `(tokens, hidden)` add what the shared one does, times the sigmoid of its gate."""
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid()
    final_hidden_states += (gate[:, None] * shared_output.float()).to(final_hidden_states.dtype)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return silu(x) if activation in ("silu", "swish") else x


def _heads(q: Tensor, k: Tensor, value_heads: int) -> tuple[Tensor, Tensor]:
    """`(tokens, H, K)` as `(tokens, HV, K)` of length one, in float32; queries are scaled, too."""
    q, k = (x.float().repeat_interleave(value_heads // x.shape[1], dim=1) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def _step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One token: `state` `(..., HV, V, K)`, `q` and `k` `(..., HV, K)`, `v` `(..., HV, V)`, `g` and `beta` `(..., HV)`.
    Returns the state behind it, and what is read."""
    state = state * g.exp()[..., None, None]
    new = (v - torch.einsum("...vk,...k->...v", state, k)) * beta[..., None]
    state = state + new[..., :, None] * k[..., None, :]
    return state, torch.einsum("...vk,...k->...v", state, q)


def track_states_of_a_layer(conv_states: Tensor, ssm_states: Tensor, *args: Any, **more: Any) -> None:
    """As `track_states`, for one layer."""
    track_states(conv_states[None], ssm_states[None], *args, **more)


_OPS = "sglang.kernels.ops"
_MIXER = "sglang.srt.layers.attention.mamba.mamba"

#: What is replaced, by its name in SGLang. Every other function that a linear layer calls runs on the host as it is.
REPLACED: dict[str, Callable[..., Any]] = {
    f"{_OPS}.mamba.causal_conv1d_triton.causal_conv1d_fn": causal_conv1d_fn,
    f"{_OPS}.mamba.causal_conv1d_triton.causal_conv1d_update": causal_conv1d_update,
    f"{_OPS}.mamba.mamba_state_scatter_triton.track_mamba_states_all_layers": track_states,
    f"{_OPS}.mamba.mamba_state_scatter_triton.track_mamba_states_if_needed": track_states_of_a_layer,
    f"{_OPS}.mamba.triton_ops.mamba_chunk_scan_combined": mamba_host.chunk_scan,
    f"{_OPS}.mamba.triton_ops.selective_state_update": mamba_host.state_update,
    f"{_OPS}.attention.linear.fused_gdn_gating.fused_gdn_gating": gates,
    f"{_OPS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous": split_projections,
    f"{_OPS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": split_projections_by_head,
    f"{_OPS}.attention.fla.layernorm_gated.layernorm_fn": rms_norm_gated,
    f"{_OPS}.attention.fla.fused_norm_gate.rms_norm_gated": rms_norm_gated_by,
    f"{_OPS}.elementwise.elementwise.fused_sigmoid_mul": sigmoid_mul,
    f"{_OPS}.elementwise.elementwise.fused_gate_sigmoid_mul_add": add_gated,
    "sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel": HostGDNKernel,
}
#: What SGLang's mixer of Mamba-2 imports only where there is a device, by the name that it has there.
ADDED: dict[str, Callable[..., Any]] = {
    f"{_MIXER}.causal_conv1d_fn_triton": causal_conv1d_fn,
    f"{_MIXER}.causal_conv1d_update_triton": causal_conv1d_update,
}


def available() -> bool:
    """Whether this version of SGLang has all of it."""
    return importlib.util.find_spec(f"{_OPS}.attention.linear.fused_gdn_gating") is not None


def install() -> None:
    """Put them in their places, also in modules that have imported SGLang's own by name already."""
    places = {target: target.rsplit(".", 1) for target in REPLACED}
    theirs = {target: getattr(importlib.import_module(owner), name) for target, (owner, name) in places.items()}
    ours = {id(body): REPLACED[target] for target, body in theirs.items()}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in ours:
                setattr(module, name, ours[id(value)])
    for target, body in ADDED.items():
        owner, name = target.rsplit(".", 1)
        setattr(importlib.import_module(owner), name, body)
