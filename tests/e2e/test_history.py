"""Random histories on the real scheduler: conversations go on, branch, repeat, are aborted, in a pool too small.

Before each batch the harness checks that what it reads is its requests' own, and has memory. Addresses are plenty, or
always short.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests import versions
from tests.e2e.compare import TIE, Prompts, assert_same, having
from tests.effort import share_of
from tests.harness import FEW_FRAMES, Abort, Request, side_by_side

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


@pytest.mark.parametrize(
    ("page_size", "examples", "placing"),
    [
        (1, 10, {}),
        (16, 80, {}),
        (16, 50, {"environment": FEW_FRAMES}),
        (16, 40, {"kv_cache_dtype": "fp8_e4m3"}),
        *((16, 60, {"model": model}) for model in versions.WINDOWED),
        *((16, 40, {"model": model}) for model in versions.WITH_STATES),
    ],
    ids=["page1", "page16", "few-frames", "fp8", *versions.WINDOWED, *versions.WITH_STATES],
)
def test_any_history_gets_the_same_tokens(schedulers, page_size, examples, placing):
    model = placing.get("model", "gqa")
    placing = {name: value for name, value in placing.items() if name != "model"}
    cache = {name: value for name, value in placing.items() if name == "kv_cache_dtype"}
    tie = TIE["fp8" if cache else "float32"]
    limits = {"max_total_tokens": 640, "max_running_requests": 8, "chunked_prefill_size": 64, **cache}
    reference = schedulers(model, **limits)
    ours = schedulers(model, kv_backend="vtensor", page_size=page_size, **(placing | limits))
    before = ours.stats()

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=share_of(examples), deadline=None, suppress_health_check=slow)
    @given(seed=st.integers(0, 1 << 30), rounds=st.lists(STEPS, min_size=1, max_size=3))
    def run(seed, rounds):
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
                    assert_same(expected[rid], got[rid], tie=tie, what=rid)
            for (chat, *_), (rid, tokens) in zip(steps, requests.items(), strict=True):
                if rid in expected:
                    chats[chat] = tokens + expected[rid].tokens

    with having(ours, AWAITED_TOKENS=8):
        run()
    gained = {key: value - before[key] for key, value in ours.stats().items() if isinstance(value, int)}
    print({key: gained[key] for key in ("pages_allocated", "pages_with_memory", "pages_created_at_once")})
    print(f"{gained['context_runs'] / gained['contexts']:.2f} runs a context, {gained['broken_runs']} broken ones")
    assert gained["pages_with_memory"] > 0
    if "environment" in placing:
        assert gained["extents_halved"] > 0
        assert gained["broken_runs"] > 0
