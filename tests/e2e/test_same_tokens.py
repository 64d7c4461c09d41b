"""Token for token what the same SGLang answers without the plugin (torch_native, page size 1)."""

from __future__ import annotations

import pytest

from tests import versions
from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same, both, having, sees_windows
from tests.harness import Abort, Request, side_by_side

CONTESTANTS = [
    pytest.param(("gqa", "float32", 1), id="gqa-float32-page1"),
    pytest.param(("gqa", "float32", 16), id="gqa-float32-page16"),
    pytest.param(("gqa", "float32", 64), id="gqa-float32-page64"),
    pytest.param(("mha", "float32", 16), id="mha-float32-page16"),
    pytest.param(("gqa", "bfloat16", 16), id="gqa-bfloat16-page16"),
]
#: Layers that see a window of 40 tokens: two and a half pages of 16, and less than one of 64.
CONTESTANTS += [
    pytest.param((model, "float32", page), id=f"{model}-float32-page{page}")
    for model in versions.WINDOWED
    for page in (16, 64)
]


@pytest.fixture(params=CONTESTANTS)
def pair(request, schedulers):
    """`pair(**server_args)`: the reference, ours at this page size, and what counts as a tie."""
    model, dtype, page_size = request.param

    def get(**server_args):
        reference = schedulers(model, dtype=dtype, **server_args)
        ours = schedulers(model, dtype=dtype, kv_backend="vtensor", page_size=page_size, **server_args)
        return reference, ours, TIE[dtype]

    get.page_size = page_size
    return get


def test_single_requests_of_every_length(pair):
    reference, ours, tie = pair()
    prompt = Prompts(1)
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 128, 200):
        both(reference, ours, [Request(f"len{length}", prompt(length), 20)], tie=tie)


def test_a_batch(pair):
    reference, ours, tie = pair()
    prompt = Prompts(2)
    both(reference, ours, [Request(f"r{n}", prompt(10 + 13 * n), 5 + 3 * n) for n in range(12)], tie=tie)


def test_conversations_go_on_in_place(pair):
    reference, ours, tie = pair()
    prompt = Prompts(3)
    system = prompt(100)
    chats = [system + prompt(30 + n) for n in range(4)]
    for turn in range(4):
        before = ours.stats()
        requests = [Request(f"t{turn}c{n}", chat, 24) for n, chat in enumerate(chats)]
        expected, answers = answers_of_both(reference, ours, requests)
        after = ours.stats()
        for request, theirs, mine in zip(requests, expected, answers, strict=True):
            assert_same(theirs, mine, tie=tie, what=request.rid)
        if turn:
            # Nothing of the last turn is computed again (but its last token, if that had no KV yet).
            assert all(len(chat) - answer.cached in (17, 18) for chat, answer in zip(chats, answers, strict=True))
            gained = {
                key: after[key] - before[key]
                for key in ("pages_allocated", "pages_in_place", "contexts", "context_runs")
            }
            assert gained["pages_in_place"] == gained["pages_allocated"], "each chat goes on behind its last page"
            assert gained["context_runs"] <= 2 * gained["contexts"], "the system prompt, and its own"
        ours.check()
        chats = [chat + answer.tokens + prompt(17) for chat, answer in zip(chats, answers, strict=True)]


def test_two_branches_in_the_middle_of_a_page(pair):
    reference, ours, tie = pair()
    prompt = Prompts(4)
    stem = prompt(70)
    both(reference, ours, [Request("stem", stem, 10)], tie=tie)
    cuts = [5, 23, 64, 69]
    branches = [stem[:cut] + prompt(40) for cut in cuts]
    requests = [Request(f"b{n}", branch, 16) for n, branch in enumerate(branches)]
    both(reference, ours, requests, tie=tie, cached=cuts)
    known = [len(branch) - 1 for branch in branches]
    requests = [Request(f"again{n}", branch, 16) for n, branch in enumerate(branches)]
    both(reference, ours, requests, tie=tie, cached=known)


def test_several_go_on_from_one_unfinished_page(pair):
    """Two at once continue one text, and one continues what they made of it; the page of its end has one owner only."""
    reference, ours, tie = pair()
    prompt = Prompts(14)
    (answer,) = both(reference, ours, [Request("stem", prompt(37), 9)], tie=tie)
    del answer
    stem = Prompts(14)(37)
    twins = [stem + prompt(5 + 20 * n) for n in range(3)]
    both(reference, ours, [Request(f"twin{n}", twin, 20) for n, twin in enumerate(twins)], tie=tie, cached=[37] * 3)
    both(reference, ours, [Request("one", twins[1] + prompt(8), 6)], tie=tie, cached=[len(twins[1])])
    known = [len(twin) - 1 for twin in twins]
    both(reference, ours, [Request(f"same{n}", twin, 6) for n, twin in enumerate(twins)], tie=tie, cached=known)


def test_the_same_prompt_twice_in_one_batch(pair):
    reference, ours, tie = pair()
    prompt = Prompts(5)
    twice = prompt(90)
    before = ours.stats()["pages_owned"]
    both(reference, ours, [Request(f"same{n}", twice, 30) for n in range(3)], tie=tie)
    grown = ours.stats()["pages_owned"] - before
    assert grown * pair.page_size <= 90 + 30 * 3, "equal pages are kept once"
    both(reference, ours, [Request("third", twice + prompt(20), 30)], tie=tie)


@pytest.mark.parametrize("chunk", [64, None])
def test_what_another_request_computes_is_not_computed_again(pair, chunk):
    """Of six that begin alike, and come at once, one computes the beginning; who begins otherwise is not kept."""
    page = pair.page_size
    reference, ours, tie = pair(**({"chunked_prefill_size": max(chunk, page)} if chunk else {}))
    prompt = Prompts(16)
    stem = prompt(150)
    requests = [Request(f"like{n}", stem + prompt(10 + n), 12) for n in range(6)]
    requests.insert(1, Request("unlike", prompt(20), 12))
    with having(ours, AWAITED_TOKENS=8):
        before = ours.stats()["awaited_prefixes"]
        expected, got = answers_of_both(reference, ours, requests)
        for request, theirs, mine in zip(requests, expected, got, strict=True):
            assert_same(theirs, mine, tie=tie, what=request.rid)
        cached = [answer.cached for answer in got]
        # Into the page where the first one's prompt ends; or its chunk, which need not be a prompt's end. Where layers
        # see a window, that may be gone.
        least = 0 if ours.call(sees_windows) else 150 // page * page if chunk else 150
        assert cached[:2] == [0, 0]
        assert all(least <= found <= 150 for found in cached[2:]), cached
        awaited = ours.stats()["awaited_prefixes"] - before
        assert awaited == 5 or (chunk and awaited < 5), "beside a chunk of one request there may be no room for others"


def test_equal_prompts_wait_for_each_other_once(pair):
    """As equal as two prompts can be, in a namespace each, and aborted while others wait for it."""
    reference, ours, tie = pair(chunked_prefill_size=max(64, 2 * pair.page_size))  # no chunk ends in the last page
    tokens = Prompts(17)(200)
    with having(ours, AWAITED_TOKENS=8):
        twins = [Request(f"{name}{n}", tokens, 9, extra_key=name) for n in range(3) for name in "ab"]
        both(reference, ours, twins, tie=tie, cached=[0, 0] + [199] * 4)
        tokens = Prompts(18)(200)
        last = [Request(f"left{n}", tokens, 9) for n in range(2)]
        script = [[Request("gone", tokens, 9)], last, [Abort("gone")]]
        expected, got = side_by_side(reference, ours, script)
        for request in last:
            assert_same(expected[request.rid], got[request.rid], tie=tie, what=request.rid)
        ours.check()


def test_parallel_sampling(pair):
    # What SGLang makes of n=4: the prompt once, to fill the cache, and then four requests for it.
    reference, ours, tie = pair()
    tokens = Prompts(6)(77)
    both(reference, ours, [Request("first", tokens, 1)], tie=tie)
    both(reference, ours, [Request(f"sample{n}", tokens, 20) for n in range(4)], tie=tie)


def test_chunked_prefill(pair):
    reference, ours, tie = pair(chunked_prefill_size=max(64, pair.page_size))
    prompt = Prompts(7)
    long = prompt(500)
    requests = [Request("long", long, 20), Request("longer", prompt(700), 20), Request("short", prompt(20), 40)]
    both(reference, ours, requests, tie=tie)
    both(reference, ours, [Request("again", long + prompt(100), 20), Request("twin", long, 20)], tie=tie)
    twin = prompt(400)
    both(reference, ours, [Request("twin1", twin, 20), Request("twin2", twin, 20)], tie=tie)


def test_a_pool_so_small_that_leaves_are_evicted_and_requests_retracted(pair):
    room = 768 if pair.page_size < 128 else 2048
    reference, ours, tie = pair(max_total_tokens=room, max_running_requests=16)
    prompt = Prompts(8)
    stem = prompt(20)
    before, retractions = ours.stats(), 0
    # Where layers see a window, ours has room for more: the same bytes run short with longer answers.
    new = room // (2 if before["windows_backed_bytes"] else 4) + 8
    for wave in range(2):
        requests = [Request(f"w{wave}r{n}", stem + prompt(9 * n), new) for n in range(8)]
        expected, got = answers_of_both(reference, ours, requests)
        for request, theirs, mine in zip(requests, expected, got, strict=True):
            assert_same(theirs, mine, tie=tie, what=request.rid)
        retractions += sum(answer.retractions for answer in got)
        ours.check()
    after = ours.stats()
    assert retractions > 0
    evicted = after["pages_allocated"] - before["pages_allocated"] - after["pages_owned"]
    assert evicted > after["pages_capacity"] / 2, "the tree held on to its leaves"


def test_aborts_in_the_middle(pair):
    reference, ours, tie = pair(chunked_prefill_size=max(64, pair.page_size))
    prompt = Prompts(10)
    stem = prompt(50)
    requests = [Request(f"r{n}", stem + prompt(20 * n), 30) for n in range(6)]
    script = [
        requests,
        [],
        [Abort("r1")],
        [],
        [],
        [Abort("r4"), Request("late", stem + prompt(33), 10)],
        [],
        [Request("doomed", prompt(300), 10)],
        [],
        [Abort("doomed")],
    ]
    expected, got = side_by_side(reference, ours, script)
    for rid in ("r0", "r2", "r3", "r5", "late"):
        assert_same(expected[rid], got[rid], tie=tie, what=rid)
    assert all(len(got[rid].tokens) < 30 for rid in ("r1", "r4")), "they ran on to their end"
    ours.check()
    both(reference, ours, [Request("after", stem + prompt(11), 10)], tie=tie)


def test_flush_forgets_everything(pair):
    reference, ours, tie = pair()
    tokens = Prompts(11)(150)
    both(reference, ours, [Request("one", tokens, 10)], tie=tie)
    assert ours.flush()
    stats = ours.stats()
    assert (stats["pages_owned"], stats["pages_kept"]) == (0, 0)
    assert ours.generate(Request("two", tokens, 10))[0].cached == 0
    assert reference.flush()
    both(reference, ours, [Request("three", tokens + tokens, 10)], tie=tie)


def test_salts_share_nothing(pair):
    """`cache_salt` isolates users: inside pages, in unfinished pages, and while a prefix is awaited."""
    page = pair.page_size
    reference, ours, tie = pair()
    prompt = Prompts(23)
    stem = prompt(3 * page + 37)
    both(reference, ours, [Request("one", stem, 9, salt="one")], tie=tie, cached=[0])
    # The whole text, its start, which ends inside of a page, and what goes on in its unfinished page.
    texts = [stem, stem[: 2 * page + 5] + prompt(30), stem + prompt(30)]
    for n, text in enumerate(texts):
        strangers = [Request(f"two{n}", text, 5, salt=f"two{n}"), Request(f"key{n}", text, 5, extra_key=f"one{n}")]
        both(reference, ours, strangers, tie=tie, cached=[0, 0])
        known = [min(len(stem), len(text) - 1), 2 * page + 5, len(stem)][n]
        both(reference, ours, [Request(f"one{n}", text, 5, salt="one")], tie=tie, cached=[known])
    both(reference, ours, [Request("none", stem, 5)], tie=tie, cached=[0])
    both(reference, ours, [Request("both", stem, 5, salt="one", extra_key="a")], tie=tie, cached=[0])
    fresh = prompt(4 * page + 40)
    with having(ours, AWAITED_TOKENS=8):
        before = ours.stats()["awaited_prefixes"]
        twins = [Request(f"twin{n}", fresh, 9, salt=salt) for n, salt in enumerate(["x", "y", None])]
        both(reference, ours, twins, tie=tie, cached=[0, 0, 0])
        assert ours.stats()["awaited_prefixes"] == before


def test_separate_namespaces_share_nothing(pair):
    reference, ours, tie = pair()
    tokens = Prompts(12)(100)
    both(reference, ours, [Request("a", tokens, 10, extra_key="a")], tie=tie)
    (answer,) = ours.generate(Request("b", tokens, 10, extra_key="b"))
    assert answer.cached == 0
    both(reference, ours, [Request("a2", tokens, 10, extra_key="a")], tie=tie)


@pytest.mark.parametrize("pair", [CONTESTANTS[1]], indirect=True)
@pytest.mark.parametrize(
    "server_args",
    [
        {"disable_radix_cache": True, "chunked_prefill_size": 64},
        {"disable_overlap_schedule": True},
        {"radix_eviction_policy": "lfu", "max_total_tokens": 1024},
        {"radix_eviction_policy": "mru", "max_total_tokens": 1024},
        {"radix_eviction_policy": "priority", "max_total_tokens": 1024, "enable_priority_scheduling": True},
        {"attention_backend": "torch_native"},
        {"schedule_policy": "lpm"},
    ],
    ids=lambda args: "-".join(str(value) for value in args.values()),
)
def test_other_ways_to_run(pair, server_args):
    reference, ours, tie = pair(**server_args)
    prompt = Prompts(13)
    stem = prompt(64)
    chats = [stem + prompt(20 + n) for n in range(5)]
    for turn in range(3):
        answers = both(reference, ours, [Request(f"t{turn}c{n}", c, 40) for n, c in enumerate(chats)], tie=tie)
        chats = [chat + answer.tokens + prompt(40) for chat, answer in zip(chats, answers, strict=True)]
