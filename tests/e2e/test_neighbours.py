"""Servers on one device: what one has idle, and then what it has cached, another gets when it needs it; and none is
lost with another."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_vtensor import neighbours
from sglang_vtensor.srt.elastic import LIMIT
from tests import versions
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shortage import neighbour_gives, share_device
from tests.e2e.test_elastic import DTYPE, LIMITS, OURS, PAGES, SLEEP, WAKE, S
from tests.harness import ON_GPU, Do, Request, Scheduler, Until
from tests.waiting import wait_for

#: So much of a real GPU's memory for each; the host takes `max_total_tokens`.
SHARE = {"mem_fraction_static": 0.2} if ON_GPU else {}
#: Each server was promised 64 pages; this is what there is for both. The driver that is injected looks and takes in two
#: steps, so that two servers at once may get one page more.
DEVICE, MORE = 70, 1


@pytest.fixture
def start(models, tmp_path, schedulers):
    """`start(server_args, ...)`: servers on one device, which begin at the same time."""
    if ON_GPU:
        schedulers.close()  # whoever is on the same GPU is a neighbour, whatever its name
    device = {"VTENSOR_HOST_DEVICE": f"test-{tmp_path.name}-{time.monotonic_ns()}"}
    started = []

    def start(*told):
        common = {"dtype": DTYPE} | OURS | SHARE
        servers = [Scheduler(models["gqa"], environment=device, wait=False, **common | more) for more in told]
        started.extend(servers)
        for server in servers:
            server.call(share_device, DEVICE)
        return servers

    yield start
    for server in started:
        server.close()


@pytest.fixture
def two(start, request):
    """Two servers; a test may ask for more arguments."""
    return start(*[getattr(request, "param", {})] * 2)


class Looping:
    """A server runs its event loop as long as this lasts, with nothing to do; its time comes in naps."""

    def __init__(self, server):
        self._server, self._pool, self._folder = server, ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
        self._over = Path(self._folder.name) / "over"

    def __enter__(self):
        self._run = self._pool.submit(self._server.run, [Until(self._over, [Do(_nap)])])

    def __exit__(self, *_):
        self._over.touch()
        with self._folder, self._pool:
            self._run.result()


def together(servers, *scripts, each=()):
    """Each server runs its script, and goes on until all of them are idle: none leaves to which another listens. So do
    the calls `each` before every turn. Returns the answers of each server."""
    count = len(servers)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        over = Path(folder) / "over"

        def run(n):
            return servers[n].run([*scripts[n], Until(over, [*(each or [Do(_nap)]), Do(_through, (over, n, count))])])

        runs: list[Future] = [pool.submit(run, n) for n in range(count)]
        wait(runs, return_when=FIRST_EXCEPTION)
        over.touch()
        return [one.result() for one in runs]


def _through(scheduler, over, number, count):
    """This server is idle; whoever is the last one says so to all."""
    if scheduler.is_fully_idle():
        (over.parent / str(number)).touch()
        if all((over.parent / str(n)).exists() for n in range(count)):
            over.touch()


def _nap(scheduler):
    if scheduler.idle_sleeper is None:  # else the loop sleeps of itself
        time.sleep(0.02)


def more_than(pages, prompt):
    """A request that ends with more memory than so many pages, and not without."""
    return Request("more", prompt((pages + 3) * 16 * S), 8)


def ask(server, prompt, count, *, name="r"):
    requests = [Request(f"{name}{n}", prompt(90 * S), 20 * S) for n in range(count)]
    return requests, server.run([requests])


def fill(server, prompt):
    """It has cached a peak. Returns how many pages it holds."""
    ask(server, prompt, 7)
    backed = server.stats()["pages_backed"]
    assert backed > 40
    return backed


def test_peaks_that_take_turns(two, schedulers):
    """Each in turn needs more than is left, and gets it from what the other has cached; with the right answers."""
    one, other = two
    reference = schedulers(**LIMITS)
    prompt = Prompts(1)
    for turn, (busy, idle) in enumerate([(one, other), (other, one), (one, other)]):
        # Three times as many as run at once, so that the peak lasts while the other is asked, and gives.
        requests = [Request(f"t{turn}r{n}", prompt(90 * S), 20 * S) for n in range(21)]
        before = idle.stats()["pages_backed"]
        if full := before > DEVICE - 40:  # what is left may do for the peak, slowly, but not for this one
            requests.append(replace(more_than(DEVICE - before, prompt), rid=f"t{turn}more"))
        with Looping(idle):
            got = busy.run([requests])
        expected = reference.run([requests])
        for rid, theirs in expected.items():
            assert got[rid].finish == "FINISH_LENGTH"
            assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)
        now = {server: server.stats() for server in two}
        assert sum(stats["pages_backed"] for stats in now.values()) <= DEVICE + MORE
        if turn == 1:
            assert before > 40, "it has cached its own peak, which nobody disturbed"
        if full:
            assert now[idle]["pages_backed"] < before
            assert now[busy]["pages_backed"] > DEVICE - before, "what it holds was the other's"
        busy.check()
        idle.check()
    assert all(server.stats()["neighbours"] == 1 for server in two)


@pytest.mark.parametrize("two", [{"sleep_on_idle": True}], indirect=True)
def test_one_whose_event_loop_sleeps_hears_the_other(two, schedulers):
    """--sleep-on-idle: nobody sends it a message, and yet it gives what it has cached."""
    one, other = two
    prompt = Prompts(4)
    before = fill(one, prompt)
    requests = [Request(f"r{n}", prompt(90 * S), 20 * S) for n in range(21)]
    requests.append(more_than(DEVICE - before, prompt))
    with Looping(one):
        got = other.run([requests])
    for rid, theirs in schedulers(**LIMITS).run([requests]).items():
        assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)
    now = [server.stats()["pages_backed"] for server in two]
    assert now[0] < before
    assert now[1] > DEVICE - before, "what it holds was the other's"
    one.check()
    other.check()


def test_one_that_is_killed_leaves_everything_to_the_other(two, schedulers):
    one, other = two
    prompt = Prompts(2)
    fill(one, prompt)
    one._process.kill()
    one._process.join()
    requests, got = ask(other, prompt, 7, name="after")
    expected = schedulers(**LIMITS).run([requests])
    for rid, theirs in expected.items():
        assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)
    other.check()
    assert other.stats()["pages_cached"] > 40
    wait_for(lambda: other.stats()["neighbours"] == 0)  # they are listed once a second


def test_both_at_once_share_evenly(two, schedulers):
    """Both want more than half: neither starves, and every request ends."""
    prompt = Prompts(3)
    work = [[Request(f"s{n}r{i}", prompt(90 * S), 20 * S) for i in range(12)] for n in range(2)]
    got = together(two, [work[0]], [work[1]])
    reference = schedulers(**LIMITS)
    for n in range(2):
        check_all(reference, work[n], got[n])
        two[n].check()
    assert sum(server.stats()["pages_backed"] for server in two) <= DEVICE + MORE


def test_both_are_short_while_answers_of_many_lengths_end(two):
    """What a server asks for is counted between any two batches: some of what it runs is over then."""
    prompt = Prompts(5)
    work = [[Request(f"s{n}r{i}", prompt(60 * S), 2 + 3 * i % 41) for i in range(80)] for n in range(2)]
    for requests, got in zip(work, together(two, [work[0]], [work[1]]), strict=True):
        assert all(got[request.rid].finish == "FINISH_LENGTH" for request in requests)


def limit_to(scheduler, nbytes):
    assert scheduler.vtensor_elastic.control({LIMIT: nbytes})


@pytest.mark.parametrize("limit", [None, 44])
def test_next_requests_that_need_more_than_a_share_have_their_turns(two, schedulers, limit):
    """Each server's last request needs more than half of what there is for both: it waits for the other server's
    requests to end, and neither waits for ever. A limit of so many pages has room for its prompt, and not for its
    answer beside it."""
    prompt = Prompts(8)
    most, new = (42, 8) if limit is None else (38, 12 * 16 * S)
    if limit is not None:
        for server in two:
            stats = server.stats()
            server.call(limit_to, (limit + 1) * stats["page_bytes"])
    work = [
        [
            *(Request(f"s{n}r{i}", prompt(90 * S), 60 * S) for i in range(6)),
            Request(f"s{n}big", prompt((most - 2) * 16 * S), new),
        ]
        for n in range(2)
    ]
    got = together(two, [work[0]], [work[1]])
    for n in range(2):
        check_all(schedulers(**LIMITS), work[n], got[n])
        two[n].check()


def check_all(reference, requests, got):
    """Every answer is there and right."""
    for rid, theirs in reference.run([requests]).items():
        assert got[rid].finish == "FINISH_LENGTH"
        assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)


def test_what_is_idle_is_given_before_what_is_cached_down_to_the_minimum(start, schedulers):
    """A few requests of the other one take idle pages only; a peak takes cached ones, and leaves the minimum."""
    least = 10
    one, other = start({"vtensor_idle_seconds": 3600.0, "vtensor_min": str(least / PAGES)}, {})
    reference, prompt = schedulers(**LIMITS), Prompts(5)
    ask(one, prompt, 7)
    assert one.flush()
    requests, got = ask(one, prompt, 3, name="cached")
    check_all(reference, requests, got)
    before = one.stats()
    cached, idle = before["pages_cached"], before["pages_free"]
    assert cached >= 15
    assert idle >= 20, "what the first requests had is idle, and kept for an hour"
    left = DEVICE - before["pages_backed"]
    few = [more_than(left, prompt), Request("few", prompt(90 * S), 70 * S)]
    with Looping(one):
        got = other.run([few])
    check_all(reference, few, got)
    now = one.stats()
    assert now["pages_backed"] < before["pages_backed"]
    assert now["pages_cached"] == cached
    many = [Request(f"many{n}", prompt(90 * S), 20 * S) for n in range(21)]
    many.append(more_than(DEVICE - cached, prompt))
    with Looping(one):
        got = other.run([many])
    check_all(reference, many, got)
    now = one.stats()
    assert now["pages_cached"] < cached
    assert now["pages_backed"] >= least
    assert other.stats()["pages_backed"] <= DEVICE + MORE - least
    one.check()
    other.check()


def test_a_third_starts_beside_two_that_hold_everything(two, start, schedulers):
    reference, prompt = schedulers(**LIMITS), Prompts(6)
    for n, server in enumerate(two):
        ask(server, prompt, 7, name=f"of{n}r")
    before = [server.stats()["pages_backed"] for server in two]
    assert sum(before) > DEVICE - 4
    with Looping(two[0]), Looping(two[1]):
        (third,) = start({})
        requests, got = ask(third, prompt, 7)
    check_all(reference, requests, got)
    now = [server.stats()["pages_backed"] for server in two]
    assert all(now[n] < before[n] for n in range(2)), "each of the two gave"
    assert third.stats()["neighbours"] == 2
    assert third.stats()["pages_backed"] > DEVICE - sum(before) + 15
    for server in (*two, third):
        server.check()


def _pause(scheduler):
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))


def _go_on(scheduler):
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    scheduler.continue_generation(ContinueGenerationReqInput())


def _touch(scheduler, path):
    path.touch()


@pytest.mark.skipif(versions.HERE == "v0_5_17", reason="its event loop has no place to look from while it is paused")
def test_one_that_is_paused_gives_what_it_has_cached_and_wants_nothing(two, schedulers, tmp_path):
    one, other = two
    reference, prompt = schedulers(**LIMITS), Prompts(9)
    before = fill(one, prompt)
    waiting = [Request(f"w{n}", prompt(90 * S), 20 * S) for n in range(12)]
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    paused = [waiting, [], [], [Do(_pause), Do(_touch, (begun,))], Until(go_on, [Do(_nap)]), [Do(_go_on)]]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(one.run, paused)
        try:
            wait_for(begun.exists)
            requests, got = ask(other, prompt, 21)
            check_all(reference, requests, got)
            assert other.stats()["pages_backed"] > DEVICE - before + 10, "what it holds was the other's"
        finally:
            go_on.touch()
        with Looping(other):
            check_all(reference, waiting, answers.result())
    one.check()
    other.check()


def test_one_that_is_told_to_sleep_gets_what_it_needs_to_end(two, schedulers):
    """What it runs outgrows what it has as it falls asleep, and is retracted; an idle neighbour has all the rest."""
    one, other = two
    reference, prompt = schedulers(**LIMITS), Prompts(11)
    before = fill(other, prompt)
    long = [Request(f"long{n}", prompt(90 * S), 300 * S) for n in range(2)]
    with Looping(other):
        got = one.run([long, *([[]] * 10), [SLEEP]])
    one.run([[WAKE]])
    assert sum(answer.retractions for answer in got.values()) > 0, "it lacked nothing"
    assert other.stats()["pages_backed"] < before, "the neighbour gave nothing"
    for request, theirs in zip(long, reference.generate(*long), strict=True):
        assert_same(theirs, got[request.rid], tie=TIE[DTYPE], what=request.rid)
    one.check()
    other.check()


def _die_below(scheduler, pages):
    if scheduler.token_to_kv_pool_allocator.runtime.memory.backed < pages:
        os.kill(os.getpid(), signal.SIGKILL)
    _nap(scheduler)


def beside_one_that_dies(giver, pages, folder, other, requests):
    """The answers of `other`, to which `giver` gives what it has cached, and is killed when it holds fewer than so many
    pages."""
    with ThreadPoolExecutor(1) as pool:
        dies = pool.submit(giver.run, [Until(folder / "never", [Do(_die_below, (pages,))])])
        got = other.run([requests])
        with pytest.raises(RuntimeError, match="the scheduler died"):
            dies.result()
    giver._process.join()
    assert giver._process.exitcode == -signal.SIGKILL
    return got


def test_one_is_killed_in_the_middle_of_giving(two, schedulers, tmp_path):
    one, other = two
    reference, prompt = schedulers(**LIMITS), Prompts(7)
    before = fill(one, prompt)
    requests = [Request(f"r{n}", prompt(90 * S), 20 * S) for n in range(21)]
    requests.append(more_than(DEVICE - before, prompt))
    got = beside_one_that_dies(one, before - 3, tmp_path, other, requests)
    check_all(reference, requests, got)
    other.check()
    wait_for(lambda: other.stats()["neighbours"] == 0)  # they are listed once a second


def _believes(scheduler, seconds):
    """What a neighbour says is taken for true for so long, whether its process comes to run or not."""
    neighbours.STALE_SECONDS = seconds


def test_a_long_answer_beside_a_queue_is_not_retracted_again_and_again(two):
    """It needs more than half of the memory, and nobody waits behind it: it has its turn until it ends."""
    prompt = Prompts(31)
    long, short = (
        Request("long", prompt(64 * S), 800 * S),
        [Request(f"s{n}", prompt(60 * S), 60 * S) for n in range(60)],
    )
    for server in two:
        server.call(_believes, 60.0)
    wait_for(lambda: all(server.stats()["neighbours"] == 1 for server in two))
    asked, others = together(two, [[long]], [*([[Do(_nap)]] * 5), short])
    answer = asked["long"]
    assert answer.finish == "FINISH_LENGTH"
    assert answer.retractions <= 2, "until its neighbour had made room"
    assert all(other.finish == "FINISH_LENGTH" for other in others.values())
    for server in two:
        server.check()


def test_who_was_retracted_begins_again_when_there_is_memory_for_all_of_it(start, schedulers):
    """Its neighbour gives a page now and then. To begin again for each of them would be to be retracted for each."""
    (one,) = start({})
    prompt = Prompts(41)
    long = Request("long", prompt(64 * S), 700 * S)
    needed = 4 + 44 + 2  # its prompt, its answer, a page that SGLang counts beside them, and the padding page
    one.call(neighbour_gives, DEVICE - 14, DEVICE - needed - 2, 0.05)
    answer = one.run([[long]])["long"]
    assert answer.retractions == 1, "as it began, before it was known what there was"
    check_all(schedulers(**LIMITS), [long], {"long": answer})
    assert one.stats()["pages_backed"] >= needed - 2
    one.check()


def _says_no_more(scheduler, tokens, over):
    """No request has more to say after so many tokens, which nobody knew before; and when all is said, it is over."""
    for req in scheduler.running_batch.reqs:
        if len(req.output_ids) >= tokens:
            req.sampling_params.max_new_tokens = len(req.output_ids) + 1
    if scheduler.running_batch.is_empty():
        _nap(scheduler)
    if scheduler.is_fully_idle():
        over.touch()


def test_who_was_retracted_is_tried_with_what_there_is_where_no_more_comes(start, schedulers, tmp_path):
    """Its neighbour gives enough for what it comes to say, but never enough for all that it might say."""
    (one,) = start({})
    prompt, said = Prompts(43), 220 * S
    long = Request("long", prompt(64 * S), 700 * S)
    one.call(neighbour_gives, DEVICE - 14, DEVICE - 22, 0.25)
    over = tmp_path / "over"
    answer = one.run([[long], Until(over, [Do(_says_no_more, (said, over))])])["long"]
    assert answer.retractions > 0, "there was memory for it from the beginning"
    assert said <= len(answer.tokens) < said + 16 * S
    check_all(schedulers(**LIMITS), [replace(long, new=len(answer.tokens))], {"long": answer})
    one.check()


def test_requests_are_tried_with_what_there_is_on_a_device_that_stays_full(start, schedulers, tmp_path):
    """The neighbour holds what its own requests use, and wants more. What is left is enough for what requests say, but
    not for what they might say; and in the end all of it is cached here."""
    (one,) = start({})
    prompt, reference = Prompts(45), schedulers(**LIMITS)
    one.call(neighbour_gives, DEVICE - 24, DEVICE - 24, 1.0, 20)
    requests = [Request(f"r{n}", prompt(64 * S), 700 * S) for n in range(8)]
    over = tmp_path / "over"
    got = one.run([requests, Until(over, [Do(_says_no_more, (20 * S, over))])])
    check_all(reference, [replace(request, new=len(got[request.rid].tokens)) for request in requests], got)
    assert max(len(answer.tokens) for answer in got.values()) < 40 * S
    one.check()
