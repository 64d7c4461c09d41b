"""Layers that see a window: only so many tokens before each, as SGLang's `sliding_window_size` counts them, and sinks.
What is behind the window of everything that a batch computes has no memory, and no kernel reads it."""

from __future__ import annotations

import itertools
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.launch import FP8
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.plan import plan_prefill as _plan
from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefill_calls, prefix_prefill
from tests.effort import share_of
from tests.kernels.reference import DEVICE, Batch, assert_close, divided, stored, without_memory
from tests.kernels.test_prefix_prefill import PAGE
from tests.kernels.test_prefix_prefill import run as prefill
from tests.kernels.test_shared_decode import PAGE as DECODED_PAGE
from tests.kernels.test_shared_decode import Served, as_multiplied, paths_of


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 120)), min_size=1, max_size=4),
    window=st.integers(1, 100),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (8, 2), (8, 1)]),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    whole=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 1000),
    cache=st.sampled_from([None, None, *FP8]),
)
@settings(max_examples=share_of(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ragged_batches(lengths, window, heads, dim, dtype, soft_cap, sinks, whole, seed, cache):
    new = [a for a, _ in lengths]
    contexts = [a + b * (PAGE // 16) for a, b in lengths]
    geometry = {"q_heads": heads[0], "kv_heads": heads[1], "dim": dim, "dtype": dtype}
    batch = Batch.random(new, contexts, **geometry, seed=seed, page=PAGE, whole=whole, cache=cache)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    scales = None if cache is None else tuple(torch.tensor(x, device=DEVICE) for x in (0.7, 1.3))
    options = {"soft_cap": soft_cap, "sinks": sink, "scales": scales}
    expected = batch.expected(window=window, **options)
    out, _ = prefill(batch, window=window, cache=cache, **options)
    assert_close(out, expected)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, 4 * PAGE, 1000])
def test_windows_around_a_tile(window, block_m, sinks):
    """Of chunks that begin at the start, inside of the first window, at its end, and far behind it."""
    starts = [0, 1, window - 1, window, window + 1, window + PAGE, 7 * PAGE + 3]
    new = [2 * PAGE + 3, 1, PAGE, 5, 3, PAGE + 1, 40]
    contexts = [a + b for a, b in zip(new, starts, strict=True)]
    batch = Batch.random(new, contexts, q_heads=4, kv_heads=2, dim=64, seed=window, page=PAGE, whole=0.4)
    sink = torch.tensor([-3.0, 0.0, 2.0, 9.0], device=DEVICE) if sinks else None
    expected = batch.expected(window=window, sinks=sink)
    config = Config(block_m, 16, 4, 1) if DEVICE == "cpu" else Config(block_m, 64, 4, 2)
    out, _ = prefill(batch, window=window, sinks=sink, config=config)
    assert_close(out, expected)


def test_a_window_as_long_as_the_context_is_none():
    """Bit for bit: the tiles are the same ones."""
    batch = Batch.random([40, 3], [100, 90], q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=1, page=PAGE)
    plan = plan_prefill(
        batch.new, batch.runs, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE, page_tokens=PAGE, kv_dtype=FP8[0]
    )
    without = prefix_prefill(batch.q, batch.k, batch.v, plan, scale=batch.scale)
    assert torch.equal(prefill(batch, window=99, config=plan.config)[0], without)


@pytest.mark.parametrize("sinks", [False, True])
def test_long_windows_are_divided_and_merged(sinks):
    """Parts that begin behind the window of some rows, of a context whose front is gone."""
    contexts, window = ([700, 30, 411], 330) if DEVICE == "cpu" else ([7000, 300, 4110], 3300)
    batch = Batch.random([40, 1, 2], contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=4, page=PAGE)
    sink = torch.linspace(0, 6, 4, device=DEVICE) if sinks else None
    expected = batch.expected(window=window, sinks=sink)
    config = Config(16, 16, 4, 1, occupancy=16) if DEVICE == "cpu" else None
    out, plan = prefill(batch, window=window, sinks=sink, config=config)
    assert plan.parts > 4
    assert_close(out, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_no_number_stays_in_the_rows_that_see_it(where, value):
    window = 20
    batch = Batch.random([30], [70], q_heads=4, kv_heads=2, dim=64, seed=8, page=PAGE)
    expected = batch.expected(window=window)
    getattr(batch, where)[int(batch.slots(0)[37]), 1, 5] = value
    out, _ = prefill(batch, window=window)
    rows = torch.arange(40, 70)
    bad = torch.zeros(30, 4, dtype=torch.bool, device=DEVICE)
    bad[(rows <= 37 + window).to(DEVICE), 2:] = True
    assert_close(out[~bad], expected[~bad])
    if value != value:
        assert not out[bad].isfinite().all(-1).any(), "a NaN was lost"


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), max_size=6),
    window=st.integers(1, 2000),
    group=st.sampled_from([1, 4, 7]),
    kv_heads=st.sampled_from([1, 8]),
    slots=st.sampled_from([1, 5, 132]),
    config=st.sampled_from([Config(16, 16, 4, 1), Config(128, 64, 4, 3), Config(64, 128, 4, 3)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_key_that_a_row_sees_is_planned_once(lengths, window, group, kv_heads, slots, config, seed):
    new = [a for a, _ in lengths]
    contexts = [a + b for a, b in lengths]
    rng = random.Random(seed)
    runs = [[(rng.randrange(1 << 20) * 128, n) for n in divided(context, 128, 0.5, rng)] for context in contexts]
    shape = {"group": group, "kv_heads": kv_heads, "config": config, "slots": slots}
    plan = _plan(new, runs, **shape, device="cpu", window=window)
    starts = {sum(new[:i]): i for i in range(len(new) - 1, -1, -1) if new[i]}
    seen = {}
    for first_row, _, context, tile, low, high, run, last_run, part in plan.work.tolist():
        assert low < high
        assert low % config.block_n == 0
        for at, key in ((run, low), (last_run, high - 1)):
            assert plan.runs[at, 0] <= key < plan.runs[at, 1]
        seen.setdefault((starts[first_row], tile), []).append((low, high, part))
        assert context == contexts[starts[first_row]]
    for (request, tile), parts in seen.items():
        parts.sort()
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts)), "a gap, or a key twice"
        assert (len(parts) > 1) == (parts[0][2] >= 0)
        prefix = contexts[request] - new[request]
        first = max(0, prefix + tile * config.block_m // group - window)
        assert first - config.block_n < parts[0][0] <= first
        last = min((tile + 1) * config.block_m, new[request] * group) - 1
        assert parts[-1][1] == prefix + last // group + 1
    assert sorted(seen) == [(i, t) for i, n in enumerate(new) for t in range(-(-n * group // config.block_m))]


def test_the_kernel_for_hopper_has_no_windows():
    """The table chooses others for such layers, and a plan for both is an error."""
    hopper = Config(128, 128, 4, 2, True, hopper=True)
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "device": "cpu", "page_tokens": 128}
    with pytest.raises(ValueError, match="a window of 128 tokens, and the kernel for Hopper"):
        plan_prefill([1], [[(128, 300)]], **shape, window=128, config=hopper)
    with pytest.raises(ValueError, match="a window of 0 tokens: at least 1 wanted"):
        plan_prefill([1], [[(128, 300)]], **shape, window=0)
    assert configs.ours_before_fa3([8], [4000], 8, 2, 64, "cpu")
    assert not configs.ours_before_fa3([8], [4000], 8, 2, 64, "cpu", window=128)


def test_on_hopper_a_window_is_planned_for_the_other_kernel(monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "device": "cpu", "page_tokens": 128}
    assert plan_prefill([1], [[(128, 300)]], **shape).config.hopper
    assert not plan_prefill([1], [[(128, 300)]], **shape, window=100).config.hopper


@pytest.mark.parametrize("sinks", [False, True])
def test_compiling_at_start(sinks):
    """Only the padding page has memory."""
    pages = torch.full((2 * PAGE, 2, 2, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pages[:PAGE] = 0.0
    sink = torch.zeros(4, device=DEVICE) if sinks else None
    shapes = {"q_dtype": torch.bfloat16, "q_heads": 4, "max_tokens": 500, "page_tokens": PAGE, "window": 40}
    with without_memory(torch.arange(PAGE, 2 * PAGE, device=DEVICE), pages[:, 0], pages[:, 1]):
        calls = prefill_calls(pages[:, 0], pages[:, 1], kinds=[(0.0, None, sink)], **shapes)
        for some in calls.values():
            for call in some:
                call()
    assert calls, "no shape would be compiled"


# Shared decode.


def decoded(batch, paths, window, *, config=None, cache=None, seed=0, spoilt=None, **options):
    """A step on a poisoned output, over pages of which those are gone that are behind the window of all who have them.
    Returns what came, what was wanted, and the decoder. `spoilt`: a request, a token of it, and what its value is."""
    served = Served.of(batch, paths, seed)
    decoder = served.decoder(config, cache)
    expected = as_multiplied(batch, decoder, cache).expected(window=window, **options)
    if spoilt is not None:
        request, token, value = spoilt
        served.v[int(served.table[served.slots[request], token]), 1, 5] = value
    decoder = decoder.for_window(window)
    slots = served.slots.tolist()
    there, gone = set(), set()
    for slot, context in zip(slots, batch.contexts, strict=True):
        pages = (served.table[slot, :context:DECODED_PAGE] // DECODED_PAGE).tolist()
        behind = max(0, context - 1 - window) // DECODED_PAGE
        gone.update(pages[:behind])
        there.update(pages[behind:])
    at = torch.tensor(sorted(gone - there), dtype=torch.int64, device=DEVICE)
    at = (at[:, None] * DECODED_PAGE + torch.arange(DECODED_PAGE, device=DEVICE)).reshape(-1)
    served.k, served.v = stored(served.k, cache), stored(served.v, cache)
    with without_memory(at, served.k, served.v):
        out = served.run(decoder, **options)
    return out, expected, decoder


@given(
    seed=st.integers(0, 10_000),
    requests=st.integers(1, 9),
    window=st.sampled_from([1, 5, DECODED_PAGE - 1, DECODED_PAGE, 2 * DECODED_PAGE + 1, 5 * DECODED_PAGE]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (8, 2), (8, 1)]),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    programs=st.sampled_from([1, 3, 8]),
    cache=st.sampled_from([None, None, *FP8]),
)
@settings(max_examples=share_of(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_trees(seed, requests, window, heads, dim, dtype, soft_cap, sinks, programs, cache):
    rng = random.Random(seed)
    paths = paths_of(rng, requests, 6)
    contexts = [
        DECODED_PAGE * len(path) + rng.choice([1, 1, 2, DECODED_PAGE - 1, DECODED_PAGE, DECODED_PAGE + 1, 40])
        for path in paths
    ]
    geometry = {"q_heads": heads[0], "kv_heads": heads[1], "dim": dim, "dtype": dtype}
    batch = Batch.random([1] * requests, contexts, **geometry, seed=seed, cache=cache)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    scales = None if cache is None else tuple(torch.tensor(x, device=DEVICE) for x in (0.7, 1.3))
    config = Config(16, 16, 4, 1, False, programs) if DEVICE == "cpu" else None
    options = {"soft_cap": soft_cap, "sinks": sink, "scales": scales}
    out, expected, _ = decoded(batch, paths, window, config=config, cache=cache, seed=seed, **options)
    assert_close(out, expected)


def test_requests_of_different_lengths_behind_one_run():
    """The shortest one still sees the run's end, the longest one none of it; a run behind all windows is not read."""
    run = [*range(1, 7)]
    extra = [1, DECODED_PAGE, 2 * DECODED_PAGE + 3, 4 * DECODED_PAGE]
    contexts = [len(run) * DECODED_PAGE + n for n in extra]
    window = 2 * DECODED_PAGE
    batch = Batch.random([1] * 4, contexts, q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3)
    out, expected, decoder = decoded(batch, [run] * 4, window)
    assert_close(out, expected)
    shared = decoder.numbers[: decoder.max_requests]
    assert (shared >= 0).sum() == 1
    batch = Batch.random([1] * 2, contexts[2:], q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3)
    out, expected, decoder = decoded(batch, [run] * 2, window)
    assert_close(out, expected)
    assert (decoder.numbers[: decoder.max_requests] < 0).all(), "a run behind all windows is a unit"


def test_two_kinds_of_layers_in_one_step():
    """One decoder sees all tokens and another one a window, with the same tables and pages."""
    paths = [[1, 2, 3, 4, 5]] * 3 + [[1, 2], []]
    contexts = [DECODED_PAGE * len(path) + 3 + n for n, path in enumerate(paths)]
    batch = Batch.random([1] * 5, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=2)
    served = Served.of(batch, paths)
    window = DECODED_PAGE + 7
    sinks = torch.linspace(-1, 4, 4, device=DEVICE)
    wanted = batch.expected(), batch.expected(window=window, sinks=sinks)
    every = served.decoder()
    windowed = every.for_window(window)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    every.update(served.sharing.tables)
    every.find_pages(served.table, served.slots, lengths)
    for decoder in (every, windowed):
        decoder.plan(served.slots, lengths)
    for _ in range(2):  # layer after layer
        assert_close(every(batch.q, served.k, served.v, scale=batch.scale), wanted[0])
        assert_close(windowed(batch.q, served.k, served.v, scale=batch.scale, sinks=sinks), wanted[1])
    with pytest.raises(ValueError, match="a window of 0 tokens: at least 1 wanted"):
        every.for_window(0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_decode_keeps_what_is_no_number_in_the_requests_that_see_it(value):
    paths = [[1, 2, 3]] * 3
    contexts = [3 * DECODED_PAGE + n for n in (1, 9, 30)]
    batch = Batch.random([1] * 3, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=2)
    window, where = 2 * DECODED_PAGE, DECODED_PAGE + 4  # within the window of the first one alone
    out, expected, _ = decoded(batch, paths, window, spoilt=(0, where, value))
    assert_close(out[1:], expected[1:])
    assert_close(out[:1, :2], expected[:1, :2])
    assert not out[0, 2:].isfinite().all(-1).any()
