"""Servers that run short on one GPU, beside each other and beside a stranger. Nothing is injected: a stranger, which
takes memory with plain torch, leaves them less than they were promised, and the driver says so.

Run alone: what else runs on the GPU changes what is free.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest

from benchmarks.stranger import Stranger
from sglang_vtensor.srt.demand import Demand
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.test_neighbours import Looping, _nap, beside_one_that_dies, together
from tests.harness import Do, Request, Scheduler, nobody_starts
from tests.waiting import wait_for

PAGE_BYTES, PAGE_TOKENS = 2 << 20, 128
#: Of each server: what it was promised. A request needs 11 pages, and 32 run at once, or as many as have room.
PAGES = 512
LIMITS = {
    "dtype": "bfloat16",
    "mem_fraction_static": 0.2,
    "max_total_tokens": PAGES * PAGE_TOKENS,
    "max_running_requests": 32,
    "chunked_prefill_size": 4096,
    "cuda_graph_max_bs_decode": 32,
}
PROMPT, NEW = 1200, 180
#: What is left free for each server, for what torch takes beside pages; and what there is for all of their pages.
HEADROOM, ROOM = 128 << 20, 420 * PAGE_BYTES
OURS = LIMITS | {"kv_backend": "vtensor", "page_size": PAGE_TOKENS, "vtensor_headroom": "128MiB"}
OURS |= {"vtensor_idle_seconds": 0.5}


def requests_of(seed: int, count: int, new: int = NEW, tokens: int = PROMPT, best: int = 2) -> list[Request]:
    prompt = Prompts(seed)
    return [Request(f"s{seed}r{n}", prompt(tokens), new, best=best) for n in range(count)]


@pytest.fixture
def expect(schedulers):
    """`expect(*work)`: what SGLang itself answers, by a server that is gone then."""

    def expect(*work):
        reference = schedulers(attention_backend="fa3", **LIMITS)
        answers: dict = {}
        for requests in work:
            answers |= reference.run([requests])
        schedulers.close()
        return answers

    return expect


@pytest.fixture
def start(models, schedulers):
    """`start(count)`: servers on this GPU, which have run once, and then given everything back."""
    schedulers.close()
    started = []

    def start(count, **more):
        servers = [Scheduler(models["gqa"], wait=False, **(OURS | more)) for _ in range(count)]
        started.extend(servers)
        for server in servers:
            server.run([requests_of(99, 32)])
            assert server.flush()
            server.run([[Do(_nap)]] * 60)  # long enough for what is idle to go back
        nobody_starts()
        return servers

    yield start
    for server in started:
        server.close()


@pytest.fixture
def stranger():
    stranger = Stranger()
    yield stranger
    stranger.close()


def check_all(expected, requests, got, tie=TIE["bfloat16"]):
    for request in requests:
        assert got[request.rid].finish == "FINISH_LENGTH"
        assert_same(expected[request.rid], got[request.rid], tie=tie, what=request.rid)


#: Nats by which rounding moves two tokens against each other, at most: logits near 16 are rounded to multiples of 1/16
#: and 1/8, and an answer's prompt and its tokens are computed by different kernels on both sides.
MOVED = 0.5
#: So many tokens of random weights may lie so near to the best one.
BEST = 20
#: Where the best token leads by so many nats, rounding moves its log-probability by less than so many.
CLEAR, AWAY = 2.0, 0.25


def partings(expected, requests, got) -> list[dict[str, Any]]:
    """Where answers first differ from the reference's, and how. The texts before are equal, and each side has said by
    how much its own token led the other's. `moved` (nats) is the sum: by so much the two tokens moved against each
    other. It is infinite where one is not among the best of the other side."""
    found = []
    for request in requests:
        theirs, mine = expected[request.rid], got[request.rid]
        at = next((n for n, (a, b) in enumerate(zip(theirs.tokens, mine.tokens, strict=True)) if a != b), None)
        if at is not None:
            behind = [
                side.behind[at].get(other.tokens[at], math.inf) - side.behind[at].get(side.tokens[at], math.inf)
                for side, other in ((theirs, mine), (mine, theirs))
            ]
            found.append({"rid": request.rid, "at": at, "moved": sum(behind), "retractions": mine.retractions})
    return sorted(found, key=lambda one: one["moved"])


def away_from_prefill(server, requests, got) -> dict[str, tuple[float, float]]:
    """How far (nats) log-probabilities that were decoded are from those that the same tokens have as parts of prompts,
    computed from nothing: a mean over each answer, and the most where its token led clearly. Had a request read memory
    that was not its own, for one step even, it would stand out, whatever tokens came of that."""
    assert server.flush()
    texts = [Request(r.rid, [*r.tokens, *got[r.rid].tokens], 1, logprobs_from=len(r.tokens)) for r in requests]
    told = server.run([texts])
    away = {}
    for request in requests:
        mine = got[request.rid]
        pairs = zip(reversed(mine.logprobs), reversed(told[request.rid].prompt_logprobs), strict=False)
        apart = [abs(a - b) for a, b in pairs]
        assert len(apart) >= len(mine.logprobs) - 1
        clear = [by for by, gap in zip(apart, reversed(mine.gaps), strict=False) if gap > CLEAR]
        away[request.rid] = sum(apart) / len(apart), max(clear, default=0.0)
    return away


def backed(server) -> int:
    return int(server.stats()["pages_backed"])


def in_thread(target):
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def test_two_that_peak_in_turn_take_from_each_other(expect, start, stranger, record_property):
    """Each needs three quarters of what there is."""
    work = [requests_of(turn, 64) for turn in range(3)]
    expected = expect(*work)
    two = start(2)
    stranger.take(2 * HEADROOM + ROOM)
    for turn, requests in enumerate(work):
        busy, idle = two[turn % 2], two[1 - turn % 2]
        before = backed(idle)
        with Looping(idle):
            got = busy.run([requests])
        check_all(expected, requests, got)
        record_property(f"given_{turn}", before - backed(idle))
        if turn:
            assert before > 250, "it has cached its own peak"
            assert backed(idle) < before
        busy.check()
        idle.check()
    assert sum(server.stats()["shortages"] for server in two) > 0, "the device was never short"


_seen: list[int] = []


def _sample(scheduler):
    """Note what the server holds while it, and another one, want more."""
    elastic = scheduler.vtensor_elastic
    demand = Demand(scheduler.waiting_queue, scheduler.running_batch.reqs, scheduler.new_token_ratio_tracker.current)
    wanted = elastic.record(demand).wanted
    if wanted and any(other.wanted for other in elastic.neighbours.others()):
        _seen.append(scheduler.token_to_kv_pool_allocator.runtime.memory.backed)
    if not scheduler.token_to_kv_pool_allocator.runtime.requests:
        time.sleep(0.02)  # it is done, and gives to the other one for a while


def _samples(scheduler):
    return _seen


def test_both_at_once_get_even_shares(expect, start, stranger, record_property):
    """One of them begins with everything."""
    work = [requests_of(10 + n, 96) for n in range(2)]
    first = requests_of(12, 64)
    expected = expect(first, *work)
    two = start(2)
    stranger.take(2 * HEADROOM + ROOM)
    check_all(expected, first, two[0].run([first]))
    got = together(two, [work[0]], [work[1]], each=[Do(_sample)])
    held = []
    for n in range(2):
        check_all(expected, work[n], got[n])
        two[n].check()
        seen = two[n].call(_samples)
        assert len(seen) > 20, "they were not short at the same time"
        held.append(sorted(seen)[len(seen) // 2])
    record_property("held", held)
    assert 0.6 < held[0] / held[1] < 1 / 0.6


def test_a_third_starts_beside_two_that_hold_everything(expect, start, stranger, record_property):
    """What it has before it has a KV cache, a context, weights and graphs, was theirs too: there is nothing else."""
    last = requests_of(22, 24)
    expected = expect(last)
    room = 10 << 30
    two = start(2, max_total_tokens=1 << 19)
    stranger.take(2 * HEADROOM + room)
    for n, server in enumerate(two):
        server.run([requests_of(20 + n, 30, new=4, tokens=12_000)])
    before = [PAGE_BYTES * backed(server) for server in two]
    assert sum(before) > room - (1 << 30), "they hold nearly everything"
    with Looping(two[0]), Looping(two[1]):
        (third,) = start(1)
        got = third.run([last])
    check_all(expected, last, got)
    now = [PAGE_BYTES * backed(server) for server in two]
    record_property("given_bytes", [a - b for a, b in zip(before, now, strict=True)])
    assert all(a > b for a, b in zip(before, now, strict=True)), "each of them gave"
    assert third.stats()["neighbours"] == 2
    for server in (*two, third):
        server.check()


def test_one_is_killed_in_the_middle_of_giving(expect, start, stranger, tmp_path):
    cached, requests = requests_of(30, 32), requests_of(31, 64)
    expected = expect(cached, requests)
    one, other = start(2)
    stranger.take(2 * HEADROOM + ROOM)
    check_all(expected, cached, one.run([cached]))
    got = beside_one_that_dies(one, backed(one) - 3, tmp_path, other, requests)
    check_all(expected, requests, got)
    other.check()
    wait_for(lambda: other.stats()["neighbours"] == 0)  # they are listed once a second


def test_a_stranger_takes_memory_at_the_peak(expect, start, stranger, record_property):
    """Requests wait, or are retracted; none fails; and when the memory is free again, it is used again."""
    requests, later = requests_of(40, 64, new=600, best=BEST), requests_of(41, 32)
    expected = expect(requests, later)
    (server,) = start(1)
    got: dict = {}
    before = server.stats()["shortages"]
    thread = in_thread(lambda: got.update(server.run([requests])))
    time.sleep(0.5)  # it has begun, and needs more with every step
    taken = stranger.take(HEADROOM // 2)
    time.sleep(3.0)
    stranger.let_go()
    thread.join(200)
    parted = partings(expected, requests, got)
    record_property("partings", parted)
    short = server.stats()
    record_property("taken_bytes", taken)
    record_property("retractions", sum(answer.retractions for answer in got.values()))
    away = away_from_prefill(server, requests, got)
    means, clear = (sorted(values) for values in zip(*away.values(), strict=True))
    record_property("away_from_prefill", {"mean": means[len(means) // 2], "means": means[-1], "clear": clear[-1]})
    assert all(answer.finish == "FINISH_LENGTH" for answer in got.values())
    # Long answers come to more ties than short ones, and part at wider ones.
    assert all(one["moved"] < MOVED for one in parted), parted
    assert clear[-1] < AWAY, away
    assert means[-1] < 3 * means[len(means) // 2], away
    assert short["shortages"] > before, "the device was never short"
    assert server.flush()
    check_all(expected, later, server.run([later]))
    assert backed(server) > 300, "it has come back"
    server.check()
