"""An FP8 KV cache: token for token what the same SGLang answers with one, without the plugin (torch_native)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_vtensor import tiny_model
from tests import versions
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


def scales_of(layer: int) -> tuple[float, float]:
    """No two layers have the same: which one's are taken can be seen."""
    return 0.5 + 0.3 * layer, 1.3 - 0.2 * layer


def scale(scheduler: Any) -> None:
    """Give every layer scales, as a checkpoint does."""
    for number, layer in enumerate(scheduler.tp_worker.model_runner.model.model.layers):
        attention = layer.self_attn.attn
        attention.k_scale, attention.v_scale = map(torch.tensor, scales_of(number))


def scale_reference(scheduler: Any) -> None:
    """SGLang's attention on a CPU knows no scales: its pool is told of them as it is written, which it does know, and
    says what they mean as it is read."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    write, keys, values = pool.set_kv_buffer, pool.get_key_buffer, pool.get_value_buffer
    pool.set_kv_buffer = lambda layer, loc, k, v, *_: write(layer, loc, k, v, *scales_of(layer.layer_id))
    pool.get_key_buffer = lambda layer_id: keys(layer_id).float() * scales_of(layer_id)[0]
    pool.get_value_buffer = lambda layer_id: values(layer_id).float() * scales_of(layer_id)[1]


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


def asking(folder: Path) -> Path:
    """The tiny model as a checkpoint that asks for an FP8 KV cache in the words of most of them, and has the scales."""
    tiny_model.build(folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name, scale in zip(("k_scale", "v_scale"), scales_of(layer), strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(versions.HERE == "v0_5_17", reason="SGLang 0.5.17 does not listen to compressed-tensors here")
def test_a_checkpoint_that_asks_for_it(models, tmp_path):
    """Nothing is given on the command line: the same as where the type is, and the scales."""
    common = {"kv_backend": "vtensor", "page_size": 16, "dtype": "bfloat16"}
    prompt = Prompts(44)
    requests = [Request(f"r{n}", prompt(30 + 20 * n), 16) for n in range(4)]
    with Scheduler(models["gqa"], **FP8, **common) as given, Scheduler(asking(tmp_path / "asks"), **common) as asked:
        given.call(scale)
        expected, got = answers_of_both(given, asked, requests)
        assert [answer.tokens for answer in got] == [answer.tokens for answer in expected]
        assert asked.stats()["page_bytes"] == given.stats()["page_bytes"]


def test_the_type_of_more_range(schedulers):
    """It rounds twice as coarsely."""
    cache = {"kv_cache_dtype": "fp8_e5m2"}
    reference, ours = schedulers.both(cache, {"kv_backend": "vtensor", "page_size": 16, **cache})
    prompt = Prompts(45)
    stem = prompt(90)
    both(reference, ours, [Request("stem", stem, 20)], tie=2 * TIE["fp8"])
    branches = [Request(f"b{n}", stem[: 30 + 20 * n] + prompt(25), 20) for n in range(3)]
    both(reference, ours, branches, tie=2 * TIE["fp8"], cached=[30, 50, 70])


def _scales_of_layers(scheduler: Any) -> list[tuple[float, float, float]]:
    layers = [layer.self_attn.attn for layer in scheduler.tp_worker.model_runner.model.model.layers]
    return [(float(layer.k_scale), layer.k_scale_float, layer.v_scale_float) for layer in layers]


def test_scales_of_a_file_are_those_of_every_kernel(models, tmp_path):
    """Of --quantization-param-path. SGLang's kernels take them as tensors or as numbers, and must find both."""
    config = json.loads((models["gqa"] / "config.json").read_text())
    factors = {str(layer): 0.5 + 0.25 * layer for layer in range(config["num_hidden_layers"])}
    cache = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": factors}}
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({"model_type": config["model_type"], "kv_cache": cache}))
    common = {"kv_backend": "vtensor", "page_size": 16, "dtype": "bfloat16", **FP8}
    with Scheduler(models["gqa"], quantization_param_path=str(path), **common) as server:
        # Before the first request: graphs are captured with them.
        assert server.call(_scales_of_layers) == [(scale, scale, scale) for scale in factors.values()]
        server.generate(Request("r", Prompts(46)(50), 8))
