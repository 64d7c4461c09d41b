"""Kernels of linear attention on the host, against transformers' own; and SGLang has what they replace."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu

from sglang_vtensor.srt import linear_host, mamba_host

HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 4, 8, 6, 4
CHANNELS = 2 * HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
STARTS = torch.tensor([0, 70, 71, 199], dtype=torch.int32)
SLOTS = torch.tensor([3, 1, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def pool(*shape):
    """States of 6 slots that lie apart, as in a pool whose slots hold more than one layer."""
    return torch.randn(6, 2, *shape, 2)[:, 1, ..., 0]


@pytest.mark.parametrize("known", [True, False])
def test_convolution(known):
    """A prefill of three requests and a token for each, as one convolution of all."""
    weight, states, x = torch.randn(CHANNELS, WIDTH), pool(CHANNELS, WIDTH - 1), torch.randn(199, CHANNELS)
    before, others = states.clone(), [0, 2, 5]
    initial = torch.full((3,), known)
    first = linear_host.causal_conv1d_fn(
        x.T, weight, None, states, STARTS, [70, 1, 128], cache_indices=SLOTS, has_initial_state=initial
    ).T
    more = torch.randn(3, CHANNELS)
    last = linear_host.causal_conv1d_update(more, states, weight, None, "silu", conv_state_indices=SLOTS)
    for i, slot in enumerate(SLOTS.tolist()):
        part = slice(STARTS[i], STARTS[i + 1])
        inputs = torch.cat([x[part], more[i : i + 1]]).T
        inputs = torch.cat([before[slot], inputs], 1) if known else pad(inputs, (WIDTH - 1, 0))
        expected = silu(conv1d(inputs[None], weight[:, None], groups=CHANNELS))[0].T
        torch.testing.assert_close(torch.cat([first[part], last[i : i + 1]]), expected)
        torch.testing.assert_close(states[slot], inputs[:, 1 - WIDTH :])
    assert torch.equal(states[others], before[others])


def test_delta_rule():
    """An extend of three requests, of which two are tracked, and a decode step."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    q, k = torch.randn(2, 1, 202, HEADS, KEY_DIM)
    v, (a, b) = torch.randn(1, 202, VALUE_HEADS, VALUE_DIM), torch.randn(2, 202, VALUE_HEADS)
    A_log, dt_bias = torch.randn(2, VALUE_HEADS)
    states = pool(VALUE_HEADS, VALUE_DIM, KEY_DIM)
    before, others = states.clone(), [0, 2, 5]
    g, beta = linear_host.gates(A_log, a, b, dt_bias)

    kernel, slots = linear_host.HostGDNKernel(), {"ssm_states": states, "cache_indices": SLOTS}
    tracked = torch.full((3, VALUE_HEADS, VALUE_DIM, KEY_DIM), torch.nan)
    extend = (x[:, :199] for x in (q, k, v, g, beta))
    chunks = torch.tensor([1, -1, 0], dtype=torch.int32)
    first, _, _ = kernel.extend(*extend, **slots, query_start_loc=STARTS, track_state=tracked, track_chunk_idx=chunks)
    step = [x[:, 199:] for x in (q, k, v)]
    last = kernel.decode(*step, a[199:], b[199:], A_log=A_log, dt_bias=dt_bias, **slots)

    def rule(tokens, state):
        queries, keys = (x[:, tokens].repeat_interleave(2, dim=2) for x in (q, k))
        out, after = torch_chunk_gated_delta_rule(
            queries,
            keys,
            v[:, tokens],
            g=g[:, tokens],
            beta=beta[:, tokens],
            initial_state=state.transpose(1, 2)[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return out[0], after[0].transpose(1, 2)

    for i, slot in enumerate(SLOTS.tolist()):
        tokens = [*range(STARTS[i], STARTS[i + 1]), 199 + i]
        out, after = rule(tokens, before[slot])
        torch.testing.assert_close(torch.cat([first[0, tokens[:-1]], last[0, i : i + 1]]), out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states[slot], after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tracked[0], rule([*range(64)], before[3])[1], atol=1e-5, rtol=1e-4)
    assert tracked[1].isnan().all()
    assert torch.equal(tracked[2], before[4])
    assert torch.equal(states[others], before[others])


def test_selective_scan():
    """Mamba-2: a prefill of three requests, of which states are asked for within, and a token for each."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    heads, channels, groups, size, chunk = 4, 6, 2, 5, 32
    x, dt = torch.randn(202, heads, channels), torch.randn(202, heads)
    B, C = torch.randn(2, 202, groups, size)
    A, D, bias = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    states = pool(heads, channels, size)
    before, others = states.clone(), [0, 2, 5]

    out, new = torch.full((199, heads, channels), torch.nan), torch.full((3, heads, channels), torch.nan)
    first = [each[None, :199] for each in (x, dt, B, C)]
    scanned = {"dt_bias": bias, "cu_seqlens": STARTS, "out": out[None], "initial_states": states[SLOTS]}
    wanted = {"track_seq_idx": torch.tensor([2, 0, 2]), "track_end_locs": torch.tensor([135, 33, 135])}
    grid, last, tracked = mamba_host.chunk_scan(*first[:2], A, *first[2:], chunk, D, **scanned, **wanted)
    states[SLOTS] = last

    def wide(per_head, *sizes):
        return (
            per_head[..., None].expand(*per_head.shape, channels)
            if not sizes
            else per_head.view(-1, 1, 1).expand(heads, channels, *sizes)
        )

    mamba_host.state_update(
        states,
        x[199:],
        wide(dt[199:]),
        wide(A, size),
        B[199:],
        C[199:],
        wide(D),
        dt_bias=wide(bias),
        state_batch_indices=SLOTS,
        out=new,
    )

    def scan(tokens, state):
        values, steps, write, read = (each[None, tokens] for each in (x, dt, B, C))
        return mamba2_chunk_scan(
            values,
            steps,
            A,
            write,
            read,
            chunk_size=16,
            D=D,
            dt_bias=bias,
            initial_states=state[None],
            dt_softplus=True,
            return_final_states=True,
        )

    def close(got, expected):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    for i, slot in enumerate(SLOTS.tolist()):
        start, end = STARTS[i : i + 2].tolist()
        tokens = [*range(start, end), 199 + i]
        expected, after = scan(tokens, before[slot])
        close(torch.cat([out[start:end], new[i : i + 1]]), expected[0])
        close(states[slot], after[0])
        close(last[i], scan(tokens[:-1], before[slot])[1][0])
        for token in range(-(-start // chunk) * chunk, end, chunk):
            close(
                grid[0, token // chunk],
                scan(tokens[: token - start], before[slot])[1][0] if token > start else before[slot],
            )
    close(tracked[0], scan([*range(71, 135)], before[4])[1][0])
    close(tracked[1], scan([*range(33)], before[3])[1][0])
    assert torch.equal(tracked[0], tracked[2])
    assert torch.equal(states[others], before[others])


def test_only_what_is_in_the_mask_is_tracked():
    conv, states = torch.randn(2, 6, 5, 3), torch.randn(2, 6, 4, 3, 2)
    expected, alone = ([x.clone() for x in (conv, states)] for _ in range(2))
    for x in expected:
        x[:, 5] = x[:, 3]
    mask, targets = torch.tensor([True, False, True]), torch.tensor([5, 2, -1])
    linear_host.track_states(conv, states, SLOTS, mask, targets, 3)
    assert all(torch.equal(x, y) for x, y in zip(expected, (conv, states), strict=True))
    linear_host.track_states_of_a_layer(*(x[1] for x in alone), SLOTS, mask, targets, 3)
    assert all(torch.equal(x[1], y[1]) for x, y in zip(expected, alone, strict=True))


@pytest.mark.parametrize("target", linear_host.ADDED)
def test_sglang_imports_what_is_added(target):
    """Where there is a device it has a name for it, and no other one."""
    owner, name = target.rsplit(".", 1)
    source = inspect.getsource(importlib.import_module(owner))
    assert f"{name.removesuffix('_triton')} as {name}" in source
    assert linear_host.ADDED[target] in linear_host.REPLACED.values()


@pytest.mark.parametrize("target", linear_host.REPLACED)
def test_sglang_has_what_is_replaced(target):
    """What it passes by position stands where ours has it, and ours takes all names."""
    owner, name = target.rsplit(".", 1)
    theirs, ours = getattr(importlib.import_module(owner), name), linear_host.REPLACED[target]
    for method in ("extend", "decode") if inspect.isclass(theirs) else (None,):
        known, taken = (inspect.signature(getattr(x, method) if method else x).parameters for x in (theirs, ours))
        names, mine = ([p.name for p in x.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for x in (known, taken))
        assert mine == names[: len(mine)]
        named = [p.name for p in known.values() if p.kind is not p.VAR_KEYWORD]
        inspect.signature(getattr(ours, method) if method else ours).bind(**dict.fromkeys(named))
