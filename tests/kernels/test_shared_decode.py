from __future__ import annotations

import random
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels import shared_plan
from sglang_vtensor.kernels.launch import FP8
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_decode import COST, SharedDecoder
from sglang_vtensor.sharing import DEPTH, Sharing
from tests.effort import share_of
from tests.kernels.reference import DEVICE, Batch, assert_close, stored

#: Tokens of a page: whole tiles, of 16 keys on the host and of 64 on a GPU.
PAGE = 16 if DEVICE == "cpu" else 64


def fields(kind: str, *names: str) -> dict[str, int]:
    """Where the planner's fields of that kind are."""
    return {name: getattr(shared_plan, f"{kind}_{name}").value for name in names}


UNIT = fields("UNIT", "BEGIN", "TILES", "BEFORE", "LOW", "HIGH", "MEMBERS", "COUNT")
TEAM = fields("TEAM", "AT", "END", "UNIT", "BESIDE", "TILE", "FROM", "TO", "TURN")


@dataclass
class Served:
    """Requests as a server has them: pages anywhere, and of each request the slots of its tokens."""

    batch: Batch
    sharing: Sharing
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, paths: list[list[int]], seed: int = 0) -> Served:
        """`paths`: the pages that each request shares or may share; equal ones are made to be the same memory.

        Every page lies where nobody else's does. Behind a context, to the end of its last page, stands NaN. The
        contiguous contexts of `batch` are for the reference alone.
        """
        rng = random.Random(seed)
        count = len(batch.contexts)
        pages = sum(-(-context // PAGE) for context in batch.contexts)
        order = rng.sample(range(1, pages + 1), pages)
        by_page: dict[int, int] = {}
        slots = rng.sample(range(1, count + 4), count)
        table = torch.zeros(count + 4, max([1, *batch.contexts]), dtype=torch.int32)
        shape = ((pages + 1) * PAGE, 3, 2, *batch.k.shape[1:])
        pool = torch.full(shape, float("nan"), dtype=batch.k.dtype, device=DEVICE)
        sharing = Sharing(slots=count + 4, requests=count + 1, page_tokens=PAGE)
        for i, context in enumerate(batch.contexts):
            first = batch.runs[i][0][0] if batch.runs[i] else 0
            own = -(-context // PAGE) - len(paths[i])
            for page in paths[i]:
                if page not in by_page:
                    by_page[page] = order.pop()
            its = [by_page[page] for page in paths[i]]
            its += [order.pop() for _ in range(own)]
            where = [page * PAGE + n for page in its for n in range(PAGE)][:context]
            at = torch.tensor(where, dtype=torch.int64, device=DEVICE)
            table[slots[i], :context] = torch.tensor(where, dtype=torch.int32)
            for x, y in ((batch.k, pool[:, 1, 0]), (batch.v, pool[:, 1, 1])):
                new = y[at].isnan().all(-1).all(-1)
                y[at[new]] = x[first : first + context][new]
                x[first : first + context] = y[at]  # what others share is theirs too
            if context:
                sharing.join(slots[i], paths[i])
        served = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
        return cls(batch, sharing, pool[:, 1, 0], pool[:, 1, 1], table.to(DEVICE), served)

    def run(self, decoder=None, *, config=None, cache=None, **options):
        """The kernel on a poisoned output, over a `cache` of that type."""
        batch = self.batch
        if decoder is None:
            decoder = self.decoder(config, cache)
        decoder.update(self.sharing.tables)
        contexts = torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE)
        table = self.table.clone()
        decoder.find_pages(table, self.slots, contexts)
        table.fill_(-1)  # from here on it may change
        decoder.plan(self.slots, contexts)
        out = torch.full_like(batch.q, float("nan"))
        decoder(batch.q, stored(self.k, cache), stored(self.v, cache), scale=batch.scale, out=out, **options)
        return out

    def decoder(self, config=None, cache=None) -> SharedDecoder:
        decoder = SharedDecoder(
            max_requests=self.sharing.requests,
            slots=len(self.sharing.tables.chains),
            page_tokens=PAGE,
            max_tokens=self.table.shape[1],
            q_heads=self.batch.q.shape[1],
            kv_heads=self.batch.k.shape[1],
            head_dim=self.batch.q.shape[2],
            device=DEVICE,
            kv_dtype=cache or self.batch.k.dtype,
            config=config,
        )
        decoder.part_out.fill_(float("nan"))
        decoder.part_lse.fill_(float("nan"))
        decoder.pages.fill_(-1)
        return decoder


def as_multiplied(batch: Batch, decoder: SharedDecoder, cache) -> Batch:
    """The batch with queries as the decoder multiplies them: over e4m3 on Hopper, rounded to that type too."""
    if not (decoder.config.narrow and cache == FP8[0]):
        return batch
    return replace(batch, q=batch.q.to(cache).to(batch.q.dtype))


def paths_of(rng: random.Random, requests: int, longest: int) -> list[list[int]]:
    """Random paths: each request goes on from somewhere on the path of one before it, or from the start."""
    paths: list[list[int]] = []
    pages = iter(range(1, 1 << 30))
    for _ in range(requests):
        stem = rng.choice([[], *paths])
        stem = stem[: rng.randint(0, len(stem))] if rng.random() < 0.7 else stem
        paths.append([*stem, *(next(pages) for _ in range(rng.randint(0, longest)))])
    return paths


@given(
    seed=st.integers(0, 10_000),
    requests=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (8, 2)]),
    dim=st.sampled_from([64, 80, 96, 128, 192]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    programs=st.sampled_from([1, 3, 8]),
    cache=st.sampled_from([None, None, *FP8]),
)
@settings(max_examples=share_of(50), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_trees(seed, requests, heads, dim, dtype, soft_cap, sinks, programs, cache):
    rng = random.Random(seed)
    paths = paths_of(rng, requests, 6)
    contexts = [PAGE * len(path) + rng.choice([1, 1, 2, PAGE - 1, PAGE, PAGE + 1, 40]) for path in paths]
    geometry = {"q_heads": heads[0], "kv_heads": heads[1], "dim": dim, "dtype": dtype}
    batch = Batch.random([1] * requests, contexts, **geometry, seed=seed, cache=cache)
    served = Served.of(batch, paths, seed)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    scales = None if cache is None else tuple(torch.tensor(x, device=DEVICE) for x in (0.7, 1.3))
    # On the host also with more programs, so that there are teams for tiles side by side.
    decoder = served.decoder(Config(16, 16, 4, 1, False, programs) if DEVICE == "cpu" else None, cache)
    expected = as_multiplied(batch, decoder, cache).expected(soft_cap=soft_cap, sinks=sink, scales=scales)
    out = served.run(decoder, soft_cap=soft_cap, sinks=sink, cache=cache, scales=scales)
    assert_close(out, expected)


def test_a_shared_run_is_read_once():
    """Only the first request's pages are read for a run: with the others it is said to be where there is NaN."""
    paths = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 10, 11], [1, 2, 3]]
    contexts = [PAGE * n + m for n, m in ((7, 14), (6, 12), (5, 10), (4, 1))]
    batch = Batch.random([1] * 4, contexts, q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3)
    served = Served.of(batch, paths)
    expected = batch.expected()
    tables = served.sharing.tables
    slots = served.slots.tolist()
    seen = set()
    for slot in slots:
        for unit in (unit for unit in tables.chains[slot] if unit >= 0):
            if unit in seen:
                served.table[slot, tables.lows[unit] : tables.highs[unit]] = 0
            seen.add(unit)
    assert (tables.chains[slots] >= 0).sum() == 4 + 2
    assert served.k[0].isnan().all()
    out = served.run()
    assert_close(out, expected)


@pytest.mark.parametrize(
    ("paths", "contexts"),
    [
        ([[], [], [], [], []], [40, 1, 16, 17, 33]),  # nothing shared
        ([[1, 2]], [3 * PAGE + 2]),
        ([[1, 2, 3, 4]] * 6, [4 * PAGE + 1] * 6),  # every request identical but for its last token
        ([[1]] * 6, [2 * PAGE - 2] * 6),  # a run of one page
        ([[1, 2, 3], [], [1, 2, 3], [4], [4]], [3 * PAGE + 1, 0, 5 * PAGE, PAGE + 1, PAGE + 4]),  # one is no request
        ([[*range(1, 2 + n)] for n in range(DEPTH + 4)], [PAGE * n + PAGE + 1 for n in range(DEPTH + 4)]),  # too deep
    ],
)
def test_what_batches_may_be(paths, contexts):
    batch = Batch.random([1] * len(paths), contexts, q_heads=4, kv_heads=2, dim=64, seed=len(paths))
    served = Served.of(batch, paths)
    there = torch.tensor([n > 0 for n in contexts], device=DEVICE)
    batch.q = torch.where(there[:, None, None], batch.q, float("nan"))
    expected = batch.expected()
    out = served.run()
    assert_close(out[there], expected[there])
    assert out[~there].isnan().all(), "the row of what is no request was written"


@pytest.mark.parametrize("count", [300, 1100])
def test_many_requests_on_one_leaf(count):
    """And, with more of them than one step of `_arrange` looks at, on two leaves."""
    contexts = [2 * PAGE + 8] * count
    batch = Batch.random([1] * count, contexts, q_heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16, seed=5)
    served = Served.of(batch, [[1, 2 + (n > 512)] for n in range(count)])
    expected = batch.expected()
    out = served.run()
    assert_close(out, expected)


def test_requests_come_and_leave():
    """One decoder, one server: what an earlier step had is not in the next."""
    paths = paths_of(random.Random(11), 10, 5)
    contexts = [PAGE * len(path) + 3 + n for n, path in enumerate(paths)]
    batch = Batch.random([1] * 10, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=2)
    served = Served.of(batch, paths)
    expected = batch.expected()
    decoder = served.decoder()
    everybody, slots = served, served.slots.tolist()
    for there in ([*range(10)], [4, 1, 7], [9], [], [7, 8, 1, 0, 2], [*range(9, -1, -1)]):
        for i, slot in enumerate(slots):
            if i not in there and slot in served.sharing:
                served.sharing.leave(slot)
            if i in there and slot not in served.sharing:
                served.sharing.join(slot, paths[i])
        at = torch.tensor(there, dtype=torch.int64, device=DEVICE)
        some = Batch(batch.q[at], batch.k, batch.v, [batch.runs[i] for i in there], [1] * len(at), 0.125, 1)
        step = Served(some, served.sharing, served.k, served.v, served.table, everybody.slots[at])
        out = step.run(decoder)
        assert_close(out, expected[at])


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_products_of_fp8(dim):
    """With queries of the keys' type, as FlashAttention-3 has them."""
    sizes = {"q_heads": 8, "kv_heads": 2, "dim": dim, "dtype": torch.bfloat16, "cache": FP8[0]}
    batch = Batch.random([1] * 6, [5 * PAGE + n for n in range(6)], seed=9, **sizes)
    served = Served.of(batch, [[1, 2, 3, 4]] * 6)
    expected = batch.expected()
    config = Config(16, 16, 4, 1, narrow=True) if DEVICE == "cpu" else None
    out = served.run(config=config, cache=FP8[0])
    assert_close(out, expected, narrow=True)


@pytest.mark.parametrize("block_m", [16, 32])
def test_heads_that_do_not_fill_a_tile(block_m):
    """Of groups of 7 heads, two fit into 16 rows, and two rows are nobody's."""
    batch = Batch.random([1] * 5, [4 * PAGE - 4] * 5, q_heads=14, kv_heads=2, dim=64, dtype=torch.float16, seed=8)
    served = Served.of(batch, [[1, 2, 3]] * 5)
    expected = batch.expected()
    out = served.run(config=Config(block_m, 16, 4, 1))
    assert_close(out, expected)


@pytest.mark.parametrize("occupancy", [2, 4, 8, 16])
def test_tiles_of_a_run_side_by_side(occupancy):
    """Three tiles of a run and two of another, divided alike; what is left of their teams' shares is filled."""
    long, short = [*range(1, 1 + 480 // PAGE)], [*range(101, 101 + 240 // PAGE)]
    paths = [long] * 10 + [short] * 7 + [[]] * 3
    contexts = [PAGE * len(path) + 5 * n + 1 for n, path in enumerate(paths)]
    batch = Batch.random([1] * 20, contexts, q_heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16, seed=4)
    served = Served.of(batch, paths)
    expected = batch.expected()
    decoder = served.decoder(Config(16, 16, 4, 1, False, occupancy))
    out = served.run(decoder)
    assert_close(out, expected)
    team = {name: decoder.work[:, field].tolist() for name, field in TEAM.items()}
    tiles, count = (decoder.units[:, UNIT[name]] for name in ("TILES", "COUNT"))
    tile_rows = (-(-count // decoder.each)).tolist()
    share = int(decoder.line[shared_plan.LINE_SHARE.value])
    beside = [n for n in range(decoder.teams) if team["BESIDE"][n] >= 0]
    # Teams of one part of a run are neighbours, and work on the same keys.
    for n in beside:
        first = n - team["TILE"][n]
        rows = tile_rows[team["BESIDE"][n]]
        assert rows > 1
        assert team["TILE"][first : first + rows] == [*range(rows)]
        for name in ("BESIDE", "FROM", "TO"):
            assert len(set(team[name][first : first + rows])) == 1
    # What they do is all that there is, and nobody does more than a share.
    done = [team["TO"][n] - team["FROM"][n] + max(team["END"][n] - team["AT"][n], 0) for n in range(decoder.teams)]
    assert max(done) <= share
    assert sum(done) == sum(rows * (keys + COST) for rows, keys in zip(tile_rows, tiles.tolist(), strict=True) if keys)
    of = {(team["BESIDE"][n], team["TILE"][n], team["FROM"][n]) for n in beside}
    assert len(beside) == len(of) >= (5 if occupancy > 2 else 0)


def small(**changes):
    geometry = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "device": DEVICE}
    return SharedDecoder(
        **({"max_requests": 4, "slots": 6, "page_tokens": PAGE, "max_tokens": 90} | geometry | changes)
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="0 requests, 6 slots, 4 query heads over 2"):
        small(max_requests=0)
    with pytest.raises(ValueError, match="head_dim 72"):
        small(head_dim=72)
    with pytest.raises(ValueError, match=r"pages of 40 tokens: whole tiles of \d+ tokens wanted"):
        small(page_tokens=40)
    decoder = small()
    with pytest.raises(ValueError, match="tables for 6 slots and 4 requests wanted"):
        decoder.update(Sharing(slots=7, requests=4, page_tokens=8).tables)
    crowded = Sharing(slots=6, requests=4, page_tokens=8)
    crowded.tables.counts[:] = 500
    assert not decoder.fits(crowded.tables)
    with pytest.raises(ValueError, match="with up to"):
        decoder.update(crowded.tables)
    two = torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=r"contexts are \(2,\) torch.float32"):
        decoder.plan(two, two.float())
    with pytest.raises(ValueError, match=r"slots are \(5,\)"):
        decoder.plan(torch.ones(5, dtype=torch.int32, device=DEVICE), two)
    batch = Batch.random([1, 1], [9, 9], q_heads=4, kv_heads=2, dim=64)
    decoder.plan(two, two)
    table = torch.zeros(6, 9, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="q has 1 rows, the plan 2"):
        decoder(batch.q[:1], batch.k, batch.v, scale=1.0)
    with pytest.raises(ValueError, match=r"table is \(6, 9\) torch.int64"):
        decoder.find_pages(table.long(), two, two)
    with pytest.raises(ValueError, match=r"slots are \(5,\)"):
        decoder.find_pages(table, torch.ones(5, dtype=torch.int32, device=DEVICE), two)
    with pytest.raises(ValueError, match="over k"):
        decoder(batch.q[:, :2], batch.k, batch.v, scale=1.0)
