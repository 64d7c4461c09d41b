"""Models with linear attention or Mamba: a state for each request and each end of a match, in one memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import versions
from tests.e2e.compare import TIE, Prompts, answers_of_both, assert_same
from tests.e2e.shortage import check_while_the_driver_fails, leave_pages
from tests.e2e.test_elastic import SLEEP, WAKE, limit, settle
from tests.effort import pairs_of
from tests.harness import Abort, Do, Request, side_by_side
from tests.state_models import CHUNKS

pytestmark = pytest.mark.parametrize(("model", "page"), pairs_of(versions.WITH_STATES, [16, 128]))


def pair(schedulers, model, page, **server_args):
    """SGLang with its own memory, and ours."""
    return schedulers(model, **server_args), schedulers(model, kv_backend="vtensor", page_size=page, **server_args)


def same(reference, ours, requests):
    """The same answers from both; returns theirs and ours."""
    expected, got = answers_of_both(reference, ours, requests)
    for request, theirs, mine in zip(requests, expected, got, strict=True):
        assert_same(theirs, mine, tie=TIE["float32"], what=request.rid)
    ours.check()
    return expected, got


def kept(tokens: int, model: str, page: int) -> int:
    """A state is kept of whole pages, and of whole chunks, as the kernels divide a prompt."""
    grid = max(CHUNKS[model], page)
    return tokens // grid * grid


def test_requests_of_every_length(schedulers, model, page):
    reference, ours = pair(schedulers, model, page)
    prompt = Prompts(1)
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200):
        same(reference, ours, [Request(f"len{length}", prompt(length), 20)])


def test_conversations_go_on_from_a_state(schedulers, model, page):
    """Each turn finds the state that the last one left: of the whole pages of its prompt, or of its answer."""
    reference, ours = pair(schedulers, model, page)
    prompt = Prompts(2)
    chats = [prompt(150 + 20 * n) for n in range(4)]
    before = [0] * len(chats)
    for turn in range(4):
        expected, got = same(reference, ours, [Request(f"t{turn}c{n}", chat, 24) for n, chat in enumerate(chats)])
        assert [answer.cached for answer in got] == before
        # Of an answer, where it comes past a multiple of 256.
        before = [max(kept(len(chat), model, page), (len(chat) + 23) // 256 * 256) for chat in chats]
        chats = [chat + answer.tokens + prompt(40) for chat, answer in zip(chats, expected, strict=True)]


def test_an_answer_leaves_a_state_too(schedulers, model, page):
    """As SGLang is told, of every 256 tokens."""
    reference, ours = pair(schedulers, model, page)
    chat = Prompts(3)(100)
    (answer,), _ = same(reference, ours, [Request("long", chat, 300)])
    _, (again,) = same(reference, ours, [Request("again", chat + answer.tokens, 8)])
    assert again.cached == 256


def test_where_texts_part_a_state_is_left_for_the_next(schedulers, model, page):
    """The first request leaves a state at its end; the second one computes what both begin with, and leaves one there;
    the third one goes on behind it."""
    reference, ours = pair(schedulers, model, page)
    prompt = Prompts(4)
    stem = prompt(3 * 128 + 5)
    cached = []
    for n in range(4):
        _, (answer,) = same(reference, ours, [Request(f"branch{n}", stem + prompt(140), 12)])
        cached.append(answer.cached)
    assert cached == [0, 0, 384, 384]


def test_many_at_once_with_chunks(schedulers, model, page):
    reference, ours = pair(schedulers, model, page, chunked_prefill_size=128)
    prompt = Prompts(5)
    stem = prompt(200)
    for turn in range(3):
        requests = [Request(f"t{turn}r{n}", stem[: 60 * n] + prompt(30 + 41 * n), 8 + n) for n in range(10)]
        same(reference, ours, requests)


def test_who_is_aborted_or_retracted_leaves_nothing(schedulers, model, page):
    """In a memory that is too small for all at once."""
    limits = {"max_total_tokens": 1280, "max_running_requests": 8, "chunked_prefill_size": 128}
    reference = schedulers(model, max_running_requests=8)
    ours = schedulers(model, kv_backend="vtensor", page_size=page, **limits)
    prompt = Prompts(6)
    for turn in range(3):
        script = [[Request(f"t{turn}r{n}.", prompt(60 + 37 * n), 30 + 9 * n)] for n in range(10)]
        script[5].append(Abort(f"t{turn}r3."))
        expected, got = side_by_side(reference, ours, script)
        ours.check()
        for rid, theirs in expected.items():
            if rid != f"t{turn}r3.":
                assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)


def test_cached_states_go_for_tokens_and_pages_for_states(schedulers, model, page):
    """One budget: what nobody used for the longest time goes, whatever it is."""
    limits = {"max_total_tokens": 2048, "max_running_requests": 8, "chunked_prefill_size": 128}
    reference = schedulers(model, max_running_requests=8)
    ours = schedulers(model, kv_backend="vtensor", page_size=page, **limits)
    prompt = Prompts(7)
    shorts = [prompt(130) for _ in range(12)]
    most_pages = 0
    for n, short in enumerate(shorts):
        same(reference, ours, [Request(f"short{n}", short, 4)])
    _, (latest,) = same(reference, ours, [Request("latest", shorts[-1], 4)])
    assert latest.cached == 128
    for n in range(3):
        same(reference, ours, [Request(f"long{n}", prompt(900), 4)])
        most_pages = max(most_pages, ours.stats()["pages_cached"])
    assert most_pages * page >= 900 // page * page
    stats = ours.stats()
    assert stats["owned_bytes"] <= stats["capacity_bytes"]
    _, (gone,) = same(reference, ours, [Request("gone", shorts[0], 4)])
    assert gone.cached == 0


def test_a_limit_takes_states_back_and_a_flush_all_of_them(schedulers, model, page):
    reference, ours = pair(schedulers, model, page)
    prompt = Prompts(8)
    chats = [prompt(200) for _ in range(6)]
    same(reference, ours, [Request(f"a{n}", chat, 8) for n, chat in enumerate(chats)])
    before = ours.stats()
    assert before["states_owned"] == 6
    ours.run([[limit(-(-512 // page))]])
    ours.call(settle)
    small = ours.stats()
    assert small["states_owned"] < 6
    assert small["backed_bytes"] < before["backed_bytes"]
    same(reference, ours, [Request(f"b{n}", chat, 8) for n, chat in enumerate(chats)])
    ours.run([[limit(8192 // page)]])
    ours.run([[SLEEP]])
    asleep = ours.stats()
    assert asleep["states_owned"] == 0
    ours.run([[WAKE]])
    same(reference, ours, [Request(f"c{n}", chat, 8) for n, chat in enumerate(chats)])
    assert ours.flush()
    assert ours.stats()["states_owned"] == 0


@pytest.mark.parametrize(
    "way",
    [
        {"disable_radix_cache": True},
        {"disable_overlap_schedule": True},
        {"max_mamba_cache_size": 20},
        {"mamba_full_memory_ratio": 0.01},
        {"mamba_track_interval": 128},
    ],
    ids=lambda way: next(iter(way)),
)
def test_settings_of_states(schedulers, model, page, way):
    reference, ours = schedulers(model), schedulers(model, kv_backend="vtensor", page_size=page, **way)
    prompt = Prompts(9)
    chats = [prompt(100 + 30 * n) for n in range(5)]
    before = [0] * len(chats)
    for turn in range(3):
        expected, got = same(reference, ours, [Request(f"t{turn}c{n}", chat, 40) for n, chat in enumerate(chats)])
        if "disable_radix_cache" in way:
            before = [0] * 5
        if "max_mamba_cache_size" in way:  # the requests take 15 slots of 20
            assert all(answer.cached in (0, found) for answer, found in zip(got, before, strict=True))
            assert ours.stats()["states_owned"] <= 20
        else:
            assert [answer.cached for answer in got] == before
        every = way.get("mamba_track_interval", 256)
        before = [max(kept(len(chat), model, page), (len(chat) + 39) // every * every) for chat in chats]
        chats = [chat + answer.tokens + prompt(40) for chat, answer in zip(chats, expected, strict=True)]


def test_while_the_driver_fails(schedulers, model, page):
    limits = {"max_total_tokens": 2048, "max_running_requests": 8, "chunked_prefill_size": 128}
    reference = schedulers(model, max_running_requests=8)
    ours = schedulers(model, kv_backend="vtensor", page_size=page, **limits)
    check_while_the_driver_fails(reference, ours, longest=250)


def test_who_waited_for_a_state_begins_once_the_driver_gives_again(schedulers, model, page):
    """Nothing runs and nothing is cached as the driver refuses a state: nobody who begins asks for one again."""
    reference, ours = pair(schedulers, model, page, max_total_tokens=4096, max_running_requests=8)
    prompt = Prompts(9)
    requests = [Request(f"r{n}", prompt(60), 8) for n in range(2)]
    expected = reference.run([requests])
    assert ours.flush()
    before = ours.stats()["shortages"]
    ours.run([[SLEEP], *([[]] * 4), [Do(leave_pages, (2,)), WAKE]])
    got = ours.run([requests, *([[]] * 20), [Do(leave_pages, (None,))]])
    assert ours.stats()["shortages"] > before, "the driver refused nothing"
    for request in requests:
        assert_same(expected[request.rid], got[request.rid], tie=TIE["float32"], what=request.rid)
    ours.check()


def dump(scheduler):
    """What SGLang's watchdog says of a server that hangs, in a thread of its own."""
    look = scheduler.invariant_checker._check_all_pools
    with ThreadPoolExecutor(1) as watchdog:
        scheduler.dumped = watchdog.submit(look, scheduler.pool_stats_observer.get_pool_stats()).result(30)[1]


def dumped(scheduler):
    return scheduler.dumped


def test_sglangs_watchdog_can_say_what_there_is(schedulers, model, page):
    ours = schedulers(model, kv_backend="vtensor", page_size=page)
    prompt = Prompts(10)
    ours.generate(Request("cached", prompt(300), 4))
    ours.run([[Request("running", prompt(100), 30)], [], [], [Do(dump)], []])
    assert any("mamba" in line for line in ours.call(dumped))
    ours.check()
