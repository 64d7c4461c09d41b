"""Whole servers with an FP8 cache on a GPU: what it changes is no more than it changes of SGLang's own."""

from __future__ import annotations

import pytest

from benchmarks import logprobs
from sglang_vtensor import tiny_model
from tests.e2e.compare import Prompts
from tests.gpu.in_scheduler import count_our_prefills, our_prefills
from tests.harness import Request

pytest.importorskip("sgl_kernel.flash_attn")


@pytest.mark.parametrize(
    ("cache", "backend", "more"),
    [("fp8_e4m3", "fa3", []), ("fp8_e5m2", "triton", ["--chunked-prefill-size", "128"])],
    ids=["fp8_e4m3-fa3", "fp8_e5m2-triton"],
)
def test_log_probabilities_are_as_near_to_those_of_bf16_as_sglangs_own(tmp_path, record_property, cache, backend, more):
    """In prefill, and in decode, which reads shared prefixes once. FlashAttention-3 takes no e5m2. SGLang's Triton
    kernel reads the tokens of a chunk as they were before conversion, and only what is cached in FP8: chunks are small,
    so that nearly all that both read is cached."""
    model = tiny_model.build(tmp_path / "model", **logprobs.GEOMETRY)
    size = logprobs.Size(4, 8, 2048, 32, 32)
    names = ["fa3", f"{backend}:{cache}", f"vtensor:{cache}"]
    told = logprobs.summarize(logprobs.compared(model, tmp_path, names, size, host=False, more=more))
    record_property("log_probabilities", told)
    for what in ("", "_prefill"):
        theirs, ours = (told[f"logprob_difference_mean_fp8{who}{what}"] for who in (f"_{backend}", ""))
        # Means over a thousand tokens of two equal caches differ by as much as a quarter.
        assert 0 < ours < 1.4 * theirs, (what, told)


def test_a_prefill_of_very_uneven_requests_is_ours(schedulers, record_property):
    """One adds a few tokens to a long prefix, and others are short: FlashAttention-3 is several times slower. What the
    prompts' log-probabilities lose beside bf16 is what SGLang's own FP8 loses."""
    long, short = 32000, 300
    limits = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "max_total_tokens": 65536, "chunked_prefill_size": 8192}
    fp8 = limits | {"kv_cache_dtype": "fp8_e4m3"}
    prompt = Prompts(61)
    text = prompt(long + 33)
    asked = [Request("long", text, 1, logprobs_from=long)]
    asked += [Request(f"short{n}", prompt(short), 1, logprobs_from=0) for n in range(14)]
    told = {}
    for name, args in {
        "bf16": limits | {"attention_backend": "fa3"},
        "fa3": fp8 | {"attention_backend": "fa3"},
        "ours": fp8 | {"kv_backend": "vtensor"},
    }.items():
        server = schedulers(**args)
        server.generate(Request("prefix", text[:long], 1))
        if name == "ours":
            server.call(count_our_prefills)
        answers = server.generate(*asked)
        assert answers[0].cached == long
        told[name] = [value for answer in answers for value in answer.prompt_logprobs]
    taken = server.call(our_prefills)
    assert len(taken) == 4, "a call in each layer"
    assert min(taken) >= 33 + 14 * short, "of the whole batch, which graphs may pad"
    server.check()
    away = {
        name: sum(abs(a - b) for a, b in zip(told[name], told["bf16"], strict=True)) / len(told["bf16"])
        for name in ("fa3", "ours")
    }
    record_property("mean_difference_from_bf16", away)
    assert 0 < away["ours"] < 1.25 * away["fa3"], away
