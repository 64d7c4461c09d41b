"""Deterministic inference on our memory: an answer does not depend on what else is in a batch, to the last bit."""

from tests.e2e.compare import Prompts
from tests.harness import Request


def test_an_answer_is_the_same_alone_and_in_company(schedulers):
    common = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 8}
    ours = schedulers(kv_backend="vtensor", enable_deterministic_inference=True, **common)
    prompt = Prompts(50)
    stem = prompt(300)
    requests = [Request(f"r{n}", stem + prompt(40 + 90 * n), 24) for n in range(6)]
    together = ours.generate(*requests)
    reused = ours.generate(*requests)
    assert all(answer.cached > 300 for answer in reused)
    for request, one, other in zip(requests, together, reused, strict=True):
        assert ours.flush()
        (alone,) = ours.generate(request)
        assert alone.cached == 0
        assert alone.tokens == one.tokens == other.tokens
        assert alone.logprobs == one.logprobs == other.logprobs
    assert ours.stats()["decode_steps_shared"] == 0
