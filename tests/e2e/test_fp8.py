"""An FP8 KV cache: token for token what the same SGLang answers with one, without the plugin (torch_native)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same, both
from tests.e2e.shortage import leave_pages
from tests.harness import Request, Scheduler

FP8 = {"kv_cache_dtype": "fp8_e4m3"}


@pytest.fixture
def pair(schedulers):
    def get(**server_args):
        ours = {"kv_backend": "vtensor", "page_size": 16, **FP8, **server_args}
        return schedulers.both({**FP8, **server_args}, ours)

    return get


def test_a_token_takes_half_the_bytes(schedulers):
    stats = [schedulers(kv_backend="vtensor", dtype="bfloat16", **args).stats() for args in ({}, FP8)]
    bf16, fp8 = (one["page_bytes"] // one["page_tokens"] for one in stats)
    assert bf16 == 2 * fp8


def test_conversations_and_branches(pair):
    reference, ours = pair()
    prompt = Prompts(41)
    system = prompt(100)
    chats = [system + prompt(30 + n) for n in range(4)]
    for turn in range(4):
        requests = [Request(f"t{turn}c{n}", chat, 24) for n, chat in enumerate(chats)]
        expected, answers = answers_of_both(reference, ours, requests)
        for request, theirs, mine in zip(requests, expected, answers, strict=True):
            assert_same(theirs, mine, tie=TIE["fp8"], what=request.rid)
        if turn:
            assert all(len(chat) - answer.cached in (17, 18) for chat, answer in zip(chats, answers, strict=True))
        ours.check()
        chats = [chat + answer.tokens + prompt(17) for chat, answer in zip(chats, expected, strict=True)]
    cuts = [5, 23, 64, 99]
    branches = [system[:cut] + prompt(40) for cut in cuts]
    requests = [Request(f"b{n}", branch, 16) for n, branch in enumerate(branches)]
    both(reference, ours, requests, tie=TIE["fp8"], cached=cuts)


def test_a_driver_that_gives_little(pair):
    """Requests wait and are retracted, and what they leave and find is FP8."""
    reference, ours = pair(max_total_tokens=1024)
    prompt = Prompts(42)
    requests = [Request(f"r{n}", prompt(60 + 7 * n), 40) for n in range(8)]
    expected = reference.generate(*requests)
    ours.call(leave_pages, 20)
    got = ours.generate(*requests)
    for request, theirs, mine in zip(requests, expected, got, strict=True):
        assert_same(theirs, mine, tie=TIE["fp8"], what=request.rid)
    assert ours.stats()["shortages"] > 0
    ours.call(leave_pages, None)


K_SCALE, V_SCALE = 0.7, 1.3


def scale(scheduler: Any) -> None:
    """Give every layer scales, as a checkpoint does."""
    for layer in scheduler.tp_worker.model_runner.model.model.layers:
        attention = layer.self_attn.attn
        attention.k_scale, attention.v_scale = torch.tensor(K_SCALE), torch.tensor(V_SCALE)


def scale_reference(scheduler: Any) -> None:
    """SGLang's attention on a CPU knows no scales: its pool is told of them as it is written, which it does know, and
    says what they mean as it is read."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    write, keys, values = pool.set_kv_buffer, pool.get_key_buffer, pool.get_value_buffer
    pool.set_kv_buffer = lambda layer, loc, k, v, *_: write(layer, loc, k, v, K_SCALE, V_SCALE)
    pool.get_key_buffer = lambda layer_id: keys(layer_id).float() * K_SCALE
    pool.get_value_buffer = lambda layer_id: values(layer_id).float() * V_SCALE


@pytest.mark.parametrize("cache", ["fp8_e4m3", "bfloat16"])
def test_scales_of_a_checkpoint(models, cache):
    """SGLang divides by them whatever it converts as it stores it, to FP8 or not."""
    kind = {"dtype": "float32", "kv_cache_dtype": cache}
    reference = Scheduler(models["gqa"], max_total_tokens=1024, **kind)
    ours = Scheduler(models["gqa"], kv_backend="vtensor", page_size=16, **kind)
    try:
        prompt = Prompts(43)
        without = Request("without", prompt(60), 1)
        (plain,) = ours.generate(without)
        reference.call(scale_reference)
        ours.call(scale)
        assert ours.flush()
        both(
            reference,
            ours,
            [Request(f"r{n}", prompt(30 + 20 * n), 16) for n in range(6)],
            tie=TIE["fp8"],
            cached=[0] * 6,
        )
        (scaled,) = ours.generate(without)
        assert 0 < abs(plain.logprobs[0] - scaled.logprobs[0]) < 0.5, "another rounding of the same numbers"
    finally:
        reference.close()
        ours.close()


def test_the_type_of_more_range(schedulers):
    """It rounds twice as coarsely."""
    cache = {"kv_cache_dtype": "fp8_e5m2"}
    reference, ours = schedulers.both(cache, {"kv_backend": "vtensor", "page_size": 16, **cache})
    prompt = Prompts(45)
    stem = prompt(90)
    both(reference, ours, [Request("stem", stem, 20)], tie=2 * TIE["fp8"])
    branches = [Request(f"b{n}", stem[: 30 + 20 * n] + prompt(25), 20) for n in range(3)]
    both(reference, ours, branches, tie=2 * TIE["fp8"], cached=[30, 50, 70])
