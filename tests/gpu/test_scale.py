"""Batches to 256, contexts to 64k, thousands of requests, and how often the host waits for the device."""

from __future__ import annotations

import random

import pytest

from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same, both
from tests.gpu.in_scheduler import only_cheap_checks, synchronizations
from tests.harness import Abort, Do, Request, Scheduler

TIE_BF16 = TIE["bfloat16"]


@pytest.fixture
def fa3(schedulers):
    """Ours, and SGLang with FlashAttention-3 at its default page size."""

    def get(**server_args):
        common = {"dtype": "bfloat16", "mem_fraction_static": 0.2} | server_args
        return schedulers.both({"attention_backend": "fa3", **common}, {"kv_backend": "vtensor", **common})

    return get


@pytest.mark.parametrize("batch", [1, 3, 32, 256])
def test_batches(fa3, batch):
    reference, ours = fa3(max_running_requests=256, max_total_tokens=131072, cuda_graph_max_bs_decode=256)
    prompt = Prompts(60 + batch)
    stem = prompt(140)
    requests = [Request(f"b{batch}r{n}", stem[: 7 * (n % 20)] + prompt(1 + (37 * n) % 200), 16) for n in range(batch)]
    both(reference, ours, requests, tie=TIE_BF16)
    assert ours.flush()


def test_contexts_to_64k(fa3):
    reference, ours = fa3(max_total_tokens=200_000, cuda_graph_max_bs_decode=8)
    prompt = Prompts(70)
    chats = [prompt(length) for length in (4096, 30_001, 65_000)]
    for turn in range(2):
        requests = [Request(f"t{turn}c{n}", chat, 12) for n, chat in enumerate(chats)]
        expected = both(reference, ours, requests, tie=TIE_BF16)
        chats = [chat + answer.tokens + prompt(77) for chat, answer in zip(chats, expected, strict=True)]
    assert ours.stats()["prefix_tokens_served"] > 90_000


def test_thousands_of_requests(models, record_property):
    """Mixed lengths and aborts in a pool of 64 pages, which evicts all the time; SGLang retracts every 20th batch."""
    ours = Scheduler(
        models["gqa"],
        environment={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
        kv_backend="vtensor",
        dtype="bfloat16",
        mem_fraction_static=0.2,
        max_total_tokens=8192,
        max_running_requests=48,
        chunked_prefill_size=1024,
        cuda_graph_max_bs_decode=48,
    )
    prompt, rng = Prompts(80), random.Random(80)
    stems = [prompt(rng.randrange(10, 1200)) for _ in range(40)]
    retracted = aborted = finished = 0
    for wave in range(5):
        script, rids = [[Do(only_cheap_checks)]], []
        for turn in range(50):
            arriving: list = []
            for n in range(10):
                rid = f"w{wave}t{turn}n{n}."
                new = rng.choice([1, 4, 20, 60, 160])
                arriving.append(Request(rid, rng.choice(stems) + prompt(rng.randrange(1, 300)), new))
                rids.append(rid)
            if rng.random() < 0.7:
                arriving.append(Abort(rng.choice(rids)))
                aborted += 1
            script += [arriving, [], []]
        answers = ours.run(script)
        ours.check()
        finished += len(answers)
        retracted += sum(answer.retractions for answer in answers.values())
    stats = ours.stats()
    assert finished == 2500
    assert retracted > 100
    assert ours.flush()
    after = ours.stats()
    assert [after[key] for key in ("pages_owned", "pages_kept", "requests")] == [0, 0, 0]
    for name, value in {
        "requests": finished,
        "aborts": aborted,
        "retractions": retracted,
        "pages_allocated": stats["pages_allocated"],
        "pages_created": stats["pages_created"],
        "pages_with_memory": stats["pages_with_memory"],
    }.items():
        record_property(name, value)
    ours.close()


def test_the_scheduling_path_waits_for_the_device_no_more_than_sglang(fa3, record_property):
    reference, ours = fa3(max_total_tokens=16384, max_running_requests=32, cuda_graph_max_bs_decode=32)
    prompt = Prompts(90)
    stem = prompt(300)
    script = [[Request(f"r{n}", stem + prompt(10 + 40 * n), 60)] if n < 16 else [] for n in range(40)]
    for scheduler in (reference, ours):
        scheduler.run([[Request("warm", prompt(50), 4)]])  # what only the first batch does
    theirs = reference.call(synchronizations, script)
    mine = ours.call(synchronizations, script)
    record_property("synchronizations_without", theirs)
    record_property("synchronizations_with", mine)
    assert mine <= theirs


def test_another_kernel_within_bfloat16_noise(schedulers, record_property):
    """FlashAttention-3 by pages, or our kernel, against SGLang's Triton kernel: log-probabilities, and agreement."""
    common = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 8}
    reference, ours = schedulers.both({"attention_backend": "triton", **common}, {"kv_backend": "vtensor", **common})
    prompt = Prompts(95)
    stem = prompt(200)
    requests = [Request(f"r{n}", stem + prompt(1 + 29 * n), 24) for n in range(24)]
    worst, same, compared = 0.0, 0, 0
    for theirs, mine in zip(*answers_of_both(reference, ours, requests), strict=True):
        assert_same(theirs, mine, tie=TIE_BF16)
        for i, (a, b) in enumerate(zip(theirs.tokens, mine.tokens, strict=True)):
            compared += 1
            worst = max(worst, abs(theirs.logprobs[i] - mine.logprobs[i]))
            same += a == b
            if a != b:
                break  # from here on they continue different texts
    record_property("tokens_compared", compared)
    record_property("tokens_agree", same / compared)
    record_property("largest_logprob_difference", round(worst, 4))
    assert worst < 0.25
    assert same / compared > 0.95
