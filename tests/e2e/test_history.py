"""Random histories on the real scheduler: conversations go on, branch, repeat, are aborted, in a pool too small.

Whether a batch reads segments or pages is drawn, so that a request's chunks and steps are read in every order. Before
each batch the harness checks that what it reads is its requests' own.
"""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests.e2e.compare import TIE, Prompts, assert_same, having
from tests.harness import Abort, Do, Request, draw_reads, side_by_side

#: One step of a history: which conversation goes on (or branches from), how much is said, and how it ends.
STEPS = st.lists(
    st.tuples(
        st.integers(0, 5),  # the conversation
        st.integers(0, 40),  # tokens said
        st.integers(1, 24),  # tokens answered
        st.integers(0, 4),  # turns of the event loop before the next arrives
        st.sampled_from(["go on", "go on", "branch", "repeat", "abort"]),
    ),
    min_size=3,
    max_size=14,
)


@pytest.mark.parametrize(("page_size", "examples"), [(1, 10), (16, 100)])
def test_any_history_gets_the_same_tokens(schedulers, page_size, examples):
    limits = {"max_total_tokens": 640, "max_running_requests": 8, "chunked_prefill_size": 64}
    reference = schedulers(**limits)
    ours = schedulers(kv_backend="vtensor", page_size=page_size, **limits)

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, suppress_health_check=slow)
    @given(seed=st.integers(0, 1 << 30), rounds=st.lists(STEPS, min_size=1, max_size=3))
    def run(seed, rounds):
        for way, count in ours.call(draw_reads, seed).items():
            reads[way] += count
        prompt = Prompts(seed)
        chats = [prompt(20 + 9 * n) for n in range(3)]
        chats += [chat[:11] + prompt(25) for chat in chats]
        for number, steps in enumerate(rounds):
            script: list[list[Request | Abort]] = [[]]
            requests, aborted = {}, set()
            for at, (chat, said, answered, wait, how) in enumerate(steps):
                tokens = chats[chat][:160] + prompt(said)
                if how == "branch":
                    tokens = tokens[: len(tokens) // 2 + 1] + prompt(said)
                if how == "repeat" and requests:
                    tokens = next(iter(requests.values()))
                rid = f"n{number}s{at}"
                requests[rid] = tokens
                script[-1].append(Request(rid, tokens, answered))
                script += [[] for _ in range(wait)]
                if how == "abort":
                    aborted.add(rid)
                    script[-1].append(Abort(f"{rid}"))
            expected, got = side_by_side(reference, ours, script)
            ours.check()
            for rid in requests:
                # SGLang aborts by prefix: s1 takes s10 with it.
                if not any(rid.startswith(name) for name in aborted):
                    assert_same(expected[rid], got[rid], tie=TIE["float32"], what=rid)
            for (chat, *_), (rid, tokens) in zip(steps, requests.items(), strict=True):
                if rid in expected:
                    chats[chat] = tokens + expected[rid].tokens

    reads: Counter[str] = Counter()
    try:
        with having(ours, AWAITED_TOKENS=8):
            run()
    finally:
        reads.update(ours.call(draw_reads, None))
    print(f"requests of batches, by how they were read: {dict(reads)}")
    ways = ("extend by segments", "extend by pages", "decode by segments", "decode by pages", "mixed")
    assert all(reads[way] for way in ways), reads


def first_chunk_by_pages(scheduler):
    """Of request b, the first chunk reads pages and all others segments: on a GPU, who else is in its batches decides
    that."""
    chunked = scheduler.chunked_req
    pages = chunked is None or chunked.rid != "b"
    scheduler.token_to_kv_pool_allocator.runtime.waits_for = lambda batch, new_pages: 1 << 20 if pages else 0


def test_a_prefix_that_was_mapped_while_a_request_waited_and_then_evicted_in_part(schedulers):
    """What it then reads is its own, and so is what later requests find of it in the tree."""
    limits = {"max_total_tokens": 1024, "max_running_requests": 1, "chunked_prefill_size": 64}
    reference = schedulers(**limits)
    ours = schedulers(kv_backend="vtensor", page_size=16, vtensor_max_parked=1, **limits)
    prompt = Prompts(5)
    stem = prompt(640)
    scripts = [
        [[Request("whole", stem, 1)]],
        [[Request("start", stem[:160] + prompt(40), 1)]],
        # The busy one takes the memory of all of the stem but its start, which was read last; b waits meanwhile.
        [[Request("busy", prompt(100), 560)], [], [Request("b", stem + prompt(5), 40)]],
        [[Request("later", stem + prompt(9), 40)]],
    ]
    watch = Do(first_chunk_by_pages)
    before = ours.stats()
    try:
        for script in scripts:
            watched = [[watch, *turn] for turn in script] + [[watch]] * 760
            expected, got = side_by_side(reference, ours, script, watched)
            for rid, theirs in expected.items():
                assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)
                assert abs(theirs.logprobs[0] - got[rid].logprobs[0]) < 1e-3, rid
            ours.check()
    finally:
        ours.call(draw_reads, None)
    gained = {key: value - before[key] for key, value in ours.stats().items()}
    assert gained["prepared_segments"] > 0
    assert gained["extends_by_pages"] > 0
