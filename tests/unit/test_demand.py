"""What a server that runs short asks its neighbours for: as much as SGLang wants free before it admits what waits."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest

from sglang_vtensor.srt import demand as demand_module
from sglang_vtensor.srt.demand import PATIENCE_SECONDS, TRY_SECONDS, Demand, Patience, Turn, demanded

PAGE_TOKENS, PAGE_BYTES = 16, 1 << 16
NUMBERS = itertools.count()


def req(prompt: int, said: int = 0, most: int = 100, *, ignore_eos: bool = False, over: bool = False, again: int = 0):
    """It was retracted `again` times, and waits to go on if it ever was."""
    sampling = SimpleNamespace(max_new_tokens=most, ignore_eos=ignore_eos)
    tokens = {"origin_input_ids": [0] * prompt, "output_ids": [0] * said, "allocated": prompt + said}
    of = {"rid": str(next(NUMBERS)), "is_retracted": again > 0, "retraction_count": again}
    return SimpleNamespace(sampling_params=sampling, finished=lambda: over, **of, **({} if over else tokens))


def chunked(prompt: int, done: int):
    begun = req(prompt, most=16)
    begun.allocated = done
    return begun


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def pages(demand: Demand) -> float:
    runtime = SimpleNamespace(
        sglang=SimpleNamespace(allocated=lambda req: req.allocated),
        bytes_for=lambda tokens: pages_for(tokens) * PAGE_BYTES,
        memory=SimpleNamespace(layout=SimpleNamespace(page_bytes=PAGE_BYTES, pages_for=pages_for)),
    )
    return demanded(runtime, demand) / PAGE_BYTES


HEAD = req(15, most=16)


@pytest.mark.parametrize(
    ("waiting", "running", "wanted"),
    [
        ([], [], 0),
        ([], [req(50, said=200, most=1000, ignore_eos=True)], 0),  # nothing waits for what may never be needed
        ([HEAD], [], 1 + 1 + 1),  # its 15 tokens with one more, the whole of its answer, and a page
        ([HEAD], [req(50, said=200, most=1000, ignore_eos=True)], 3 + 50),  # which will say 800 tokens more
        ([HEAD], [req(50, said=200, most=1000)], 3 + 25),  # it may stop before: a half is kept free
        ([HEAD], [req(50, said=1000, most=1000)], 3),
        ([HEAD], [req(50, most=100_000, ignore_eos=True)], 3 + 256),  # SGLang looks 4,096 tokens ahead
        ([HEAD], [chunked(1000, 200)], 3 + 50 + 1),
        ([HEAD], [req(50, said=20, over=True)], 3),  # it holds nothing, and is not asked
        ([HEAD] * 40, [], 16 * 3),  # the head of the queue
    ],
)
def test_room_for_answers_is_wanted_too(waiting, running, wanted):
    assert pages(Demand(waiting, running, new_token_ratio=0.5)) == wanted


def test_the_request_that_comes_first_stays_that_until_it_ends():
    turn = Turn()
    one, two, three = (req(10) for _ in range(3))
    over = req(10, over=True)

    def first(*running, chunked=None, waiting=()):
        return turn.take(Demand(waiting, running, chunked=chunked))

    assert first() is None
    assert first(waiting=[one, two]) is one
    assert first(chunked=two, waiting=[one]) is two
    assert first(one, chunked=two) is two
    assert first(one, two) is two, "its prompt is computed"
    assert first(over, waiting=[one]) is one, "it begins beside one that has ended"
    assert first(one, waiting=[two]) is one
    assert first(three, one, waiting=[two]) is one, "also where others begin beside it"
    assert first(three, two) is None, "they have ended, or not, without it"
    assert first(three) is three, "it would be retracted, and then come first"
    assert first() is None
    retracted = req(10, again=1)
    assert first(waiting=[one, two, retracted]) is retracted, "SGLang puts it behind the others"
    assert first(three, waiting=[one, retracted]) is three


def test_a_queue_in_another_order_keeps_its_place_among_the_servers():
    """It waits for its turn since then, whichever of its requests is the next one; the next turn is waited for anew."""
    turn = Turn()
    one, two, three = (req(10) for _ in range(3))

    def since(*running, waiting=()):
        demand = Demand(waiting, running)
        assert turn.take(demand) is turn.first
        time.sleep(0.001)
        return turn.since

    began = since(waiting=[one, two])
    assert since(waiting=[two, one]) == since(waiting=[one, three, two]) == began
    assert since(one, waiting=[three, two]) == began, "it has its turn"
    assert since(waiting=[three, two]) > began, "it has had it"


class Looks:
    """`looks(seconds, ...)`: so much later somebody looks, and nothing runs while `retracted` ones wait, if there are
    any, and others behind them. Returns whether they are tried."""

    def __init__(self, monkeypatch):
        self.now, self.patience = 1000.0, Patience()
        monkeypatch.setattr(demand_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self(0, stuck=False)

    def __call__(self, seconds, *retracted, stuck=True, short=True):
        self.now += seconds
        self.patience.look(retracted, stuck=stuck, short=short)
        return self.patience.tries


@pytest.fixture
def looks(monkeypatch):
    return Looks(monkeypatch)


def test_who_cannot_begin_for_long_is_tried_now_and_then(looks):
    assert not looks(PATIENCE_SECONDS / 2)
    assert not looks(PATIENCE_SECONDS / 2 - 0.1)
    assert looks(0.2)
    assert [looks(TRY_SECONDS / 4) for _ in range(8)] == 2 * [False, False, False, True]
    looks.patience.begins()
    assert not looks(TRY_SECONDS, stuck=False), "it runs"
    assert looks(TRY_SECONDS), "the next one need not wait so long while the driver refuses"
    looks.patience.begins()
    assert not looks(TRY_SECONDS, short=False), "it gives"
    assert not looks(PATIENCE_SECONDS - 0.1)


def test_somebody_who_begins_is_not_stuck(looks):
    for _ in range(20):  # requests that end with their prefill never run
        assert not looks(PATIENCE_SECONDS - 0.1)
        looks.patience.begins()


def test_who_is_retracted_again_waits_again(looks):
    waiting = [req(10, again=1) for _ in range(4)]
    assert not looks(0, *waiting)
    assert looks(PATIENCE_SECONDS, *waiting)
    looks.patience.begins()
    looks(1.0, stuck=False)
    assert looks(0, *waiting[1:]), "the next one was not retracted since"
    assert looks(TRY_SECONDS, *waiting[:1:-1]), "nor by being in another order, or fewer"
    waiting[2].retraction_count += 1
    assert not looks(TRY_SECONDS, *waiting[2:])
    assert not looks(PATIENCE_SECONDS - 0.1, *waiting[2:])
    assert looks(0.2, *waiting[2:])
