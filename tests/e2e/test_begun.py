"""Who has begun comes to its end: retracted under a lowered limit, retracted as the server falls asleep, put off once;
and who has not begun stays below the limit, also beside one that goes on."""

from __future__ import annotations

from unittest import mock

from tests.e2e.compare import Prompts
from tests.e2e.shortage import leave_pages
from tests.e2e.test_elastic import SLEEP, S, asleep_with, limit, pair, same, settle  # noqa: F401
from tests.harness import ON_GPU, Do, Request

#: The device has room for so few pages that some of eight requests are retracted; and for all of them again.
SHORT, ENOUGH = Do(leave_pages, (20,)), Do(leave_pages, (None,))


def eight(seed, tokens=30):
    prompt = Prompts(seed)
    return [Request(f"r{n}.", prompt(tokens * S), 60 * S) for n in range(8)]


def test_who_is_retracted_as_the_server_falls_asleep_comes_to_its_end(pair):  # noqa: F811
    reference, ours = pair
    requests = eight(21)
    late = [Request(f"late{n}.", Prompts(22)(20 * S), 5 * S) for n in range(3)]
    expected = reference.run([requests])
    script = [requests, *([[]] * 4), [SHORT, SLEEP], *([[]] * 8 * S), late, [ENOUGH], *([[]] * 250 * S)]
    got = ours.run([*script, [Do(asleep_with, (len(late),))], [Do(wake)]])
    assert sum(got[request.rid].retractions for request in requests) > 0, "nobody was retracted"
    same(expected, {rid: answer for rid, answer in got.items() if rid in expected})
    assert all(got[request.rid].finish == "FINISH_LENGTH" for request in late)
    ours.check()


def wake(scheduler):
    from tests.e2e.test_elastic import control

    assert control(scheduler, wake=1)


def test_who_is_retracted_under_a_limit_that_it_is_too_long_for_comes_to_its_end(pair):  # noqa: F811
    """Each of them needs nine pages; five is the limit."""
    reference, ours = pair
    requests = eight(23, tokens=75)
    fresh = Request("fresh", Prompts(24)(20 * S), 5 * S)
    expected = reference.run([requests, *([[]] * 8), [fresh]])
    got = ours.run([requests, *([[]] * 4), [SHORT, limit(5)], *([[]] * 3), [fresh], *([[]] * 20 * S), [ENOUGH]])
    assert sum(answer.retractions for answer in got.values()) > 0, "nobody was retracted"
    same(expected, got)
    ours.call(settle)
    assert ours.stats()["pages_backed"] <= 6
    ours.check()


def test_an_answer_that_may_become_too_long_for_the_limit_is_given(pair):  # noqa: F811
    """SGLang admits a request only where its longest answer has room. Under a limit that may be never: then it would
    wait for ever, and all behind it."""
    reference, ours = pair
    prompt = Prompts(27)
    requests = [Request("long", prompt(60 * S), 70 * S), Request("behind", prompt(20 * S), 5 * S)]
    expected = reference.run([requests])
    same(expected, ours.run([[limit(5)], requests]))
    ours.call(settle)
    assert ours.stats()["pages_backed"] <= 6
    ours.check()


def test_who_has_not_begun_stays_below_the_limit_beside_one_that_goes_on(pair):  # noqa: F811
    """The limit is full of cached prefixes. A long prompt is computed chunk by chunk, and short ones come beside it."""
    reference, ours = pair
    prompt = Prompts(25)
    cached = [Request(f"cached{n}", prompt(60 * S), 4 * S) for n in range(6)]
    long, short = Request("long", prompt(140 * S), 8 * S), [Request(f"s{n}", prompt(15 * S), 8 * S) for n in range(5)]
    script = [[long], [short[0]], [short[1]], [short[2], short[3]], [], [short[4]]]  # 20 pages, if all run at once
    expected = reference.run([cached]) | reference.run(script)
    got = ours.run([cached])
    ours.call(settle)
    ours.run([[limit(20)]])
    ours.call(settle)
    ours.call(watch_owned)
    got |= ours.run(script)
    most = ours.call(watched)
    same(expected, got)
    assert 15 < most <= 20, "pages that were owned at once"
    ours.check()


def watch_owned(scheduler):
    memory, launch = scheduler.token_to_kv_pool_allocator.runtime.memory, scheduler.run_batch
    scheduler.most_owned = 0

    def watching(*args, **kwargs):
        scheduler.most_owned = max(scheduler.most_owned, memory.owned)
        return launch(*args, **kwargs)

    scheduler.watching, scheduler.run_batch = launch, watching


def watched(scheduler):
    scheduler.run_batch = scheduler.watching
    return scheduler.most_owned


def test_who_was_put_off_once_begins_inside_a_page_when_it_comes_again(pair):  # noqa: F811
    reference, ours = pair
    requests = eight(26)
    expected = reference.run([requests])
    ours.call(count_put_off)
    got = ours.run([[Do(leave_pages, (12,)), *requests], *([[]] * 20), [ENOUGH]])
    same(expected, got)
    assert ours.call(counted) > 0, "nobody was put off"
    assert ours.call(whole_pages) == 0
    ours.check()


def count_put_off(scheduler):
    from sglang_vtensor.srt import scheduling

    scheduler.put_off = mock.patch.object(scheduling, "_put_off", wraps=scheduling._put_off)
    scheduler.times_put_off = scheduler.put_off.start()


def counted(scheduler):
    scheduler.put_off.stop()
    return scheduler.times_put_off.call_count


def whole_pages(scheduler):
    return sum(getattr(req, "vtensor_whole_pages", False) for req in scheduler.finished_requests.values())


def test_a_host_server_that_shares_no_device_has_no_file(pair):  # noqa: F811
    _, ours = pair
    assert ours.call(has_a_file) is ON_GPU


def has_a_file(scheduler):
    return scheduler.vtensor_elastic.neighbours is not None
