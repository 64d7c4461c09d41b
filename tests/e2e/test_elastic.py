"""More and less memory while serving: nothing is lost, every request is answered, and the memory does go back."""

from __future__ import annotations

import contextlib
import os
import random
import time
from types import SimpleNamespace
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests import versions
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.e2e.shortage import leave_pages, refuse_at_random
from tests.effort import share_of
from tests.harness import ON_GPU, Abort, Do, Request, side_by_side

#: A GPU's pages are whole tiles: everything is so many times as long there.
S = 8 if ON_GPU else 1
PAGE = 16 * S
LIMITS = {"max_total_tokens": 1024 * S, "max_running_requests": 8, "chunked_prefill_size": 64 * S}
DTYPE = "bfloat16" if ON_GPU else "float32"
LIMITS |= {"dtype": DTYPE, "attention_backend": "fa3", "cuda_graph_max_bs_decode": 8} if ON_GPU else {}
OURS = {name: value for name, value in LIMITS.items() if name != "attention_backend"}
OURS |= {"kv_backend": "vtensor", "page_size": PAGE}
PAGES = 64


def control(scheduler, **asked):
    """What `POST /set_internal_state` does, between two turns."""

    from sglang.srt.managers.io_struct import SetInternalStateReq

    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "0"  # see tests/e2e/shortage.py
    asked = {f"vtensor_{name}": value for name, value in asked.items()}
    return scheduler.set_internal_state(SetInternalStateReq(server_args=asked)).updated


def limit(pages):
    """A step: the limit is so many pages, beside the padding pages."""
    return Do(_limit, (pages,))


def _limit(scheduler, pages):
    memory = scheduler.token_to_kv_pool_allocator.runtime.memory
    assert control(scheduler, limit_bytes=pages * memory.page_bytes + memory.padding_bytes)


def _sleep(scheduler):
    assert control(scheduler, sleep=1)


def _wake(scheduler):
    assert control(scheduler, wake=1)


SLEEP, WAKE = Do(_sleep), Do(_wake)


def settle(scheduler, patience=60.0):
    """Let the worker give back what it can."""
    memory = scheduler.token_to_kv_pool_allocator.runtime.memory
    scheduler.on_idle()
    deadline = time.monotonic() + patience
    while memory.over_bytes() and time.monotonic() < deadline:
        time.sleep(0.005)
    memory.check_integrity()


@pytest.fixture
def pair(schedulers):
    reference, ours = schedulers.both(LIMITS, OURS)
    yield reference, ours
    ours.run([[WAKE, limit(PAGES)]])


def same(expected, got):
    assert set(expected) == set(got)
    for rid, theirs in expected.items():
        assert got[rid].finish == "FINISH_LENGTH", (rid, got[rid])
        assert_same(theirs, got[rid], tie=TIE[DTYPE], what=rid)


def test_a_lower_limit_gives_back_what_is_cached_at_once(pair):
    reference, ours = pair
    prompt = Prompts(1)
    requests = [Request(f"r{n}", prompt(60 * S), 20 * S) for n in range(6)]
    expected, got = side_by_side(reference, ours, [requests])
    assert ours.stats()["pages_cached"] > 20
    ours.run([[limit(6)]])
    ours.call(settle)
    stats = ours.stats()
    assert (stats["pages_limit"], stats["pages_backed"]) == (6, 7)
    assert 0 < stats["pages_cached"] <= 6
    again = [Request("again", requests[0].tokens, 12 * S)]
    same(expected | reference.run([again]), got | ours.run([again]))
    ours.call(settle)
    assert ours.stats()["pages_backed"] <= 7
    ours.run([[limit(PAGES)]])
    more = [Request(f"m{n}", prompt(60 * S), 20 * S) for n in range(6)]
    same(*side_by_side(reference, ours, [more]))
    assert ours.stats()["pages_backed"] > 20, "a higher limit is there at once"
    ours.check()


def test_what_runs_comes_to_its_end_whatever_the_limit(pair):
    """Eight requests, of which each will need 6 pages; then 5 pages are all there is to be."""
    reference, ours = pair
    prompt = Prompts(2)
    requests = [Request(f"r{n}", prompt(30 * S), 60 * S) for n in range(8)]
    late = [Request(f"late{n}", prompt(20 * S), 20 * S) for n in range(4)]
    script = [requests, *([[]] * 4), [limit(5)], [], late]
    expected, got = side_by_side(reference, ours, [requests, *([[]] * 6), late], script)
    same(expected, got)
    assert all(got[f"r{n}"].retractions == 0 for n in range(8)), "what ran was disturbed"
    ours.call(settle)
    assert ours.stats()["pages_backed"] <= 6, ours.stats()
    ours.check()


def test_a_request_that_the_limit_has_no_room_for_is_refused_with_the_reason(pair):
    _, ours = pair
    prompt = Prompts(3)
    before = ours.call(collect_aborts)
    assert not before
    answers = ours.run([[limit(5)], [Request("long", prompt(200 * S), 5 * S), Request("short", prompt(30 * S), 5 * S)]])
    assert answers["short"].finish == "FINISH_LENGTH"
    assert answers["long"].tokens == []
    (reason,) = ours.call(collect_aborts)
    assert "needs 13 pages of KV cache, and the server is limited to 5" in reason["message"]
    ours.check()


def collect_aborts(scheduler):
    """Reasons given since the last call."""
    sender = scheduler.ipc_channels.send_to_tokenizer
    told = getattr(sender, "told", [])
    sender.told = []
    if "send_output" not in sender.__dict__:
        sender.send_output = lambda output, _=None: sender.told.append(getattr(output, "finished_reason", None))
    return [reason for reason in told if reason]


def test_sleep_lets_what_runs_end_and_what_arrives_wait(pair):
    reference, ours = pair
    prompt = Prompts(4)
    first = [Request(f"r{n}", prompt(40 * S), 20 * S) for n in range(4)]
    later = [Request(f"w{n}", prompt(40 * S), 10 * S) for n in range(4)]
    seen = Do(asleep_with, (len(later),))
    script = [first, *([[]] * 5), [SLEEP], *([[]] * 3), later, *([[]] * 60 * S), [seen], [WAKE]]
    expected, got = side_by_side(reference, ours, [first, *([[]] * 4), later], script)
    same(expected, got)
    assert all(got[f"r{n}"].retractions == 0 for n in range(4))
    ours.check()


def test_a_grammar_that_is_ready_late_lets_nobody_begin_asleep(schedulers):
    """A chunked prompt comes to its end on a server that was sent to sleep; SGLang looks for compiled grammars as it
    makes that batch."""
    ours = schedulers(**OURS)
    prompt = Prompts(8)
    requests = [Request("long", prompt(452 * S), 4), Request("grammar", prompt(20 * S), 4)]
    answers = ours.run([requests, [Do(compiled_for_the_last_chunk), SLEEP], *([[]] * 40), [Do(began_awake), WAKE]])
    assert len(answers) == 2
    ours.check()


def compiled_for_the_last_chunk(scheduler):
    """The second request waits for its grammar, which is there after the plugin has looked for the last chunk."""
    manager, elastic = scheduler.grammar_manager, scheduler.vtensor_elastic
    (req,) = (req for req in scheduler.waiting_queue if req.rid == "grammar")
    scheduler.waiting_queue.remove(req)
    manager.grammar_queue.append(req)
    ready, answer_failed, run_batch = [], elastic.answer_failed, scheduler.run_batch
    scheduler.began_asleep, scheduler.fakes = [], contextlib.ExitStack()

    def get_ready():
        taken = [req for req in manager.grammar_queue if ready]
        manager.grammar_queue = [req for req in manager.grammar_queue if not ready]
        return taken

    def after_the_look(*args):
        answer_failed(*args)
        chunked = scheduler.chunked_req
        if chunked is not None and len(chunked.origin_input_ids) - versions.computed(chunked) <= 64 * S:
            ready.append(True)

    def watch(batch, *args, **kwargs):
        if elastic.sleeping and batch.forward_mode.is_extend():
            scheduler.began_asleep += [req.rid for req in batch.reqs]
        return run_batch(batch, *args, **kwargs)

    for owner, fake in (
        (manager, {"get_ready_grammar_requests": get_ready}),
        (elastic, {"answer_failed": after_the_look}),
        (scheduler, {"run_batch": watch}),
    ):
        scheduler.fakes.enter_context(mock.patch.multiple(owner, **fake))


def began_awake(scheduler):
    scheduler.fakes.close()
    assert set(scheduler.began_asleep) == {"long"}
    assert [req.rid for req in scheduler.waiting_queue] == ["grammar"]


def asleep_with(scheduler, waiting):
    settle(scheduler)
    stats = scheduler.token_to_kv_pool_allocator.runtime.stats()
    assert stats["pages_backed"] == 1, "only the padding page"
    assert (stats["requests"], stats["sleeping"]) == (0, 1)
    assert len(scheduler.waiting_queue) == waiting


def test_cached_prefixes_grow_old(schedulers):
    ours = schedulers(vtensor_cache_idle_seconds=1.5, **OURS)
    prompt = Prompts(5)
    stem = prompt(64 * S)
    ours.generate(*[Request(f"r{n}", stem + prompt(40 * S), 8) for n in range(3)])
    assert ours.stats()["tree_tokens"] > 100 * S
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        ours.generate(Request("fresh", stem + prompt(3 * S), 4))
    stats = ours.stats()
    assert 64 * S <= stats["tree_tokens"] < 100 * S, "what was read is there, the rest is gone"
    time.sleep(2.0)
    ours.call(settle)
    stats = ours.stats()
    assert (stats["tree_tokens"], stats["pages_kept"]) == (0, 0)
    ours.check()


def test_an_event_loop_that_sleeps_gives_back_as_one_that_does_not(schedulers):
    """--sleep-on-idle: the loop waits for a message, a second at a time, and nobody sends one."""
    seconds = {"vtensor_idle_seconds": 0.2, "vtensor_cache_idle_seconds": 0.4}
    ours = schedulers(sleep_on_idle=True, **seconds, **OURS)
    prompt = Prompts(6)
    ours.generate(*[Request(f"r{n}", prompt(60 * S), 8) for n in range(6)])
    before = ours.stats()
    assert before["pages_cached"] > 20
    for _ in range(2):
        ours.run([[Do(count_polls)]])
    assert ours.call(polls) >= 2, "the loop did not sleep"
    stats = ours.stats()
    assert (stats["tree_tokens"], stats["pages_cached"]) == (0, 0)
    assert stats["pages_backed"] < 10
    ours.check()


def count_polls(scheduler):
    """From now on `polls` says how often the event loop slept."""
    if "slept" not in scheduler.__dict__:
        sleeper, scheduler.slept = scheduler.idle_sleeper, 0
        poll = sleeper.poller.poll

        def counted(milliseconds):
            scheduler.slept += 1
            return poll(milliseconds)

        sleeper.poller = SimpleNamespace(poll=counted)


def polls(scheduler):
    return scheduler.slept


@pytest.mark.parametrize(
    "asked",
    [{"limit_bytes": value} for value in (0, -5, 1 << 50, "20GiB", None, True, [1], float("inf"), float("nan"), 4e6)]
    + [{"nonsense": 1}],
    ids=str,
)
def test_what_cannot_be_is_refused(pair, asked):
    _, ours = pair
    before = ours.stats()["pages_limit"]
    assert not ours.call(_control, asked)
    assert ours.stats()["pages_limit"] == before


def _control(scheduler, asked):
    return control(scheduler, **asked)


step = st.one_of(
    st.builds(limit, st.integers(1, PAGES)),
    st.just(SLEEP),
    st.just(WAKE),
    st.just(Do(settle, (0.05,))),
    st.builds(lambda seed: Do(refuse_at_random, (0.2, seed)), st.integers(0, 99)),
    st.just(Do(refuse_at_random, (0.0, 0))),
)


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 120), st.integers(1, 40), st.integers(0, 6)), min_size=2, max_size=8
    ),
    steps=st.lists(st.tuples(st.integers(0, 30), step), min_size=2, max_size=8),
    aborted=st.integers(0, 12),
    seed=st.integers(0, 999),
)
@settings(max_examples=share_of(12), deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history_of_limits_and_sleeps(pair, arrivals, steps, aborted, seed):
    """Requests with shared starts arrive while the limit moves, the server sleeps and wakes, and the driver refuses."""
    reference, ours = pair
    prompt = Prompts(seed)
    stems = [prompt(40 * S), prompt(75 * S), []]
    turns = [[] for _ in range(32)]
    requests = []
    for n, (stem, more, new, turn) in enumerate(arrivals):
        request = Request(f"r{n}", (stems[stem % 3] + prompt(more * S))[: 140 * S], new * S)
        requests.append(request)
        turns[turn * 3].append(request)
    plain = [list(turn) for turn in turns]
    for turn, what in steps:
        turns[turn].append(what)
    if aborted < len(requests):
        turns[20].append(Abort(f"r{aborted}"))
        plain[20].append(Abort(f"r{aborted}"))
    end = [Do(refuse_at_random, (0.0, 0)), WAKE, limit(PAGES)]
    expected, got = side_by_side(reference, ours, plain, [*turns, end])
    assert set(got) == set(expected)
    for rid, answer in got.items():
        if rid == f"r{aborted}":
            continue
        if answer.finish == "FINISH_LENGTH":
            assert_same(expected[rid], answer, tie=TIE[DTYPE], what=rid)
        else:  # too long for the limit of the moment, and told so
            assert answer.tokens == expected[rid].tokens[: len(answer.tokens)]
            assert any(isinstance(what, Do) and what.function is _limit for _, what in steps)
    ours.check()
    assert ours.flush()
    assert ours.stats()["pages_owned"] == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_steps_under_load(pair, seed):
    """Limits, sleeps, a neighbour that takes and leaves memory, a driver that refuses, aborts: while requests come."""
    _, ours = pair
    rng, prompt = random.Random(seed), Prompts(seed)
    stems = [prompt(40 * S), prompt(75 * S), prompt(8 * S), []]
    script, sent, aborted = [], {}, set()
    for turn in range(1000):
        what = rng.random()
        if what < 0.25:
            request = Request(
                f"r{turn}.", (rng.choice(stems) + prompt(rng.randint(1, 80 * S)))[: 140 * S], rng.randint(1, 30 * S)
            )
            sent[request.rid] = request
            script.append([request])
        elif what < 0.35 and sent:
            rid = rng.choice(list(sent)[-8:])
            aborted.add(rid)
            script.append([Abort(rid)])
        else:
            steps = [limit(rng.randint(12, PAGES)), SLEEP, WAKE, WAKE, Do(leave_pages, (rng.randint(14, PAGES + 1),))]
            steps += [
                Do(leave_pages, (None,)),
                Do(refuse_at_random, (rng.choice([0.0, 0.2]), turn)),
                Do(settle, (0.05,)),
            ]
            script.append([rng.choice(steps)] if what < 0.7 else [])
    script.append([Do(refuse_at_random, (0.0, 0)), Do(leave_pages, (None,)), WAKE, limit(PAGES)])
    got = ours.run(script)
    assert set(got) == set(sent)
    for rid, answer in got.items():
        if rid not in aborted:
            assert answer.finish == "FINISH_LENGTH", (rid, answer)
            assert len(answer.tokens) == sent[rid].new
    ours.check()
    assert ours.flush()
    stats = ours.stats()
    assert stats["pages_owned"] == 0
    # Not merely answered: those of the last hundred, alone and undisturbed, say the same.
    for rid in [rid for rid in sent if rid not in aborted][-20:]:
        (again,) = ours.generate(sent[rid])
        assert_same(again, got[rid], tie=TIE[DTYPE], what=rid)
