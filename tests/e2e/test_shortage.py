"""The driver refuses memory that the pool's size promised: requests wait or are retracted, and nobody notices."""

from __future__ import annotations

import pytest

from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shortage import check_while_the_driver_fails, leave_pages
from tests.harness import Abort, Do, Request

PAGE = 16
LIMITS = {"max_total_tokens": 1024, "max_running_requests": 8, "chunked_prefill_size": 64}


@pytest.fixture
def pair(schedulers):
    return schedulers(**LIMITS), schedulers(kv_backend="vtensor", page_size=PAGE, **LIMITS)


@pytest.mark.parametrize("room", [12, 24])
def test_a_device_with_less_memory_than_promised(pair, room):
    """64 pages are promised, `room` are there. A request needs 9 at most, by SGLang's count."""
    reference, ours = pair
    prompt = Prompts(room)
    stem = prompt(30)
    requests = [Request(f"r{n}", stem + prompt(1 + 11 * (n % 6)), 30) for n in range(room // 2)]
    before = ours.stats()["shortages"]
    try:
        expected = reference.run([requests])
        got = ours.run([[Do(leave_pages, (room,)), *requests]])
        assert ours.stats()["pages_backed"] <= room
        ours.check()
        more = [Request(f"more{n}", stem + prompt(40), 40) for n in range(8)]
        expected |= reference.run([more])
        got |= ours.run([[Do(leave_pages, (None,)), *more]])
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    for rid, theirs in expected.items():
        assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)
    ours.check()
    after = ours.stats()
    assert after["shortages"] > before, "the device was never short"
    assert after["pages_backed"] > room, "it never asked the driver again"


def test_a_single_request_waits_until_the_device_has_memory_again(pair):
    """Nothing else runs that could make room: it is retracted in the middle, not aborted, and goes on later."""
    reference, ours = pair
    tokens = Prompts(50)(40)
    requests = [Request("lonely", tokens, 60)]
    expected = reference.run([requests])
    try:
        got = ours.run([[Do(leave_pages, (5,)), *requests], *([[]] * 300), [Do(leave_pages, (None,))]])
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    assert got["lonely"].finish == "FINISH_LENGTH"
    assert got["lonely"].retractions > 0
    assert_same(expected["lonely"], got["lonely"], tie=TIE["float32"])
    ours.check()


_running: list[int] = []


def _note_running(scheduler):
    _running.append(len(scheduler.running_batch.reqs))


def _noted(scheduler):
    return _running


def test_requests_that_wait_begin_when_memory_comes_and_not_when_another_one_ends(pair):
    reference, ours = pair
    prompt = Prompts(53)
    requests = [Request(f"r{n}", prompt(60), 100) for n in range(4)]
    expected = reference.run([requests])
    try:
        got = ours.run(
            [
                [Do(leave_pages, (16,)), *requests],
                *([[]] * 15),
                [Do(_note_running)],
                [Do(leave_pages, (None,))],
                *([[Do(_note_running)]] * 80),
            ]
        )
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    few, *later = ours.call(_noted)
    assert 0 < few < max(later) == 4, "all of them at once: none has ended yet"
    for rid, theirs in expected.items():
        assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)
    ours.check()


def test_a_long_prompt_waits_between_its_chunks(pair):
    reference, ours = pair
    prompt = Prompts(51)
    requests = [Request("long", prompt(300), 10), Request("short", prompt(20), 30)]
    expected = reference.run([requests])
    try:
        got = ours.run([[Do(leave_pages, (12,)), *requests], *([[]] * 100), [Do(leave_pages, (None,))]])
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    for rid, theirs in expected.items():
        assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)
    ours.check()


def test_an_abort_of_what_waits_leaves_nothing(pair):
    _, ours = pair
    prompt = Prompts(52)
    try:
        ours.run(
            [
                [Do(leave_pages, (6,)), Request("long", prompt(300), 10), Request("next", prompt(90), 10)],
                *([[]] * 30),
                [Abort("long")],
                *([[]] * 30),
                [Abort("next")],
            ]
        )
    finally:
        ours.run([[Do(leave_pages, (None,))]])
    assert ours.flush()
    stats = ours.stats()
    assert (stats["pages_owned"], stats["requests"]) == (0, 0)


@pytest.mark.parametrize("extra", [{}, {"disable_radix_cache": True}], ids=["tree", "no-tree"])
def test_calls_of_the_driver_fail_at_random(schedulers, extra):
    limits = LIMITS | {"max_total_tokens": 640} | extra
    reference, ours = schedulers(**limits), schedulers(kv_backend="vtensor", page_size=PAGE, **limits)
    check_while_the_driver_fails(reference, ours, longest=90)
