"""Decode that reads shared prefixes once: the same tokens, whatever comes, goes, is evicted or swapped meanwhile."""

from __future__ import annotations

import random

import pytest

from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shared_decode import read_shared_once, whatever_is_shared_pays
from tests.e2e.test_elastic import DTYPE, S
from tests.harness import ON_GPU, Abort, Request, Scheduler, side_by_side

#: A batch may be larger than what is followed: then everything is read as without it.
FOLLOWED = 12
LIMITS = {"max_total_tokens": 1600 * S, "max_running_requests": 16, "dtype": DTYPE}
OURS = {"kv_backend": "vtensor", "page_size": 16 * S, "chunked_prefill_size": 128 * S}
#: With SGLang's overlap of scheduling and computing, and without; on a GPU also without graphs.
SERVERS = {"overlap": {}, "page4": {"disable_overlap_schedule": True, "page_size": 4}}
if ON_GPU:
    LIMITS |= {"mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 16}
    SERVERS = {"graphs": {}, "eager": {"disable_cuda_graph": True, "disable_overlap_schedule": True}}


@pytest.fixture(scope="module", params=SERVERS.values(), ids=SERVERS.keys())
def ours(models, request):
    with Scheduler(models["gqa"], **(LIMITS | OURS | request.param)) as scheduler:
        if ON_GPU:
            scheduler.call(whatever_is_shared_pays)
        else:
            scheduler.call(read_shared_once, FOLLOWED)
        yield scheduler


@pytest.fixture
def same(ours, schedulers):
    """Run a script on ours and on the reference; the answers of requests that were not aborted must be the same."""
    assert ours.flush()
    reference = schedulers(**LIMITS, **({"attention_backend": "fa3"} if ON_GPU else {}))

    def run(script):
        aborted = [step.rid for turn in script for step in turn if isinstance(step, Abort)]
        expected, got = side_by_side(reference, ours, script)
        ours.check()
        for rid, theirs in expected.items():
            if not any(rid.startswith(name) for name in aborted):
                assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)
        return got

    return run


def test_levels_of_prefixes(ours, same):
    """A system prompt, documents behind it, questions behind those; some end long before the others."""
    prompt = Prompts(1)
    system = prompt(50 * S)
    documents = [system + prompt((40 + 9 * n) * S) for n in range(3)]
    before = ours.stats()
    questions = [document + prompt(3 + 5 * n) for n in range(3) for document in documents]
    same([[Request(f"first{n}", document, 4) for n, document in enumerate(documents)]])
    got = same([[Request(f"q{n}", question, 6 + 7 * n) for n, question in enumerate(questions)]])
    assert all(answer.cached >= 48 * S for answer in got.values())
    after = ours.stats()
    assert after["decode_steps_shared"] - before["decode_steps_shared"] > 30
    assert after["shared_bytes_saved"] > before["shared_bytes_saved"]


def test_the_same_prompt_many_times_at_once(same):
    """Equal pages of one batch are found equal only when they are computed: all but one's are swapped for its."""
    prompt = Prompts(2)(200 * S)
    same([[Request(f"same{n}", prompt, 20 + n) for n in range(9)]])
    same([[Request(f"again{n}", prompt + Prompts(3)(n), 20 + n) for n in range(9)]])


def test_samples_of_one_prompt_are_read_once_until_the_last_but_one_ends(ours, same):
    """Stragglers keep sharing as others end: the bytes that were saved are those of every step with two samples."""
    prompt, samples = Prompts(7)(100 * S), 8
    news = [4 + 6 * n for n in range(samples)]
    same([[Request("first", prompt, 1)]])  # as SGLang computes a prompt that is to have several samples
    before = ours.stats()
    same([[Request(f"s{n}", prompt, new) for n, new in enumerate(news)]])
    after = ours.stats()
    assert after["prompt_tokens"] - before["prompt_tokens"] == samples * len(prompt)
    served = after["prefix_tokens_served"] - before["prefix_tokens_served"]
    assert served == samples * (len(prompt) - 1), "all but the last token, whose page is copied"
    page = ours.stats()["page_tokens"]
    shared = (len(prompt) - 1) // page * page
    # A request's first token comes of the prompt; each further one takes a step.
    alive = [sum(new - 1 > step for new in news) for step in range(max(news))]
    steps = sum(count > 1 for count in alive)
    saved = sum((count - 1) * shared for count in alive if count > 1)
    told = {name: after[name] - before[name] for name in ("decode_steps_shared", "shared_bytes_saved")}
    assert steps <= told["decode_steps_shared"] <= steps + 2, told
    per_token = ours.call(stride_bytes)
    assert saved * per_token <= told["shared_bytes_saved"] <= 1.1 * saved * per_token, (saved, told)


def stride_bytes(scheduler):
    return scheduler.token_to_kv_pool_allocator.runtime.memory.layout.stride_bytes


def test_more_than_are_followed(ours, same):
    stem = Prompts(4)(64 * S)
    before = ours.stats()["decode_steps_plain"]
    same([[Request(f"many{n}", stem + Prompts(n)(3), 4 + 2 * n) for n in range(16)]])
    assert ours.stats()["decode_steps_plain"] > before


@pytest.mark.parametrize("seed", range(3))
def test_conversations_in_a_small_pool(ours, same, seed):
    """Turns go on and branch, requests are aborted, leaves evicted, requests retracted and matched again."""
    rng, prompt = random.Random(seed), Prompts(seed)
    system = prompt(70 * S)
    chats = [system + prompt(S * rng.randrange(30)) for _ in range(5)]
    for turn in range(4):
        script: list = [[]]
        asked = {}
        for n in range(10):
            stem = rng.choice(chats)[: S * rng.choice([40, 100, 300])]
            rid = f"t{turn}n{n}"
            asked[rid] = stem + prompt(S * rng.randrange(1, 50))
            script[-1].append(Request(rid, asked[rid], S * rng.randrange(1, 60)))
            if rng.random() < 0.15:
                script[-1].append(Abort(rid))
            script += [[] for _ in range(rng.randrange(4))]
        got = same(script)
        chats = [asked[rid] + got[rid].tokens for rid in rng.sample(sorted(set(got) & set(asked)), 5)]
    assert ours.stats()["decode_steps_shared"] > 50
