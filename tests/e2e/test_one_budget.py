"""Where layers see a window, both sides of the memory share one budget: contexts much longer than the window take
little of the side of windows, and more requests run at once. Where memory is short, they wait or are retracted, and
end."""

from __future__ import annotations

import random
import re

import pytest

from tests import versions
from tests.e2e.compare import TIE, Prompts, assert_same, both
from tests.e2e.shortage import check_while_the_driver_fails, leave_pages
from tests.e2e.test_sides import used
from tests.harness import Abort, Do, Request, Scheduler, side_by_side

PAGE = 16
ARGS = {"kv_backend": "vtensor", "page_size": PAGE, "chunked_prefill_size": 64}
pytestmark = pytest.mark.parametrize("model", versions.WINDOWED)


def count_running(scheduler):
    """From now on the most requests that a decode batch had, on `scheduler.most_running`."""
    scheduler.most_running, launch = 0, scheduler.run_batch

    def run_batch(batch, *args, **kwargs):
        if batch.forward_mode.is_decode():
            scheduler.most_running = max(scheduler.most_running, len(batch.reqs))
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = run_batch


def most_running(scheduler):
    return scheduler.most_running


@pytest.mark.parametrize("caching", [True, False])
def test_more_long_requests_run_at_once_than_in_sglang_with_the_same_bytes(model, schedulers, caching):
    """A token of theirs takes memory in all layers. The same bytes are there for both; who runs is counted, not
    estimated, and all answers are the same."""
    limits = {"max_total_tokens": 4096, "disable_radix_cache": not caching, "chunked_prefill_size": 64}
    theirs, ours = schedulers(model, **limits), schedulers(model, **(ARGS | limits))
    assert ours.call(bytes_of_kv) == theirs.call(bytes_of_kv)
    prompt = Prompts(70 + caching)
    requests = [Request(f"r{n}.", prompt(400 + 11 * n), 30, fixed=True) for n in range(20)]
    for scheduler in (theirs, ours):
        scheduler.call(count_running)
    both(theirs, ours, requests, tie=TIE["float32"])
    before, now = theirs.call(most_running), ours.call(most_running)
    print(f"{now} requests at once, {before} without the plugin")
    assert now >= 1.3 * before
    stats = ours.stats()
    assert stats["backed_bytes"] <= stats["capacity_bytes"]


def bytes_of_kv(scheduler):
    """Of keys and values, without padding pages."""
    runtime = getattr(scheduler.token_to_kv_pool_allocator, "runtime", None)
    if runtime is not None:
        return runtime.memory.budget.nbytes
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    rows = scheduler.max_total_num_tokens
    return rows * sum(x[0].nbytes for x in (*pool.k_buffer, *pool.v_buffer))


def test_a_limit_and_short_contexts(model, schedulers):
    """Contexts within the window take both sides, as without windows."""
    theirs, ours = (schedulers(model, **args, max_total_tokens=512) for args in ({}, ARGS))
    prompt = Prompts(72)
    requests = [Request(f"r{n}.", prompt(20 + n % 7), 12) for n in range(24)]
    both(theirs, ours, requests, tie=TIE["float32"])


@pytest.mark.parametrize("tokens", [256, 384])
def test_the_longest_request_is_served_alone(model, schedulers, tokens):
    """With as many tokens as it may have; others of the same length wait for it. What is longer is refused with a
    reason."""
    theirs, ours = schedulers(model, max_total_tokens=2048), schedulers(model, max_total_tokens=tokens, **ARGS)
    longest = ours.call(alone_of)
    assert tokens - 4 * PAGE < longest
    prompt = Prompts(73)
    requests = [Request(f"r{n}.", prompt(longest - 100), 100) for n in range(3)]
    requests += [Request("prompt.", prompt(longest - 2), 2)]
    both(theirs, ours, requests, tie=TIE["float32"])
    told = ours.call(told_tokens)
    assert told % PAGE == 0
    assert longest < told, "SGLang is told of more, as one context may have them without a chunk of prefill"
    assert ours.generate(Request("long.", prompt(longest + 1), 1))[0].finish == "FINISH_ABORT"


def alone_of(scheduler):
    from sglang_vtensor.srt.admission import alone

    return alone(scheduler.token_to_kv_pool_allocator.runtime)


def told_tokens(scheduler):
    return scheduler.max_total_num_tokens


def test_a_ratio_is_a_bound(model, models, schedulers):
    """With a bound on the windows' share, contexts within the window are what it keeps waiting; answers are the
    same."""
    theirs = schedulers(model, max_total_tokens=2048)
    ours = schedulers(model, max_total_tokens=1024, swa_full_tokens_ratio=0.2, **ARGS)
    most = ours.call(bound)
    assert most == int(128 / 1.2 * 0.2)
    prompt = Prompts(74)
    ours.call(note_windows)
    requests = [Request(f"r{n}.", prompt(30 + 23 * (n % 9)), 40) for n in range(24)]
    both(theirs, ours, requests, tie=TIE["float32"])
    assert 0.6 * most < ours.call(most_windows) <= most
    with pytest.raises(RuntimeError, match=re.escape("--swa-full-tokens-ratio 0.05 bounds the memory of windows to 6")):
        Scheduler(models[model], dtype="float32", max_total_tokens=1024, swa_full_tokens_ratio=0.05, **ARGS)


def bound(scheduler):
    return scheduler.token_to_kv_pool_allocator.runtime.memory.backings[1].most


def note_windows(scheduler):
    scheduler.most_windows, launch = 0, scheduler.run_batch

    def run_batch(batch, *args, **kwargs):
        scheduler.most_windows = max(scheduler.most_windows, used(scheduler)[1])
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = run_batch


def most_windows(scheduler):
    return scheduler.most_windows


class Eager:
    """SGLang admits as if nearly every answer ended at once, also after it has retracted."""

    current = property(lambda self: 0.01, lambda self, value: None)

    def decay_step(self):
        pass

    def reset(self):
        pass


def be_eager(scheduler):
    scheduler.new_token_ratio_tracker = Eager()


@pytest.mark.parametrize("page", [4, PAGE])
@pytest.mark.parametrize("caching", [True, False])
def test_any_history_in_too_little_memory_gets_the_same_tokens(model, schedulers, caching, page):
    """A request needs up to all of what there is; eager admission makes SGLang retract."""
    limits = {"disable_radix_cache": not caching, "chunked_prefill_size": 64, "max_running_requests": 8}
    theirs = schedulers(model, max_total_tokens=2048, **limits)
    ours = schedulers(model, **(ARGS | limits | {"max_total_tokens": 384, "page_size": page}))
    ours.call(be_eager)
    retracted = 0
    for seed in range(3):
        rng, prompt = random.Random(seed), Prompts(seed)
        texts, script, aborted = [[], prompt(10), prompt(25), prompt(50)], [[]], set()
        for at in range(12):
            rid, text = f"n{seed}s{at}.", rng.randrange(4)
            tokens = texts[text][:50] + prompt(rng.randint(1, 30))
            script[-1].append(Request(rid, tokens, rng.randint(100, 170)))
            if at % 3 == 2:
                texts[text] = texts[text] + prompt(20)
            if rng.random() < 0.1:
                aborted.add(rid)
                script[-1].append(Abort(rid))
            script += [[] for _ in range(rng.choice([0, 0, 1, 2, 9]))]
        expected, got = side_by_side(theirs, ours, script)
        ours.check()
        for rid in expected.keys() - aborted:
            assert_same(expected[rid], got[rid], tie=TIE["float32"], what=rid)
            retracted += got[rid].retractions
    print(f"{retracted} retractions")
    assert retracted > 1, "memory was never short"


@pytest.mark.parametrize("room", [30, 60])
def test_a_device_with_less_memory_than_promised(model, schedulers, room):
    """`room` pages of either side are there. What one side has free is given back for the other one."""
    limits = {"max_total_tokens": 1024, "max_running_requests": 8, "chunked_prefill_size": 64}
    theirs, ours = schedulers(model, **limits), schedulers(model, **(ARGS | limits))
    prompt = Prompts(room)
    stem = prompt(30)
    requests = [Request(f"r{n}.", stem + prompt(1 + 17 * (n % 8)), 60) for n in range(12)]
    try:
        expected = theirs.run([requests])
        got = ours.run([[Do(leave_pages, (room,)), *requests]])
        assert ours.call(all_pages) <= room
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    for rid, answer in expected.items():
        assert_same(answer, got[rid], tie=TIE["float32"], what=rid)
    ours.check()


def all_pages(scheduler):
    return sum(backing.pages for backing in scheduler.token_to_kv_pool_allocator.runtime.memory.backings)


def test_calls_of_the_driver_fail_at_random(model, schedulers):
    limits = {"max_total_tokens": 480, "max_running_requests": 8, "chunked_prefill_size": 64}
    theirs, ours = schedulers(model, **limits | {"max_total_tokens": 2048}), schedulers(model, **(ARGS | limits))
    check_while_the_driver_fails(theirs, ours, longest=150)
