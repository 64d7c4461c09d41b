"""Whole servers with an FP8 cache on a GPU: what it changes is no more than it changes of SGLang's own."""

from __future__ import annotations

import pytest

from benchmarks import logprobs
from sglang_vtensor import tiny_model

pytest.importorskip("sgl_kernel.flash_attn")


@pytest.mark.parametrize(("cache", "backend"), [("fp8_e4m3", "fa3"), ("fp8_e5m2", "triton")])
def test_log_probabilities_are_as_near_to_those_of_bf16_as_sglangs_own(tmp_path, record_property, cache, backend):
    """In prefill and in decode, which reads shared prefixes once. FlashAttention-3 takes no e5m2."""
    model = tiny_model.build(tmp_path / "model", **logprobs.GEOMETRY)
    size = logprobs.Size(4, 8, 2048, 32, 32)
    names = ["fa3", f"{backend}:{cache}", f"vtensor:{cache}"]
    told = logprobs.summarize(logprobs.compared(model, tmp_path, names, size, host=False))
    record_property("log_probabilities", told)
    for what in ("", "_prefill"):
        theirs = told[f"logprob_difference_mean_fp8_{backend}{what}"]
        assert 0 < told[f"logprob_difference_mean_fp8{what}"] < 1.25 * theirs, (what, told)
