"""Shared decode compiled, in graphs, in a server: against float32, and against SGLang with FlashAttention-3."""

from __future__ import annotations

import random

import torch

from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.sharing import Sharing
from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same
from tests.e2e.shared_decode import whatever_is_shared_pays
from tests.e2e.test_shared_decode import (  # noqa: F401
    ours,
    same,
    test_conversations_in_a_small_pool,
    test_levels_of_prefixes,
    test_the_same_prompt_many_times_at_once,
)
from tests.harness import Request
from tests.kernels.reference import one_by_slot


def test_ten_thousand_steps_of_one_graph():
    """Requests grow a token a step, come and go; one graph, replayed, and now and then compared with float32."""
    torch.manual_seed(0)
    rng = random.Random(0)
    requests, page, kv_heads, dim, longest = 16, 64, 8, 128, 4096
    tokens = 1 << 18
    pool = torch.randn(tokens, 2, 2, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    k, v = pool[:, 1, 0], pool[:, 1, 1]
    q = torch.randn(requests, 32, dim, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(1, requests + 1, device="cuda")
    contexts = torch.ones(requests, dtype=torch.int64, device="cuda")
    table = torch.zeros(requests + 1, longest, dtype=torch.int32, device="cuda")
    sharing = Sharing(slots=requests + 1, requests=requests, page_tokens=page)
    decoder = SharedDecoder(
        max_requests=requests,
        slots=requests + 1,
        page_tokens=page,
        max_tokens=longest,
        q_heads=32,
        kv_heads=kv_heads,
        head_dim=dim,
        device="cuda",
    )
    free = list(range(1, tokens // page))
    rng.shuffle(free)
    stems = [[free.pop() for _ in range(rng.randrange(2, 20))] for _ in range(2)]
    stems += [stem[: len(stem) // 2] + [free.pop() for _ in range(3)] for stem in stems]
    # Behind what all may share a request has pages of its own, anywhere.
    own = [[free.pop() for _ in range(longest // page)] for _ in range(requests)]

    def join(slot):
        stem = rng.choice([*stems, []])
        pages = torch.tensor([*stem, *own[slot - 1][: longest // page - len(stem)]])
        where = (pages[:, None] * page + torch.arange(page)).flatten()
        table[slot] = where.to("cuda", torch.int32)
        contexts[slot - 1] = len(stem) * page + 1
        sharing.join(slot, stem)

    for slot in range(1, requests + 1):
        join(slot)
    decoder.update(sharing.tables)
    out = torch.empty_like(q)

    def step():
        decoder.plan(slots, contexts)
        decoder(q, k, v, scale=dim**-0.5, out=out)

    decoder.find_pages(table, slots, contexts)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(10_000):
        if number % 37 == 0:
            slot = rng.randrange(1, requests + 1)
            sharing.leave(slot)
            join(slot)
            decoder.update(sharing.tables)
        out.fill_(float("nan"))
        decoder.find_pages(table, slots, contexts)
        graph.replay()
        if number % 400 == 0:
            for row, context in enumerate(contexts.tolist()):
                expected = one_by_slot(q[row], k, v, table[row + 1, :context])
                error = (out[row].float() - expected).norm() / expected.norm()
                assert error < 1e-2, (number, row, context, float(error))
        contexts += 1
        contexts.clamp_(max=longest)
    assert out.isfinite().all()


def test_log_probabilities_over_long_answers(schedulers, record_property):
    """A question each on one document, and long answers: within the noise of bfloat16 of SGLang without the plugin."""
    common = {"dtype": "bfloat16", "mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 16}
    reference = schedulers(attention_backend="fa3", **common)
    scheduler = schedulers(kv_backend="vtensor", **common)
    scheduler.call(whatever_is_shared_pays)
    prompt = Prompts(7)
    document = prompt(2000)
    requests = [Request(f"r{n}", document + prompt(5 + 17 * n), 400) for n in range(12)]
    worst, same_tokens, compared = 0.0, 0, 0
    for theirs, mine in zip(*answers_of_both(reference, scheduler, requests), strict=True):
        assert_same(theirs, mine, tie=TIE["bfloat16"])
        for i, (a, b) in enumerate(zip(theirs.tokens, mine.tokens, strict=True)):
            compared += 1
            worst = max(worst, abs(theirs.logprobs[i] - mine.logprobs[i]))
            same_tokens += a == b
            if a != b:
                break  # from here on they continue different texts
    stats = scheduler.stats()
    record_property("tokens_compared", compared)
    record_property("tokens_agree", same_tokens / compared)
    record_property("largest_logprob_difference", round(worst, 4))
    record_property("decode_steps_shared", stats["decode_steps_shared"])
    assert stats["decode_steps_shared"] > 300
    assert worst < 0.25
