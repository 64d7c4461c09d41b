from __future__ import annotations

import random
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_decode import COST, SharedDecoder
from sglang_vtensor.sharing import DEPTH, Sharing
from tests.kernels.reference import DEVICE, Batch, assert_close

#: Tokens of a page.
PAGE = 8


@dataclass
class Served:
    """Requests as a server has them: tokens anywhere by slot, a prefix of each contiguous, the rest not mapped."""

    batch: Batch
    sharing: Sharing
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, paths: list[list[int]], mapped: list[int], seed: int = 0) -> Served:
        """`paths`: the pages that each request shares or may share; equal ones are made to be the same memory.

        By slot, every token of a page, or of a request behind its path, lies where nobody else's does. The contiguous
        context of request `i` shows its first `mapped[i]` tokens; behind them stands NaN.
        """
        rng = random.Random(seed)
        count = len(batch.contexts)
        tokens = sum(batch.contexts)
        order = rng.sample(range(1, tokens + 1), tokens)
        by_page: dict[int, list[int]] = {}
        slots = rng.sample(range(1, count + 4), count)
        table = torch.zeros(count + 4, max([1, *batch.contexts]), dtype=torch.int32)
        pool = torch.full((tokens + 1, 3, 2, *batch.k.shape[1:]), float("nan"), dtype=batch.k.dtype, device=DEVICE)
        sharing = Sharing(slots=count + 4, requests=count + 1, page_tokens=PAGE)
        for i, context in enumerate(batch.contexts):
            first = int(batch.first[i])
            where = []
            for page in paths[i]:
                where += by_page.setdefault(page, [order.pop() for _ in range(PAGE)])
            where += [order.pop() for _ in range(context - len(where))]
            at = torch.tensor(where, dtype=torch.int64, device=DEVICE)
            table[slots[i], :context] = torch.tensor(where, dtype=torch.int32)
            for x, y in ((batch.k, pool[:, 1, 0]), (batch.v, pool[:, 1, 1])):
                new = y[at].isnan().all(-1).all(-1)
                y[at[new]] = x[first : first + context][new]
                x[first : first + context] = y[at]  # what others share is theirs too
            if context:
                sharing.join(slots[i], paths[i], first=first, mapped=mapped[i])
        served = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
        return cls(batch, sharing, pool[:, 1, 0], pool[:, 1, 1], table.to(DEVICE), served)

    def hide(self, mapped: list[int]) -> None:
        """Behind what contexts show there is nothing that could be read; the reference must have been made before."""
        for first, context, shown in zip(self.batch.first.tolist(), self.batch.contexts, mapped, strict=True):
            self.batch.k[first + shown : first + context] = float("nan")
            self.batch.v[first + shown : first + context] = float("nan")

    def run(self, decoder=None, *, config=None, **options):
        """The kernel on poisoned outputs: values and log-sum-exp."""
        batch = self.batch
        if decoder is None:
            decoder = self.decoder(config)
        decoder.update(self.sharing.tables)
        contexts = torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE)
        decoder.plan(self.slots, contexts)
        out = torch.full_like(batch.q, float("nan"))
        lse = torch.full(batch.q.shape[:2], float("nan"), device=DEVICE)
        arguments = (batch.q, batch.k, batch.v, self.k, self.v, self.table)
        decoder(*arguments, scale=batch.scale, out=out, lse=lse, **options)
        return out, lse

    def decoder(self, config=None) -> SharedDecoder:
        decoder = SharedDecoder(
            max_requests=self.sharing.requests,
            slots=len(self.sharing.tables.firsts),
            q_heads=self.batch.q.shape[1],
            kv_heads=self.batch.k.shape[1],
            head_dim=self.batch.q.shape[2],
            device=DEVICE,
            config=config,
        )
        decoder.part_out.fill_(float("nan"))
        decoder.part_lse.fill_(float("nan"))
        return decoder


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
    dim=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    soft_cap=st.sampled_from([0.0, 0.0, 5.0]),
    sinks=st.booleans(),
    shown=st.sampled_from(["all", "path", "some", "none"]),
    programs=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_trees(seed, requests, heads, dim, dtype, soft_cap, sinks, shown, programs):
    rng = random.Random(seed)
    paths = paths_of(rng, requests, 6)
    contexts = [PAGE * len(path) + rng.choice([1, 1, 2, 15, 16, 17, 40]) for path in paths]
    batch = Batch.random([1] * requests, contexts, q_heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype, seed=seed)
    mapped = {
        "all": [context // PAGE * PAGE for context in contexts],
        "path": [PAGE * len(path) for path in paths],
        "some": [PAGE * rng.randint(0, context // PAGE) for context in contexts],
        "none": [0] * requests,
    }[shown]
    served = Served.of(batch, paths, mapped, seed)
    sink = torch.linspace(-2, 3, heads[0], device=DEVICE) if sinks else None
    expected, sums = batch.expected(soft_cap=soft_cap, sinks=sink)
    served.hide(mapped)
    # On the host also with more programs, so that there are teams for tiles side by side.
    config = Config(16, 16, 4, 1, False, programs) if DEVICE == "cpu" else None
    out, lse = served.run(soft_cap=soft_cap, sinks=sink, config=config)
    assert_close(out, expected)
    assert_close(lse, sums)


def test_a_shared_run_is_read_once():
    """Only one request's memory is read for a run: with the others it is poisoned, in both places."""
    paths = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 10, 11], [1, 2, 3]]
    batch = Batch.random([1] * 4, [70, 60, 50, 90], q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=3)
    served = Served.of(batch, paths, [48] * 4)
    expected, sums = batch.expected()
    tables = served.sharing.tables
    slots = served.slots.tolist()
    for i, slot in enumerate(slots):
        for unit in (unit for unit in tables.chains[slot] if unit >= 0 and tables.sources[unit] != slot):
            first = int(batch.first[i])
            for x in (batch.k, batch.v):
                x[first + tables.lows[unit] : first + tables.highs[unit]] = float("nan")
            served.table[slot, tables.lows[unit] : tables.highs[unit]] = 0
    assert (tables.chains[slots] >= 0).sum() == 4 + 2
    assert served.k[0].isnan().all()
    out, lse = served.run()
    assert_close(out, expected)
    assert_close(lse, sums)


@pytest.mark.parametrize(
    ("paths", "contexts"),
    [
        ([[], [], [], [], []], [40, 1, 16, 17, 33]),  # nothing shared
        ([[1, 2]], [50]),
        ([[1, 2, 3, 4]] * 6, [33] * 6),  # every request identical but for its last token
        ([[1]] * 6, [30] * 6),  # a run shorter than a tile
        ([[1, 2, 3], [], [1, 2, 3], [4], [4]], [25, 0, 40, 9, 12]),  # one is no request
        ([[*range(1, 2 + n)] for n in range(DEPTH + 4)], [8 * n + 9 for n in range(DEPTH + 4)]),  # deeper than is told
    ],
)
def test_what_batches_may_be(paths, contexts):
    batch = Batch.random([1] * len(paths), contexts, q_heads=4, kv_heads=2, dim=64, seed=len(paths))
    served = Served.of(batch, paths, [PAGE * len(path) for path in paths])
    there = torch.tensor([n > 0 for n in contexts], device=DEVICE)
    batch.q = torch.where(there[:, None, None], batch.q, float("nan"))
    expected, _ = batch.expected()
    out, _ = served.run()
    assert_close(out[there], expected[there])
    assert out[~there].isnan().all(), "the row of what is no request was written"


def test_many_requests_on_one_leaf():
    batch = Batch.random([1] * 300, [40] * 300, q_heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16, seed=5)
    served = Served.of(batch, [[1, 2, 3, 4]] * 300, [32] * 300)
    expected, sums = batch.expected()
    out, lse = served.run()
    assert_close(out, expected)
    assert_close(lse, sums)


def test_requests_come_and_leave():
    """One decoder, one server: what an earlier step had is not in the next."""
    paths = paths_of(random.Random(11), 10, 5)
    contexts = [PAGE * len(path) + 3 + n for n, path in enumerate(paths)]
    batch = Batch.random([1] * 10, contexts, q_heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, seed=2)
    served = Served.of(batch, paths, [PAGE * len(path) for path in paths])
    expected, _ = batch.expected()
    decoder = served.decoder()
    everybody, slots = served, served.slots.tolist()
    for there in ([*range(10)], [4, 1, 7], [9], [], [7, 8, 1, 0, 2], [*range(9, -1, -1)]):
        for i, slot in enumerate(slots):
            if i not in there and slot in served.sharing:
                served.sharing.leave(slot)
            if i in there and slot not in served.sharing:
                served.sharing.join(slot, paths[i], first=int(batch.first[i]), mapped=PAGE * len(paths[i]))
        at = torch.tensor(there, dtype=torch.int64, device=DEVICE)
        some = Batch(batch.q[at], batch.k, batch.v, batch.first[at], [1] * len(at), [contexts[i] for i in there], 0.125)
        step = Served(some, served.sharing, served.k, served.v, served.table, everybody.slots[at])
        out, _ = step.run(decoder)
        assert_close(out, expected[at])


@pytest.mark.parametrize("block_m", [16, 32])
def test_heads_that_do_not_fill_a_tile(block_m):
    """Of groups of 7 heads, two fit into 16 rows, and two rows are nobody's."""
    batch = Batch.random([1] * 5, [60] * 5, q_heads=14, kv_heads=2, dim=64, dtype=torch.float16, seed=8)
    served = Served.of(batch, [[1, 2, 3, 4, 5]] * 5, [40] * 5)
    expected, sums = batch.expected()
    out, lse = served.run(config=Config(block_m, 16, 4, 1))
    assert_close(out, expected)
    assert_close(lse, sums)


@pytest.mark.parametrize("occupancy", [2, 4, 8, 16])
def test_tiles_of_a_run_side_by_side(occupancy):
    """Three tiles of a run and two of another, divided alike; what is left of their teams' shares is filled."""
    long, short = [*range(1, 61)], [*range(101, 131)]
    paths = [long] * 10 + [short] * 7 + [[]] * 3
    contexts = [8 * len(path) + 5 * n + 1 for n, path in enumerate(paths)]
    batch = Batch.random([1] * 20, contexts, q_heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16, seed=4)
    served = Served.of(batch, paths, [8 * len(path) for path in paths])
    expected, sums = batch.expected()
    decoder = served.decoder(Config(16, 16, 4, 1, False, occupancy))
    out, lse = served.run(decoder)
    assert_close(out, expected)
    assert_close(lse, sums)
    low, high, _, unit, tile, begin, end, _ = decoder.work.T.tolist()
    units = decoder.units.tolist()
    share = int(decoder.line[0])
    beside = [team for team in range(decoder.teams) if unit[team] >= 0]
    # Teams of one part of a run are neighbours, and work on the same keys.
    for team in beside:
        first = team - tile[team]
        rows = -(-units[unit[team]][6] // decoder.each)
        assert rows > 1
        assert tile[first : first + rows] == [*range(rows)]
        for column in (unit, begin, end):
            assert len(set(column[first : first + rows])) == 1
    # What they do is all that there is, and nobody does more than a share.
    done = [end[team] - begin[team] + max(high[team] - low[team], 0) for team in range(decoder.teams)]
    assert max(done) <= share
    assert sum(done) == sum(
        -(-count // decoder.each) * (keys + COST) for _, keys, _, _, _, _, count, _ in units if keys
    )
    assert len(beside) == len({(unit[team], tile[team], begin[team]) for team in beside}) >= (5 if occupancy > 2 else 0)


def small(**changes):
    geometry = {"max_requests": 4, "slots": 6, "q_heads": 4, "kv_heads": 2, "head_dim": 64, "device": DEVICE}
    return SharedDecoder(**(geometry | changes))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="0 requests, 6 slots, 4 query heads over 2"):
        small(max_requests=0)
    with pytest.raises(ValueError, match="head_dim 72"):
        small(head_dim=72)
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
        decoder(batch.q[:1], batch.k, batch.v, batch.k, batch.v, table, scale=1.0)
    with pytest.raises(ValueError, match="k_by_slot is"):
        decoder(batch.q, batch.k, batch.v, batch.k.contiguous(), batch.v, table, scale=1.0)
    with pytest.raises(ValueError, match=r"table is \(6, 9\) torch.int64"):
        decoder(batch.q, batch.k, batch.v, batch.k, batch.v, table.long(), scale=1.0)
    with pytest.raises(ValueError, match="over k"):
        decoder(batch.q[:, :2], batch.k, batch.v, batch.k, batch.v, table, scale=1.0)
