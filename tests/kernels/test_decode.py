from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels.decode import Decoder
from sglang_vtensor.kernels.plan import Config
from tests.kernels.reference import DEVICE, Batch, assert_close


def decode(decoder, batch, *, soft_cap=0.0, sinks=None):
    out = torch.full_like(batch.q, float("nan"))
    lse = torch.full(batch.q.shape[:2], float("nan"), device=DEVICE)
    decoder.plan(torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE))
    decoder(batch.q, batch.k, batch.v, batch.first, scale=batch.scale, out=out, lse=lse, soft_cap=soft_cap, sinks=sinks)
    return out, lse


@given(
    contexts=st.lists(st.integers(3, 300), min_size=1, max_size=6),
    new=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 1), (7, 1), (8, 2)]),
    dim=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    window=st.sampled_from([-1, -1, 0, 40]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_decode(contexts, new, heads, dim, dtype, window, soft_cap, sinks, seed):
    batch = Batch.random(
        [new] * len(contexts), contexts, q_heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype, seed=seed
    )
    decoder = Decoder(
        max_requests=8, q_heads=heads[0], kv_heads=heads[1], head_dim=dim, device=DEVICE, new=new, window=window
    )
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    out, lse = decode(decoder, batch, soft_cap=soft_cap, sinks=sink)
    expected, sums = batch.expected(window=window, soft_cap=soft_cap, sinks=sink)
    assert_close(out, expected)
    assert_close(lse, sums)


def test_one_decoder_for_steps_of_any_shape():
    """The buffers keep what the last step left behind: more requests, more parts."""
    decoder = Decoder(
        max_requests=5, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE, config=Config(16, 16, 4, 1, occupancy=16)
    )
    for contexts in ([900, 10], [1], [5, 6, 7, 8, 9], [2000, 1, 1, 1, 300], [16, 17], [1500]):
        batch = Batch.random([1] * len(contexts), contexts, q_heads=4, kv_heads=2, dim=64, seed=len(contexts))
        out, lse = decode(decoder, batch)
        expected, sums = batch.expected()
        assert_close(out, expected)
        assert_close(lse, sums)
        work = decoder.work[: len(contexts) + decoder.room]
        assert int((work[:, 5] < work[:, 6]).sum()) <= len(contexts) + decoder.room


def test_a_length_of_zero_is_no_work():
    decoder = Decoder(max_requests=3, q_heads=2, kv_heads=1, head_dim=64, device=DEVICE)
    batch = Batch.random([1, 1], [40, 20], q_heads=2, kv_heads=1, dim=64)
    expected, _ = batch.expected()
    batch.contexts = [40, 0]
    out, _ = decode(decoder, batch)
    assert_close(out[:1], expected[:1])
    assert out[1:].isnan().all(), "a row without a context was written"
    decoder.plan(torch.empty(0, dtype=torch.int32, device=DEVICE))
    empty = batch.q[:0]
    assert decoder(empty, batch.k, batch.v, batch.first[:0], scale=1.0).shape == (0, 2, 64)


def test_what_does_not_fit_is_refused():
    decoder = Decoder(max_requests=2, q_heads=2, kv_heads=1, head_dim=64, device=DEVICE)
    with pytest.raises(ValueError, match=r"contexts are \(3,\) torch.int32: up to \(2,\) integers"):
        decoder.plan(torch.ones(3, dtype=torch.int32, device=DEVICE))
    decoder.plan(torch.ones(2, dtype=torch.int32, device=DEVICE))
    batch = Batch.random([1], [4], q_heads=2, kv_heads=1, dim=64)
    with pytest.raises(ValueError, match="q has 1 rows, the plan 2"):
        decoder(batch.q, batch.k, batch.v, batch.first, scale=1.0)
    with pytest.raises(ValueError, match="40 rows, more than a tile of 16"):
        Decoder(max_requests=1, q_heads=4, kv_heads=1, head_dim=64, device=DEVICE, new=10, config=Config(16, 16, 4, 1))


if torch.cuda.is_available():

    def test_a_captured_step_follows_the_lengths():
        """A CUDA graph of plan and attention, replayed with other lengths and other addresses."""
        batches = [
            Batch.random([1] * 3, contexts, q_heads=8, kv_heads=2, dim=128, seed=n, dtype=torch.bfloat16)
            for n, contexts in enumerate(([5000, 3, 700], [1, 1, 1], [64, 9000, 128]))
        ]
        decoder = Decoder(max_requests=3, q_heads=8, kv_heads=2, head_dim=128, device=DEVICE)
        longest = max(batches, key=lambda batch: batch.k.shape[0])
        pool = torch.zeros(longest.k.shape[0], 2, 2, 128, dtype=torch.bfloat16, device=DEVICE)
        q, first = torch.zeros_like(longest.q), torch.zeros_like(longest.first)
        contexts = torch.ones(3, dtype=torch.int32, device=DEVICE)

        def step():
            decoder.plan(contexts)
            return decoder(q, pool[:, 0], pool[:, 1], first, scale=128**-0.5)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for batch in batches:
            pool[: batch.k.shape[0], 0], pool[: batch.v.shape[0], 1] = batch.k, batch.v
            q.copy_(batch.q)
            first.copy_(batch.first)
            contexts.copy_(torch.tensor(batch.contexts, dtype=torch.int32))
            graph.replay()
            assert_close(out, batch.expected()[0])
