"""The GPU has less memory than the pool's size promised. Run alone: what else runs on the GPU changes what is free."""

from __future__ import annotations

import pytest

from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shortage import refuse_at_random
from tests.gpu.in_scheduler import hog
from tests.harness import Do, Request, nobody_starts

LIMITS = {
    "dtype": "bfloat16",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 32768,
    "max_running_requests": 32,
    "chunked_prefill_size": 1024,
    "cuda_graph_max_bs_decode": 32,
}


@pytest.fixture
def servers(schedulers):
    return schedulers.both({"attention_backend": "fa3", **LIMITS}, {"kv_backend": "vtensor", **LIMITS})


def requests(seed: int) -> list[Request]:
    prompt = Prompts(seed)
    stem = prompt(150)
    return [Request(f"r{seed}n{n}.", stem + prompt(1 + 53 * n), 150) for n in range(24)]


def test_another_holder_of_the_memory(servers, record_property):
    reference, ours = servers
    expected = reference.generate(*requests(1))
    ours.generate(*requests(3))  # torch then has what activations take
    assert ours.flush()
    before = ours.stats()
    nobody_starts()
    try:
        # Some 70 pages, half of what the requests take together: cuMemCreate fails in the middle.
        got = ours.run([[Do(hog, (144 << 20,)), *requests(1)]])
        short = ours.stats()
    finally:
        ours.run([[Do(hog, (None,))]])
    for request, theirs in zip(requests(1), expected, strict=True):
        assert_same(theirs, got[request.rid], tie=TIE["bfloat16"], what=request.rid)
    ours.check()
    assert short["shortages"] > before["shortages"], "the device was never short"
    record_property("shortages", short["shortages"] - before["shortages"])
    record_property("pages_backed", short["pages_backed"])
    record_property("retractions", sum(answer.retractions for answer in got.values()))
    after = ours.generate(*requests(2))
    assert all(answer.finish == "FINISH_LENGTH" for answer in after)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_injected_failures_of_create_and_map(servers, record_property, share):
    reference, ours = servers
    seed = int(share * 100)
    expected = reference.generate(*requests(seed))
    before = ours.stats()["shortages"]
    assert ours.flush()
    try:
        got = ours.run([[Do(refuse_at_random, (share, seed)), *requests(seed)]])
    finally:
        ours.run([[Do(refuse_at_random, (0, seed))]])
    for request, theirs in zip(requests(seed), expected, strict=True):
        assert_same(theirs, got[request.rid], tie=TIE["bfloat16"], what=request.rid)
    ours.check()
    shortages = ours.stats()["shortages"] - before
    assert shortages > 0, "no call failed"
    record_property("shortages", shortages)
    record_property("retractions", sum(answer.retractions for answer in got.values()))
