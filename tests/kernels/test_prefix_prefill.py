from __future__ import annotations

import itertools
import random
import sys
from contextlib import nullcontext
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.compiling import launches
from sglang_vtensor.kernels.launch import FP8
from sglang_vtensor.kernels.plan import ALIGNED, Config
from sglang_vtensor.kernels.plan import plan_prefill as _plan
from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefill_calls, prefix_prefill
from tests.effort import share_of
from tests.kernels.reference import DEVICE, Batch, assert_close, divided, stored, without_memory

SMALL = Config(16, 16, 4, 1)
#: None is whatever the table chooses; the kernel for Hopper has no interpreter.
HOPPER = Config(128, 128, 4, 2, True, hopper=True)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CONFIGS = [None, HOPPER, Config(128, 64, 4, 4, True, hopper=True), Config(64, 64, 4, 3, True, 2, hopper=True)]
CONFIGS = CONFIGS if IS_HOPPER else [None]
#: Whole tiles of every configuration.
PAGE = 128 if DEVICE == "cuda" else 16


def run(batch, *, window=None, soft_cap=0.0, sinks=None, config=None, cache=None, scales=None):
    """The kernel on a poisoned output, over a `cache` of that type, whose memory is gone behind the `window`."""
    out = torch.full_like(batch.q, float("nan"))
    plan = plan_prefill(
        batch.new,
        batch.runs,
        q_heads=batch.q.shape[1],
        kv_heads=batch.k.shape[1],
        head_dim=batch.q.shape[2],
        device=DEVICE,
        page_tokens=batch.page,
        kv_dtype=cache or batch.k.dtype,
        window=window,
        config=config,
    )
    k, v = stored(batch.k, cache), stored(batch.v, cache)
    options = {"soft_cap": soft_cap, "sinks": sinks, "scales": scales}
    with nullcontext() if window is None else without_memory(batch.behind(window), k, v):
        prefix_prefill(batch.q, k, v, plan, scale=batch.scale, out=out, **options)
    return out, plan


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=4)


@given(
    lengths=lengths,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (8, 2)]),
    dim=st.sampled_from([64, 80, 96, 128, 192]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    paged=st.booleans(),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
    config=st.sampled_from(CONFIGS),
    cache=st.sampled_from([None, None, *FP8]),
)
@settings(max_examples=share_of(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ragged_batches(lengths, heads, dim, dtype, paged, soft_cap, sinks, seed, config, cache):
    if (config is not None and dim not in (64, 128)) or cache is not None:
        config = None
    page = PAGE if paged or config is not None else None
    new = [a for a, _ in lengths]
    contexts = [a + b * (PAGE // 16) for a, b in lengths]
    geometry = {"q_heads": heads[0], "kv_heads": heads[1], "dim": dim, "dtype": dtype}
    batch = Batch.random(new, contexts, **geometry, seed=seed, page=page, cache=cache)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    scales = None if cache is None else tuple(torch.tensor(x, device=DEVICE) for x in (0.7, 1.3))
    out, _ = run(batch, soft_cap=soft_cap, sinks=sink, config=config, cache=cache, scales=scales)
    assert_close(out, batch.expected(soft_cap=soft_cap, sinks=sink, scales=scales))


@pytest.mark.parametrize("config", [SMALL, *CONFIGS[1:]], ids=str)
@pytest.mark.parametrize("tile", [15, 16, 17, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("prefix", [0, 1, 16, 47])
def test_lengths_around_a_tile(tile, prefix, config):
    lengths = [tile, 1], [tile + prefix, tile]
    batch = Batch.random(*lengths, q_heads=2, kv_heads=1, dim=64, seed=tile, page=PAGE, whole=0.0)
    out, _ = run(batch, config=config)
    assert_close(out, batch.expected())


@pytest.mark.parametrize("config", [SMALL, *CONFIGS[1:]], ids=str)
@pytest.mark.parametrize("whole", [0.0, 0.5, 0.9, 1.0], ids=["every page", "short runs", "long runs", "one run"])
def test_contexts_in_runs(config, whole):
    """From one run a context to as many as pages, in any order; what lies between them, or behind a context in its last
    page, is NaN."""
    contexts = [40 * PAGE + 3, 9 * PAGE, PAGE, 5, 17 * PAGE + PAGE - 1]
    new = [2 * PAGE, 3, PAGE, 5, 40]
    batch = Batch.random(
        new, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3, page=PAGE, whole=whole
    )
    assert (max(map(len, batch.runs)) == 1) == (whole == 1.0)
    assert (len(batch.runs[0]) == 41) == (whole == 0.0)
    out, _ = run(batch, config=config)
    assert_close(out, batch.expected())


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), max_size=6),
    group=st.sampled_from([1, 4, 7]),
    kv_heads=st.sampled_from([1, 8]),
    slots=st.sampled_from([1, 5, 132]),
    config=st.sampled_from([SMALL, HOPPER, Config(64, 64, 4, 3, True, 2, hopper=True)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_every_key_of_every_row_is_planned_once(lengths, group, kv_heads, slots, config, seed):
    new = [a for a, _ in lengths]
    contexts = [a + b for a, b in lengths]
    rng = random.Random(seed)
    runs = [[(rng.randrange(1 << 20) * 128, n) for n in divided(context, 128, 0.5, rng)] for context in contexts]
    plan = _plan(new, runs, group=group, kv_heads=kv_heads, config=config, slots=slots, device="cpu")
    for array in (plan.work, plan.merges, plan.runs, plan.lists, plan.schedule):
        assert array.storage_offset() % ALIGNED == 0, "a kernel would be compiled again for such a pointer"
    of = {}  # the request of each run of the plan
    for request, some in enumerate(runs):
        position = 0
        for first, tokens in some:
            assert plan.runs[len(of)].tolist() == [position, position + tokens, first - position]
            of[len(of)] = request
            position += tokens
    seen = {}
    parts = {}
    first_rows = [sum(new[:i]) for i in range(len(new))]
    for first_row, its_new, context, tile, low, high, run, last_run, part in plan.work.tolist():
        request = of[run]
        assert (first_row, its_new, context) == (first_rows[request], new[request], contexts[request])
        assert low < high
        assert low == 0 or part >= 0
        for at, key in ((run, low), (last_run, high - 1)):
            assert of[at] == request
            assert plan.runs[at, 0] <= key < plan.runs[at, 1]
        seen.setdefault((request, tile), []).append((low, high))
        parts.setdefault((request, tile), []).append(part)
    for (request, tile), keys in seen.items():
        keys.sort()
        assert all(a[1] == b[0] for a, b in itertools.pairwise(keys)), "a gap, or a key twice"
        last = min((tile + 1) * config.block_m, new[request] * group) - 1
        assert keys[-1][1] == contexts[request] - new[request] + last // group + 1
        assert keys[0][0] == 0
        assert (len(keys) > 1) == (min(parts[request, tile]) >= 0)
    assert sorted(seen) == [(i, t) for i, n in enumerate(new) for t in range(-(-n * group // config.block_m))]
    assert sorted(p for several in parts.values() for p in several if p >= 0) == list(range(plan.parts))
    if config.hopper and len(plan.work):
        assert plan.lists.tolist() == sorted(plan.lists.tolist())
        assert len(plan.lists) - 1 <= slots
        assert sorted(plan.schedule.tolist()) == list(range(plan.work.shape[0] * kv_heads))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_program_goes_through_a_list(config, monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 3)
    new, contexts = [300, 1, 70, 129], [300, 2000, 1000, 900]
    if DEVICE == "cpu":  # interpreted
        new, contexts = [150, 1, 35, 65], [150, 1000, 500, 450]
    batch = Batch.random(new, contexts, q_heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16, seed=12, page=PAGE)
    out, plan = run(batch, config=config)
    assert plan.work.shape[0] * 2 > 3 * 3
    assert_close(out, batch.expected())


@pytest.mark.parametrize("config", [Config(16, 16, 4, 1, occupancy=16), *CONFIGS[1:]], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_long_contexts_are_divided_and_merged(sinks, config):
    lengths = [700, 30, 411] if config.block_n < 64 else [7000, 300, 4110]
    batch = Batch.random([3, 1, 2], lengths, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=4, page=PAGE)
    sink = torch.linspace(0, 6, 4, device=DEVICE) if sinks else None
    out, plan = run(batch, sinks=sink, config=config)
    assert plan.parts > 4
    assert_close(out, batch.expected(sinks=sink))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_request_reads_its_own_runs_alone(only, config):
    """The others' keys and values, before, between and behind its runs, are NaN."""
    contexts, new = [5 * PAGE + 3, 7 * PAGE, 3 * PAGE + PAGE // 2], [3, 2 * PAGE, 40]
    batch = Batch.random(new, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=5, page=PAGE)
    rows = slice(sum(new[:only]), sum(new[: only + 1]))
    expected = batch.expected()[rows]
    for other in {0, 1, 2} - {only}:
        batch.k[batch.slots(other)] = batch.v[batch.slots(other)] = float("nan")
    out, _ = run(batch, config=config)
    assert_close(out[rows], expected)
    assert sum(row.isnan().all().item() for row in out) == sum(new) - new[only]


def test_head_dim_256():
    batch = Batch.random([5, 33], [70, 40], q_heads=4, kv_heads=2, dim=256, dtype=torch.bfloat16, seed=6, page=PAGE)
    out, _ = run(batch)
    assert_close(out, batch.expected())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_is_no_number_stays_in_its_rows(where, value, config):
    batch = Batch.random([20, 9], [50, 60], q_heads=4, kv_heads=2, dim=64, seed=8, page=PAGE)
    if where == "q":
        batch.q[7, 1, 3] = value
    else:
        getattr(batch, where)[int(batch.slots(0)[41]), 1, 5] = value  # the twelfth new token of the first request
    out, _ = run(batch, config=config)
    if where == "q":
        bad = torch.zeros(29, 4, dtype=torch.bool)
        bad[7, 1] = True
    else:
        bad = torch.zeros(29, 4, dtype=torch.bool)
        bad[11:20, 2:] = True
    expected = Batch.random([20, 9], [50, 60], q_heads=4, kv_heads=2, dim=64, seed=8, page=PAGE).expected()
    good = ~bad.to(DEVICE)
    assert_close(out[good], expected[good])
    if value != value:
        assert not out[~good].isfinite().all(-1).any(), "a NaN was lost"


def test_nothing_to_do():
    batch = Batch.random([0, 3, 0], [12, 8, 0], q_heads=2, kv_heads=1, dim=64, seed=9)
    out, _ = run(batch)
    kept = Batch(batch.q, batch.k, batch.v, batch.runs[1:2], [3], batch.scale, batch.page)
    assert_close(out, kept.expected())
    empty = Batch.random([], [], q_heads=2, kv_heads=1, dim=64)
    assert run(empty)[0].shape == (0, 2, 64)


def test_outputs_and_inputs_may_have_any_stride():
    batch = Batch.random([9], [30], q_heads=4, kv_heads=2, dim=64, seed=10)
    wide = torch.full((9, 8, 64), float("nan"), dtype=batch.q.dtype, device=DEVICE)
    wide[:, ::2] = batch.q
    batch.q = wide[:, ::2]
    out = torch.full((9, 4, 3, 64), float("nan"), dtype=batch.q.dtype, device=DEVICE)
    plan = plan_prefill([9], batch.runs, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE, page_tokens=1)
    prefix_prefill(batch.q, batch.k, batch.v, plan, scale=batch.scale, out=out[:, :, 1])
    assert_close(out[:, :, 1], batch.expected())
    assert out[:, :, ::2].isnan().all(), "something else was written"


def test_what_does_not_fit_is_refused_before_the_launch():
    batch = Batch.random([4], [9], q_heads=4, kv_heads=2, dim=64)
    plan = plan_prefill([4], batch.runs, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE, page_tokens=1)

    def call(**changes):
        given = {"q": batch.q, "k": batch.k, "v": batch.v, "plan": plan} | changes
        prefix_prefill(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("plan"), scale=1.0, **given)

    def plan_of(new, runs, page=128):
        plan_prefill(new, runs, q_heads=4, kv_heads=2, head_dim=64, device=DEVICE, page_tokens=page)

    with pytest.raises(ValueError, match=r"float32.*float16 or bfloat16"):
        call(q=batch.q.float())
    with pytest.raises(ValueError, match="q has 3 rows, the plan 4"):
        call(q=batch.q[:3])
    with pytest.raises(ValueError, match="4 query heads over 3 KV heads"):
        call(k=batch.k.new_zeros(9, 3, 64), v=batch.k.new_zeros(9, 3, 64))
    with pytest.raises(ValueError, match=r"head_dim 48: one of 64, 80, 96, 128, 192, 256"):
        call(q=batch.q[..., :48], k=batch.k[..., :48], v=batch.v[..., :48])
    with pytest.raises(ValueError, match="last one must be 1"):
        call(q=batch.q.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match=r"sinks are \(3,\): \(4,\) wanted"):
        call(sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="request 1 has 5 new tokens in a context of 4"):
        plan_of([1, 5], [[(0, 1)], [(128, 4)]])
    with pytest.raises(
        ValueError, match=r"request 0 has runs \[\(0, 100\), \(256, 4\)\]: whole pages of 128 tokens in all but"
    ):
        plan_of([1], [[(0, 100), (256, 4)]])
    with pytest.raises(
        ValueError, match=r"request 0 has runs \[\(-128, 4\)\]: at least 1 token in each, in slots 0 to"
    ):
        plan_of([1], [[(-128, 4)]])
    for empty in ([(0, 128), (256, 0)], [(0, 128), (256, -3)], [((1 << 31) - 128, 129)]):
        with pytest.raises(ValueError, match="wanted; leave out runs without tokens"):
            plan_of([1], [empty])
    with pytest.raises(ValueError, match=r"pages of 8 tokens: a tile would cross two runs"):
        plan_of([1], [[(0, 8), (64, 4)]], page=8)


@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn])
def test_what_is_compiled_at_start_reads_the_padding_page_only(cache):
    pages = torch.full((2 * PAGE, 2, 2, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pages[:PAGE] = 0.0  # only the padding page has memory
    shapes = {"q_dtype": torch.bfloat16, "q_heads": 4, "max_tokens": 500, "page_tokens": PAGE}
    calls = prefill_calls(stored(pages[:, 0], cache), stored(pages[:, 1], cache), **shapes)
    assert calls, "no shape would be compiled"
    for config, some in calls.items():
        assert {launch.name for launch in launches(some)} >= {"_attend_hopper" if config.hopper else "_attend"}
        for call in some:
            call()


def test_every_kind_of_layer_is_compiled_at_start(monkeypatch):
    """Scales and soft caps are kernels of their own, which would else compile while serving."""
    pages = torch.zeros((2 * PAGE, 2, 2, 64), dtype=torch.bfloat16, device=DEVICE)
    ran = []
    module = sys.modules[prefill_calls.__module__]

    def append(*_, soft_cap, scales, sinks, **__):
        ran.append((soft_cap, scales, sinks))

    monkeypatch.setattr(module, "prefix_prefill", append)
    one = torch.ones((), device=DEVICE)
    kinds = [(0.0, None, None), (30.0, (one, one), torch.zeros(4, device=DEVICE))]
    shapes = {"q_dtype": torch.bfloat16, "q_heads": 4, "max_tokens": 500, "page_tokens": PAGE, "kinds": kinds}
    calls = prefill_calls(*(stored(pages[:, n], torch.float8_e4m3fn) for n in (0, 1)), **shapes)
    for some in calls.values():
        for call in some:
            call()
    assert calls
    assert ran == kinds * len(calls)


# Triton's interpreter makes a number of a NaN that it converts to FP8 itself.
@pytest.mark.parametrize("narrow", [False, True] if DEVICE == "cuda" else [False])
def test_a_query_that_is_no_number_stays_one_over_fp8(narrow):
    """Conversion to FP8 saturates; an activation that overflowed must not look like a large one."""
    page = 64 if DEVICE == "cuda" else PAGE
    sizes = {"q_heads": 8, "kv_heads": 2, "dim": 64, "dtype": torch.bfloat16, "cache": torch.float8_e4m3fn}
    batch = Batch.random([20], [100], page=page, seed=7, **sizes)
    batch.q[3] = float("nan")
    wide = Config(64, 64, 4, 3, False, 2) if DEVICE == "cuda" else SMALL
    out = run(batch, config=replace(wide, narrow=narrow), cache=torch.float8_e4m3fn)[0]
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:].isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_products_of_fp8(dim):
    """As FlashAttention-3 makes them: no worse than queries of that type explain, and not as good as without."""
    page = 64 if DEVICE == "cuda" else PAGE
    sizes = {"q_heads": 8, "kv_heads": 2, "dim": dim, "dtype": torch.bfloat16, "cache": torch.float8_e4m3fn}
    batch = Batch.random([70, 1, 9], [300, 200, 9], page=page, seed=6, **sizes)
    wide = Config(64, 64, 4, 3, False, 2) if DEVICE == "cuda" else SMALL
    outs = [run(batch, config=replace(wide, narrow=narrow), cache=torch.float8_e4m3fn)[0] for narrow in (False, True)]
    expected = batch.expected()
    assert_close(outs[0], expected)
    assert_close(outs[1], expected, narrow=True)
    worse, better = ((out.float() - expected).norm() for out in outs[::-1])
    assert worse > 2 * better
