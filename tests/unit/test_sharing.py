from __future__ import annotations

import json
import statistics
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from benchmarks.kernels import GEOMETRIES, HEADS, SERVED
from sglang_vtensor.kernels.configs import shared_decode_pays
from sglang_vtensor.sharing import DEPTH, Sharing

TOKENS = 4
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class Tree:
    """Paths as a prefix tree gives them: the same pages behind each other are always the same node's."""

    def __init__(self):
        self._pages = {}

    def pages(self, path):
        """Page numbers of a path of choices: one number for each distinct start of it."""
        return [self._pages.setdefault(tuple(path[: n + 1]), len(self._pages) + 1) for n in range(len(path))]


def expected(members):
    """What each request begins with: `[(low, high, how many share it)]`, by looking at everybody."""
    found = {}
    for slot, pages in members.items():
        sharers = [sum(other[: n + 1] == pages[: n + 1] for other in members.values()) for n in range(len(pages))]
        runs, low = [], 0
        for at in range(1, len(pages) + 1):
            if at == len(pages) or sharers[at] != sharers[low]:
                if sharers[low] > 1:
                    runs.append((low * TOKENS, at * TOKENS, sharers[low]))
                low = at
        found[slot] = runs[:DEPTH]
    return found


def told(sharing, slot):
    tables = sharing.tables
    units = [int(unit) for unit in tables.chains[slot] if unit >= 0]
    return [(int(tables.lows[u]), int(tables.highs[u]), int(tables.counts[u])) for u in units]


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 11),  # a request slot: it joins, or leaves
            st.lists(st.integers(0, 1), max_size=14),  # choices: two branches everywhere, so that much is shared
            st.integers(1, 3),  # pages a choice
        ),
        max_size=40,
    )
)
def test_any_history_is_told_as_it_is(steps):
    tree, members = Tree(), {}
    sharing = Sharing(slots=12, requests=12, page_tokens=TOKENS)
    for slot, choices, repeat in steps:
        if slot in members:
            sharing.leave(slot)
            del members[slot]
        else:
            members[slot] = tree.pages([c for choice in choices for c in [choice] * repeat])
            sharing.join(slot, members[slot])
        sharing.check_integrity()
        assert sharing.slots() == set(members)
        for member, runs in expected(members).items():
            assert told(sharing, member) == runs
    sharing.clear()
    sharing.check_integrity()
    assert (sharing.shared_tokens, sharing.saved_tokens, len(sharing)) == (0, 0, 0)


def test_what_cannot_join():
    sharing = Sharing(slots=8, requests=2, page_tokens=TOKENS)
    sharing.join(0, [1])
    with pytest.raises(ValueError, match=r"slot 0, of \{0\}: one that has not joined wanted, of 2"):
        sharing.join(0, [1])
    sharing.join(1, [1])
    with pytest.raises(ValueError, match="slot 2"):
        sharing.join(2, [1])


def test_joining_and_leaving_touches_what_has_changed():
    """Calls into the trie's own steps do not grow with the batch, where it is one prompt and what follows it."""

    def steps(requests):
        sharing = Sharing(slots=requests + 1, requests=requests + 1, page_tokens=TOKENS)
        for slot in range(requests):
            sharing.join(slot, [*range(1, 50), 100 + slot])
        seen = []
        sharing._chain = lambda slot, chain=sharing._chain: (seen.append(slot), chain(slot))
        sharing.join(requests, [*range(1, 50), 7])
        sharing.leave(requests)
        return len(seen)

    assert steps(4) == steps(400)


@pytest.mark.parametrize(
    ("requests", "of_all", "own", "pays"),
    [
        (64, 8192, 512, True),  # measured: 5.5 times as fast
        (64, 2048, 2000, True),
        (4, 16384, 100, True),
        (64, 0, 4096, False),  # measured: nothing to win
        (1, 0, 4096, False),
        (64, 128, 2000, False),  # the shared start is little of what is read
        (8, 512, 100, False),  # all of it is read in the time that two kernels take to start
        (2, 16384, 100, False),  # the cache serves the second reader
    ],
)
def test_what_pays(requests, of_all, own, pays):
    """With 4 query heads a KV head and 4 KiB a token, as Llama-3-8B has in a layer."""
    tokens, saved = requests * (of_all + own), max(0, requests - 1) * of_all
    assert shared_decode_pays(requests, tokens, of_all, saved, group=4, token_bytes=4096) is pays


def test_what_pays_on_hopper_though_nothing_is_shared():
    plain = {"shared": 0, "saved": 0, "group": 4, "token_bytes": 4096}
    assert shared_decode_pays(64, 64 * 1280, **plain, capability=90)
    assert not shared_decode_pays(8, 8 * 300, **plain, capability=90), "measured: 14 microseconds for 12"
    assert not shared_decode_pays(1, 32768, **plain, capability=90), "with 4 KV heads: 39 for 31"
    assert not shared_decode_pays(64, 64 * 1280, **plain, capability=80), "not measured"
    fp8 = {"group": 4, "token_bytes": 2048, "capability": 90, "kv_dtype": torch.float8_e4m3fn}
    assert shared_decode_pays(256, 256 * 512, 0, 0, **fp8), "118 microseconds for 129"
    assert shared_decode_pays(64, 64 * 8192, 0, 0, **fp8), "318 for 326"
    assert not shared_decode_pays(64, 64 * 8192, 0, 0, **fp8 | {"token_bytes": 512}), "with 2 KV heads: 91 for 88"
    assert shared_decode_pays(256, 256 * 512, 0, 0, **fp8 | {"token_bytes": 256}), "25 for 28, with one KV head"
    assert shared_decode_pays(64, 64 * 1024, 0, 0, **fp8 | {"token_bytes": 1024, "head_dim": 64}), "39 for 41"
    assert shared_decode_pays(1, 131072, 0, 0, **fp8 | {"group": 1, "token_bytes": 6144, "head_dim": 96})
    assert shared_decode_pays(64, 64 * 8704, 8192, 63 * 8192, **fp8), "61 for 338"
    # By the costs of products in 16 bits, which such heads have.
    half = {"tokens": 64 * 7000, "shared": 2048, "saved": 63 * 2048}
    assert shared_decode_pays(64, **half, **fp8)
    assert not shared_decode_pays(64, **half, **fp8 | {"head_dim": 256})
    assert shared_decode_pays(256, 256 * 16640, 8 * 16384, 248 * 16384, **fp8), "244 for 2,647"
    little = {"tokens": 64 * 8192, "shared": 512, "saved": 63 * 512}
    assert not shared_decode_pays(64, **little, **fp8 | {"token_bytes": 512}), "a little of what is read is shared"


@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "requests", "shared", "own"),
    [
        (256, 8, 2, 8, 8192, 8192),  # 294 microseconds for 153, by the rates of what shares nothing
        (256, 8, 2, 2, 8192, 4096),
        (192, 1, 12, 64, 4096, 4096),
        (128, 1, 8, 2, 131072, 0),  # 396 parts for one program to merge
    ],
)
def test_over_fp8_what_shares_too_little_is_left_to_sglang(dim, kv_heads, group, requests, shared, own):
    tokens, saved = requests * (shared + own), (requests - 1) * shared
    more = {"capability": 90, "kv_dtype": torch.float8_e4m3fn, "head_dim": dim}
    assert not shared_decode_pays(requests, tokens, shared, saved, group, 2 * kv_heads * dim, **more)


def test_two_long_contexts_among_short_ones_are_merged_by_few_programs_too():
    batch = {"tokens": 2 * 131072 + 62 * 100, "shared": 0, "saved": 0, "group": 8, "token_bytes": 256}
    batch |= {"capability": 90, "head_dim": 64}
    assert shared_decode_pays(64, **batch)
    assert not shared_decode_pays(64, **batch, longest=131072)


def test_no_measured_batch_that_shares_nothing_gets_the_slower_kernel():
    """By what the results files say, but for a hundredth, which one run differs from the next by."""
    for name, kv_dtype in (("fp8_decode", torch.float8_e4m3fn), ("plain_decode", torch.bfloat16)):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        taken = 0
        for row in rows:
            geometry, _, shape = row["case"].rpartition(", ") if "case" in row else (row["geometry"], "", row["shape"])
            if " x " not in shape:
                continue
            heads, kv_heads, dim, _ = (GEOMETRIES | SERVED | HEADS)[geometry]
            requests, context = map(int, shape.split(" x "))
            numbers = requests, requests * context, 0, 0, heads // kv_heads, 2 * kv_heads * dim * kv_dtype.itemsize
            if shared_decode_pays(*numbers, capability=90, kv_dtype=kv_dtype, head_dim=dim):
                theirs = row["fa3_in_ours"] if name == "fp8_decode" else row["fa3_slots"]
                assert theirs / row["ours"] > 0.989, (geometry, shape)
                taken += 1
        assert taken > 20, name


def test_over_16_bits_no_served_model_gets_a_much_slower_kernel():
    """Beside FlashAttention-3 over pages in a layout of its own, which it reads a little faster than ours."""
    ratios = []
    for row in json.loads((RESULTS / "fp8_decode.json").read_text())["rows"]:
        geometry, _, shape = row["case"].rpartition(", ")
        if " x " in shape:
            heads, kv_heads, dim, _ = (GEOMETRIES | SERVED | HEADS)[geometry]
            requests, context = map(int, shape.split(" x "))
            numbers = requests, requests * context, 0, 0, heads // kv_heads, 4 * kv_heads * dim
            if shared_decode_pays(*numbers, capability=90, head_dim=dim):
                ratios.append(row["fa3_page128_bf16"] / row["ours_bf16"])
                assert ratios[-1] > 0.95, (geometry, shape)
            elif dim in (64, 96):
                assert row["fa3_page128_bf16"] / row["ours_bf16"] < 1.1, (geometry, shape)
    assert len(ratios) > 20
    assert statistics.geometric_mean(ratios) > 1


@pytest.mark.parametrize("dim", [80, 192, 256])
def test_what_shares_nothing_is_left_to_sglang_where_heads_were_not_measured(dim):
    plain = {"shared": 0, "saved": 0, "group": 4, "capability": 90, "head_dim": dim}
    assert not shared_decode_pays(64, 64 * 8192, token_bytes=8192, **plain)
    assert not shared_decode_pays(256, 256 * 512, token_bytes=4096, kv_dtype=torch.float8_e4m3fn, **plain)
    shares = plain | {"shared": 8192, "saved": 63 * 8192}
    assert shared_decode_pays(64, 64 * 8704, token_bytes=8192, **shares)
