from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_decode import Shared, SharedDecoder
from tests.kernels.reference import DEVICE, Batch, assert_close

SMALL = Config(16, 16, 4, 1)


def forest(rng, requests, longest, depth=3):
    """Random nested runs over `requests` requests: the runs, and where what is a request's own begins."""
    runs, own = [], [0] * requests

    def grow(members, low, level):
        if len(members) < 2 or level == 0:
            return
        if rng.random() < 0.8:
            high = low + rng.randint(1, longest)
            runs.append(Shared(members, low, high))
            for member in members:
                own[member] = high
            low = high
        else:
            return
        rng.shuffle(members := list(members))
        while members:
            count = rng.randint(1, len(members))
            grow(members[:count], low, level - 1)
            members = members[count:]

    members = list(range(requests))
    rng.shuffle(members)
    while members:
        count = rng.randint(1, len(members))
        grow(members[:count], 0, depth)
        members = members[count:]
    return runs, own


def share(batch, runs):
    """Make what runs say true: the members' keys and values there are those of the first one. What is read is the first
    one's only: NaN stands with the others where there is a reference of its own."""
    for run in sorted(runs, key=lambda run: run.low):
        source = int(batch.first[run.members[0]])
        for member in run.members[1:]:
            target = int(batch.first[member])
            for x in (batch.k, batch.v):
                x[target + run.low : target + run.high] = x[source + run.low : source + run.high].clone()


def run(batch, runs, *, soft_cap=0.0, sinks=None, config=None, planned=None):
    """The kernel on poisoned outputs. `planned`: the contexts that the plan was made for, if they have grown since."""
    requests, q_heads, dim = batch.q.shape
    decoder = SharedDecoder(
        max_requests=max(1, requests + 2),
        q_heads=q_heads,
        kv_heads=batch.k.shape[1],
        head_dim=dim,
        device=DEVICE,
        config=config,
    )
    for buffer in decoder.partial:
        buffer.fill_(float("nan"))
    plan = decoder.plan(runs, planned or batch.contexts)
    out = torch.full_like(batch.q, float("nan"))
    lse = torch.full(batch.q.shape[:2], float("nan"), device=DEVICE)
    contexts = torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE)
    decoder(
        batch.q,
        batch.k,
        batch.v,
        batch.first,
        contexts,
        scale=batch.scale,
        out=out,
        lse=lse,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    return out, lse, plan


@given(
    seed=st.integers(0, 10_000),
    requests=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (8, 2)]),
    dim=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    grown=st.integers(0, 20),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_forests(seed, requests, heads, dim, dtype, soft_cap, sinks, grown):
    rng = random.Random(seed)
    runs, own = forest(rng, requests, 60)
    planned = [length + rng.choice([0, 1, 1, 15, 16, 17, 40]) for length in own]
    planned = [max(1, length) for length in planned]
    contexts = [length + rng.randint(0, grown) for length in planned]
    batch = Batch.random([1] * requests, contexts, q_heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype, seed=seed)
    # A request that had nothing of its own when it was planned gets its first token with the next plan.
    contexts = [a if a > b else b for a, b, c in zip(contexts, planned, own, strict=True)]
    batch.contexts = [c if p > o else p for c, p, o in zip(contexts, planned, own, strict=True)]
    share(batch, runs)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    out, lse, _ = run(batch, runs, soft_cap=soft_cap, sinks=sink, planned=planned)
    expected, sums = batch.expected(soft_cap=soft_cap, sinks=sink)
    assert_close(out, expected)
    assert_close(lse, sums)


def test_a_shared_run_is_read_once():
    """Only the first member's memory is read: with the others it is poisoned."""
    batch = Batch.random([1] * 6, [200] * 6, q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3)
    runs = [Shared([2, 0, 1, 3, 4, 5], 0, 100), Shared([4, 1], 100, 180)]
    share(batch, runs)
    expected, sums = batch.expected()
    for shared in runs:
        for member in shared.members[1:]:
            at = int(batch.first[member])
            batch.k[at + shared.low : at + shared.high] = float("nan")
            batch.v[at + shared.low : at + shared.high] = float("nan")
    out, lse, plan = run(batch, runs)
    assert_close(out, expected)
    assert_close(lse, sums)
    assert plan.parts > 8


@pytest.mark.parametrize(
    ("requests", "runs", "contexts"),
    [
        (5, [], [40, 1, 16, 17, 33]),  # nothing shared
        (1, [], [50]),
        (6, [Shared(range(6), 0, 64)], [65] * 6),  # every request identical but for its last token
        (6, [Shared(range(6), 0, 3)], [30] * 6),  # a run shorter than a tile
        (4, [Shared([0, 1], 0, 33), Shared([2, 3], 0, 17)], [40, 0, 20, 25]),  # one is no request
    ],
)
def test_what_batches_may_be(requests, runs, contexts):
    if 0 in contexts:
        gone = contexts.index(0)
        runs = [run for run in runs if gone not in run.members]
    batch = Batch.random([1] * requests, [max(1, n) for n in contexts], q_heads=4, kv_heads=2, dim=64, seed=requests)
    share(batch, runs)
    expected, _ = batch.expected()
    batch.contexts = contexts
    out, _, _ = run(batch, runs)
    there = torch.tensor([n > 0 for n in contexts], device=DEVICE)
    assert_close(out[there], expected[there])
    assert out[~there].isnan().all(), "the row of what is no request was written"


def test_many_requests_on_one_leaf():
    batch = Batch.random([1] * 300, [40] * 300, q_heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16, seed=5, layers=1)
    runs = [Shared(range(300), 0, 32)]
    share(batch, runs)
    out, lse, _ = run(batch, runs)
    expected, sums = batch.expected()
    assert_close(out, expected)
    assert_close(lse, sums)


def test_requests_leave_and_the_next_plan_forgets_them():
    decoder = SharedDecoder(max_requests=8, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE)
    for requests in (8, 3, 0, 5):
        batch = Batch.random([1] * requests, [70] * requests, q_heads=4, kv_heads=2, dim=64, seed=requests)
        runs = [Shared(range(requests), 0, 48)] if requests > 1 else []
        share(batch, runs)
        decoder.plan(runs, batch.contexts)
        contexts = torch.tensor(batch.contexts, dtype=torch.int64, device=DEVICE)
        out = decoder(batch.q, batch.k, batch.v, batch.first, contexts, scale=batch.scale)
        if requests:
            assert_close(out, batch.expected()[0])


@pytest.mark.parametrize(
    ("runs", "contexts", "message"),
    [
        ([Shared([0], 0, 4)], [9, 9], "at least two wanted"),
        ([Shared([0, 1], 2, 4)], [9, 9], "it has runs up to 0"),
        ([Shared([0, 1], 0, 4)], [9, 3], "and 3 tokens"),
        ([Shared([0, 1], 0, 0)], [9, 9], "cannot be a shared run"),
        ([Shared([0, 2], 0, 4)], [9, 9], "request 2, of 2"),
        ([Shared([0, 1], 0, 4), Shared([2, 3], 0, 4), Shared([1, 2], 4, 8)], [9] * 4, "are to be a forest"),
        ([], [9] * 5, "up to 4 wanted"),
    ],
)
def test_what_is_no_forest_is_refused(runs, contexts, message):
    decoder = SharedDecoder(max_requests=4, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        decoder.plan(runs, contexts)


def test_shapes_that_do_not_fit_are_refused():
    decoder = SharedDecoder(max_requests=4, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE)
    decoder.plan([], [9, 9])
    batch = Batch.random([1, 1], [9, 9], q_heads=4, kv_heads=2, dim=64)
    lengths = torch.tensor([9, 9], device=DEVICE)
    with pytest.raises(ValueError, match=r"contexts are \(2,\) torch.float32"):
        decoder(batch.q, batch.k, batch.v, batch.first, lengths.float(), scale=1.0)
    with pytest.raises(ValueError, match="q has 1 rows, the plan 2"):
        decoder(batch.q[:1], batch.k, batch.v, batch.first, lengths, scale=1.0)
    with pytest.raises(ValueError, match="0 requests, 4 query heads over 2"):
        SharedDecoder(max_requests=0, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE)
