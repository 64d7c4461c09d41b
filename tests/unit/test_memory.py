"""The memory of a rank: what is handed out and taken back, limits, what is kept, and the worker beside all that."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import zmq

from sglang_vtensor import backing as backing_module
from sglang_vtensor import chores, worker
from sglang_vtensor import clock as clock_module
from sglang_vtensor import memory as memory_module
from sglang_vtensor.handout import Ask
from sglang_vtensor.layout import KVLayout, frames_for
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.placement import runs_of
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.waiting import SECONDS, wait_for

LAYOUT = KVLayout(2, 1, 32, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)
#: A second side, of larger pages.
WINDOW = KVLayout(1, 2, 64, torch.float32, page_tokens=8, stride_bytes=1024, granularity=4096)


def make(vmm=None, sides=LAYOUT, **kwargs) -> KVMemory:
    defaults = {"capacity_pages": 16, "max_tokens": 64, "worker": False, "num_frames": 128}
    return KVMemory(vmm or FaultyVirtualMemory(), sides, **(defaults | kwargs))


def take(memory: KVMemory, count: int, *, growing: bool = False) -> list[int] | None:
    """Frames for a request that begins with nothing before it."""
    placed = memory.allocate([Ask(None, count)], growing=growing)
    return None if placed is None else placed[0]


def go_on(memory: KVMemory, frames: list[int], count: int = 1) -> list[int]:
    placed = memory.allocate([Ask(frames[-1], count, own=True)], growing=True)
    assert placed is not None
    return placed[0]


def occupy(memory: KVMemory, frames: list[int]) -> None:
    """Free them, and let nobody be placed there until `leave`: others are to get their pages elsewhere."""
    memory.free(frames)
    for frame in frames:
        memory.placement.set_aside(frame)


def leave(memory: KVMemory, frames: list[int]) -> None:
    for frame in frames:
        memory.placement.put_back(frame)


def done(memory: KVMemory) -> None:
    """Every batch is done, and so is the worker's work."""
    memory.complete(memory.launch())
    while memory.housekeep():
        pass


# What is handed out.


def test_what_is_written_by_slot_lies_one_behind_the_other():
    memory = make()
    frames = take(memory, 3)
    assert list(runs_of(frames)) == [(frames[0], 3)]
    for layer in range(2):
        k, v = memory.layer_views(layer)
        assert k.shape == (memory.placement.num_frames * 8, 1, 32)
        start = frames[0] * 8
        for n in range(24):
            k[start + n], v[start + n] = layer + 10 * n, layer + 10 * n + 1
    for layer in range(2):
        k, v = memory.layer_views(layer)
        assert k[start : start + 24, 0, 0].tolist() == [layer + 10 * n for n in range(24)]
        assert v[start : start + 24, 0, 31].tolist() == [layer + 10 * n + 1 for n in range(24)]
    memory.check_integrity()


def test_frames_are_for_all_that_is_asked_or_for_none():
    memory = make()
    assert memory.allocate([Ask(None, 9), Ask(None, 8)]) is None
    assert (memory.owned, memory.ready) == (0, 0), "the limit is known before anything is done"
    one, nothing, other = memory.allocate([Ask(None, 9), Ask(None, 0), Ask(None, 7)])
    assert (len(one), nothing, len(other)) == (9, [], 7)
    assert not set(one) & set(other)
    assert memory.allocate([Ask(one[-1], 0)]) == [[]]
    assert memory.allocate([]) == []
    memory.check_integrity()


@pytest.mark.parametrize("call", ["create", "map", "clear", "wait_cleared"])
def test_nobody_has_anything_where_the_driver_refuses_a_part(call):
    vmm = FaultyVirtualMemory()
    memory = make(vmm)
    memory.worker.retry_seconds = 0.0
    vmm.fail_calls, vmm.fail_at = (call,), 1 if call == "wait_cleared" else 4
    asks = [Ask(None, 2), Ask(None, 3)]
    assert memory.allocate(asks) is None
    assert memory.owned == 0
    memory.check_integrity()
    assert [len(frames) for frames in memory.allocate(asks)] == [2, 3]
    assert not memory.short
    memory.check_integrity()


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 6])
def test_frames_have_memory_on_all_sides_or_on_none(fails_at):
    vmm = FaultyVirtualMemory()
    memory = make(vmm, [LAYOUT, WINDOW])
    memory.worker.retry_seconds = 0.0
    vmm.fail_calls, vmm.fail_at = ("create",), fails_at
    assert take(memory, 3) is None
    assert all(backing.used == 0 for backing in memory.backings)
    memory.check_integrity()
    frames = take(memory, 3)
    assert all(backing.uses(frame) for backing in memory.backings for frame in frames)
    memory.check_integrity()


def test_what_a_refused_side_undoes_goes_back_without_another_batch():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, [LAYOUT, WINDOW])
    vmm.fail_calls, vmm.fail_at = ("create",), 3  # two for the first side, and none for the second
    assert take(memory, 2) is None
    assert memory.backing.free == 2
    memory.allow(0)
    assert memory.give_all_back()
    memory.check_integrity()


def test_a_conversation_goes_on_in_place_and_a_branch_begins_its_own():
    memory = make()
    system = take(memory, 2)
    first, branch = memory.allocate([Ask(system[-1], 1), Ask(system[-1], 1)])
    first += go_on(memory, first)
    branch += go_on(memory, branch)
    assert [len(list(runs_of(system + own))) for own in (first, branch)] == [1, 2]
    assert memory.stats()["pages_in_place"] == 3


def test_what_was_tried_in_vain_is_not_counted():
    """Of the frames that are handed out, each had memory or got it, and lies in place or does not."""
    vmm = FaultyVirtualMemory(capacity_bytes=5 * LAYOUT.page_bytes)
    memory = make(vmm)
    memory.worker.retry_seconds = 0.0
    for _ in range(3):
        assert take(memory, 6) is None
    counted = ("pages_allocated", "pages_with_memory", "pages_created_at_once", "pages_in_place")
    assert [memory.stats()[key] for key in counted] == [0, 0, 0, 0]
    assert take(memory, 4) is not None
    assert [memory.stats()[key] for key in counted] == [4, 4, 0, 0], "their pages were created before"


def test_a_place_that_is_given_up_for_one_with_memory_is_not_in_place():
    memory = make(capacity_pages=8)
    mine, others = take(memory, 4), take(memory, 4)
    memory.free(others)
    done(memory)
    (frame,) = go_on(memory, mine)
    assert frame in others
    stats = memory.stats()
    assert (stats["pages_allocated"], stats["pages_in_place"]) == (9, 0)


def test_impossible_sizes_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"room for 0 pages of 8 tokens.*--mem-fraction-static"):
        make(capacity_pages=0)
    with pytest.raises(ValueError, match=r"pages of \[8, 4\] tokens: equal ones wanted"):
        make(sides=[LAYOUT, KVLayout(2, 1, 32, torch.float32, page_tokens=4, stride_bytes=1024, granularity=4096)])
    with pytest.raises(ValueError, match=r"need at least twice as many frames.*--max-total-tokens"):
        frames_for([LAYOUT], 1 << 28, 64)


@pytest.mark.parametrize(
    ("context", "kv_heads", "frames", "lane"),
    [
        (8192, 8, 4096 * 64, 64),  # more lanes are of no use
        (131_072, 8, 1 << 21, 1024),  # 32 TiB of addresses, 16 MiB a page
        (131_073, 8, 1 << 21, 2048),
        (262_144, 1, (1 << 22), 2048),  # a state byte each is enough
    ],
)
def test_addresses_bound_how_many_frames_there_are(context, kv_heads, frames, lane):
    layout = KVLayout.choose(
        layers=32, kv_heads=kv_heads, head_dim=128, dtype=torch.bfloat16, granularity=2 << 20, tile_tokens=128
    )
    assert layout.page_tokens == 128
    assert frames_for([layout], 5000, context) == (frames, lane)


def test_a_context_that_no_lane_can_hold_is_several_runs():
    layout = KVLayout(1, 1, 64, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)
    frames, lane = frames_for([layout], 100, 1 << 33)
    assert lane <= frames
    assert lane * 8 < 1 << 31, "slots are 32-bit numbers"


# What is taken back.


def test_a_freed_page_stays_mapped_until_the_batch_being_made_is_done():
    memory = make()
    memory.free(take(memory, 2))
    assert memory.trim() == 0
    memory.complete(memory.launch())
    assert memory.trim() == 2


@pytest.mark.parametrize("how", ["keep", "unclaim", "free_all", "let_go"])
def test_a_page_that_goes_another_way_stays_mapped_as_long(how):
    memory = make(sides=[LAYOUT, WINDOW])
    (frame,) = take(memory, 1)
    if how == "free_all":
        memory.free_all()
    elif how == "let_go":
        memory.let_go(1, [frame])
    else:
        tail = memory.tails.keep(frame, 3)
        if how == "unclaim":
            memory.complete(memory.launch())
            memory.tails.unclaim(tail, memory.tails.claim(tail))
        memory.tails.forget(tail)
    assert memory.trim() == 0, "the batch being made may read it"
    memory.complete(memory.launch())
    assert memory.trim() == 1 if how == "let_go" else 2


def test_free_all_forgets_everything():
    memory = make()
    take(memory, 9)
    memory.tails.keep(take(memory, 1)[0], 3)
    memory.free_all()
    done(memory)
    stats = memory.stats()
    assert (stats["pages_owned"], stats["pages_kept"]) == (0, 0)
    assert len(take(memory, 16)) == 16
    memory.check_integrity()


def test_a_double_free_is_refused():
    memory = make()
    frames = take(memory, 1)
    memory.free(frames)
    with pytest.raises(ValueError, match="is VACANT: OWNED wanted"):
        memory.free(frames)


# Several sides.


def test_a_side_that_is_let_go_gives_its_memory_to_others():
    memory = make(sides=[LAYOUT, WINDOW], capacity_pages=6)
    window = memory.layer_views(0, 1)[0]
    frames = take(memory, 4)
    for frame in frames:
        window[frame * 8] = float(frame)
    memory.let_go(1, frames[:3])
    assert [backing.used for backing in memory.backings] == [4, 1]
    other = take(memory, 2)
    assert all(backing.uses(frame) for backing in memory.backings for frame in other)
    assert window[frames[3] * 8, 0, 0].item() == frames[3]
    memory.check_integrity()
    memory.free(frames)
    memory.check_integrity()
    done(memory)
    assert len(take(memory, 4)) == 4
    memory.check_integrity()


def test_the_first_side_is_not_let_go():
    memory = make(sides=[LAYOUT, WINDOW])
    with pytest.raises(AssertionError, match="of all tokens"):
        memory.let_go(0, take(memory, 1))


def test_tokens_are_copied_on_all_sides():
    memory = make(sides=[LAYOUT, WINDOW])
    source, target = take(memory, 2)
    views = [view for side in range(2) for layer in range(2 - side) for view in memory.layer_views(layer, side)]
    for n, view in enumerate(views):
        view[target * 8 : target * 8 + 8] = -1.0
        for token in range(8):
            view[source * 8 + token] = 10.0 * n + token
    memory.copy_tokens(source, target, 5)
    for n, view in enumerate(views):
        expected = [10.0 * n + token for token in range(5)] + [-1.0] * 3
        for last in (view[..., 0, 0], view[..., -1, -1]):
            assert last[target * 8 : target * 8 + 8].tolist() == expected
    assert (memory.counts["copies"], memory.counts["copied_tokens"]) == (1, 5)


def test_a_lower_allowance_takes_memory_from_every_side():
    memory = make(sides=[LAYOUT, WINDOW], idle_seconds=1000.0)
    memory.free(take(memory, 10))
    memory.complete(memory.launch())
    memory.allow(4)
    assert memory.owes() == 6
    done(memory)
    assert [backing.pages for backing in memory.backings] == [5, 5]
    assert memory.owes() == 0


def test_a_side_that_is_short_makes_pages_missing():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, [LAYOUT, WINDOW])
    create = vmm.create

    def refuses_large(nbytes):
        if nbytes == WINDOW.page_bytes:
            raise VMMError("create", "injected", "INJECTED")
        return create(nbytes)

    vmm.create = refuses_large
    assert take(memory, 4) is None
    assert memory.short
    assert memory.in_pages(memory.missing_bytes()) == 15, "four pages of the other side, given back, are one of each"


def test_a_side_that_was_refused_and_lacks_none_is_asked_about_again():
    """All that may be owned has memory there, and not on the other side: nobody could begin with what that lacks."""
    vmm = FaultyVirtualMemory()
    memory = make(vmm, [LAYOUT, WINDOW], idle_seconds=1000.0)
    memory.worker.retry_seconds = 0.0
    memory.allow(4)
    memory.free(take(memory, 4))
    memory.complete(memory.launch())
    memory.backings[1].trim(0)
    memory.backings[0].refusal = VMMError("create", "injected", "INJECTED")
    assert (memory.backings[0].free, memory.backings[1].free, memory.room()) == (4, 0, 4)
    assert memory.in_pages(memory.missing_bytes()) > 12
    done(memory)
    assert not memory.short
    assert memory.in_pages(memory.missing_bytes()) == 12, "the others are beyond the allowance"


def test_both_sides_get_memory_where_a_request_comes_to_next():
    memory = make(sides=[LAYOUT, WINDOW], reserve_pages=2, num_frames=8 * 40)
    frames = take(memory, 2)
    done(memory)
    assert all(backing.has_page(frames[-1] + 1) for backing in memory.backings)


def test_contexts_are_one_run_while_pages_may_be_created():
    """Also where pages are free elsewhere: those in reserve, and what others left."""
    memory = make(capacity_pages=60, reserve_pages=4, num_frames=512)
    memory.free(take(memory, 10))
    requests = [take(memory, 2) for _ in range(5)]
    for _ in range(5):
        placed = memory.allocate([Ask(request[-1], 1, own=True) for request in requests])
        for request, frames in zip(requests, placed, strict=True):
            request += frames
        done(memory)
    assert all(len(list(runs_of(request))) == 1 for request in requests)
    memory.check_integrity()


# A full cache.


def test_the_frames_of_a_batch_are_where_free_pages_are():
    memory = make(num_frames=128)
    memory.free(take(memory, 10))
    memory.free(take(memory, 4))
    memory.complete(memory.launch())
    first = take(memory, 7)
    tail = memory.tails.keep(first.pop(), 3)
    memory.chores._hints.clear()
    one, other = memory.allocate([Ask(None, 4), Ask(None, 4)])
    assert (len(one), len(other)) == (4, 4)
    assert tail.frame is not None
    memory.check_integrity()


def test_a_batch_gets_what_the_limit_allows():
    """Some free pages, some that may be created, and neither are enough by themselves."""
    memory = make()
    memory.free(take(memory, 5))
    assert len(take(memory, 1)) == 1
    done(memory)
    frames = [frame for some in memory.allocate([Ask(None, 8), Ask(None, 7)]) for frame in some]
    assert len(set(frames)) == 15
    memory.check_integrity()


def test_sides_whose_free_pages_lie_apart_are_no_shortage_for_ever():
    memory = make(sides=[LAYOUT, WINDOW], capacity_pages=4, max_tokens=32)
    one = take(memory, 4)
    memory.let_go(1, one[:2])
    memory.complete(memory.launch())
    memory.backings[1].trim(0)
    memory.free(one[2:])
    memory.complete(memory.launch())
    assert take(memory, 2) is not None
    memory.check_integrity()


# What is kept.


def test_a_kept_page_is_as_it_was():
    memory = make()
    (frame,) = take(memory, 1)
    keys = memory.layer_views(0)[0]
    keys[frame * 8] = 5.0
    tail = memory.tails.keep(frame, 3)
    assert (memory.owned, memory.stats()["pages_kept"], memory.stats()["kept_tokens"]) == (0, 1, 3)
    take(memory, 15)
    assert memory.tails.claim(tail) == frame
    assert keys[frame * 8, 0, 0].item() == 5.0
    assert memory.tails.claim(tail) is None, "it is somebody's"
    memory.check_integrity()


def test_a_claim_stays_below_the_limit():
    memory = make(capacity_pages=3)
    tail = memory.tails.keep(take(memory, 1)[0], 3)
    take(memory, 2)
    memory.limit = 2
    assert memory.tails.claim(tail) is None


def test_the_longest_kept_pages_make_room():
    memory = make(capacity_pages=6)
    tails = [memory.tails.keep(frame, 3) for frame in take(memory, 4)]
    take(memory, 4)
    assert [tail.frame is None for tail in tails] == [True, True, False, False]
    memory.check_integrity()


def test_a_lower_limit_forgets_the_longest_kept_pages():
    memory = make()
    tails = [memory.tails.keep(frame, 3) for frame in take(memory, 4)]
    take(memory, 2)
    assert memory.allow(4) == 0
    assert [tail.frame is None for tail in tails] == [True, True, False, False]


def test_old_and_many_kept_pages_are_forgotten_when_asked():
    memory = make()
    tails = [memory.tails.keep(frame, 3) for frame in take(memory, 4)]
    tails[0].kept_at = 0.0
    memory.tails.forget_old(1.0)
    assert [tail.frame is None for tail in tails] == [True, False, False, False]
    assert memory.tails.forget_some(2) == 2
    assert memory.tails.forget_some(2) == 1
    memory.tails.forget(tails[3])
    memory.check_integrity()


# Limits and the reserve.


def test_what_requests_have_left_in_their_pages_is_part_of_the_reserve():
    memory = make(reserve_pages=3, idle_seconds=0.0)
    done(memory)
    assert memory.ready == 3
    take(memory, 4)
    memory.unfilled_tokens = LAYOUT.page_tokens + 1
    done(memory)
    assert memory.ready == 2, "four pages of which a little more than one is empty"
    kept = [memory.tails.keep(frame, 3) for frame in take(memory, 2)]
    done(memory)
    assert (memory.ready, len(memory.tails)) == (1, 2), "two kept pages have one page left"
    memory.unfilled_tokens = 0
    for tail in kept:
        memory.tails.forget(tail)
    done(memory)
    assert memory.ready == 3


def test_the_reserve_is_where_requests_come_to_next():
    memory = make(reserve_pages=3)
    frames = take(memory, 2)
    done(memory)
    assert memory.backing.has_page(frames[-1] + 1)
    assert memory.ready == 3, "what is had ahead is part of the reserve"
    created = memory.backing.creates
    assert go_on(memory, frames) == [frames[-1] + 1]
    assert memory.backing.creates == created
    assert memory.stats()["pages_with_memory"] == 1
    begin = take(memory, 2)
    assert memory.backing.creates == created, "and where they begin"
    memory.check_integrity()
    assert begin


def test_the_allowance_gives_back_what_is_free_and_lets_what_runs_grow():
    memory = make(reserve_pages=4)
    frames = take(memory, 6)
    while memory.housekeep():
        pass
    assert memory.stats()["pages_backed"] == 11  # 6 owned, 4 in reserve, and the padding page
    assert memory.owes() == 0
    assert memory.allow(5) == 1
    assert memory.owes() == 4, "what is free; one that is owned is too many besides"
    done(memory)
    assert memory.owes() == 0
    assert memory.stats()["pages_backed"] == 7
    assert take(memory, 1) is None
    assert memory.in_pages(memory.missing_bytes()) == 11
    assert memory.room() == -1
    more = take(memory, 2, growing=True)
    assert len(more) == 2
    memory.free(frames + more)
    done(memory)
    assert memory.stats()["pages_backed"] == 6
    assert memory.allow(0) == 0
    done(memory)
    assert memory.stats()["pages_backed"] == 1, "only the padding page"
    assert memory.allow(16) == 0
    assert len(take(memory, 16)) == 16
    memory.check_integrity()


def test_what_is_idle_goes_back_when_somebody_else_needs_the_device(monkeypatch):
    monkeypatch.setattr(chores, "LOOK_SECONDS", 0.0)
    memory = make(reserve_pages=4)
    frames = take(memory, 6)
    done(memory)
    assert memory.stats()["pages_backed"] == 11
    memory.vmm.low = lambda: True
    done(memory)
    assert memory.stats()["pages_backed"] == 7, "the reserve goes back, what is owned stays"
    memory.free(frames[:3])
    done(memory)
    assert memory.stats()["pages_backed"] == 4
    memory.vmm.low = lambda: False
    done(memory)
    memory.housekeep()
    done(memory)
    assert memory.stats()["pages_backed"] == 8, "and comes back"


def test_what_begins_beyond_the_allowance_takes_the_worker_nowhere():
    """Who is alone may begin with more than the limit. The reserve stays within it, also meanwhile."""
    memory = make(reserve_pages=4, idle_seconds=0.0)
    memory.allow(2)
    memory.beyond = True
    assert memory.missing_bytes() == 0
    frames = take(memory, 3)
    assert frames is not None
    while memory.housekeep():
        pass
    assert (memory.backed - 1, memory.ready) == (3, 0)
    memory.beyond = False
    assert take(memory, 1) is None
    memory.free(frames[1:])
    done(memory)
    assert memory.backed - 1 == 2, "of which one is ready"


def test_free_pages_beyond_the_reserve_stay_until_they_are_idle(monkeypatch):
    now = 1000.0
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: now)
    for module in (memory_module, backing_module):
        monkeypatch.setattr(module, "time", clock)
    memory = make(reserve_pages=2, idle_seconds=5.0)
    first, later = take(memory, 4), take(memory, 4)
    memory.free(first)
    now += 3.0
    memory.free(later)
    done(memory)
    assert memory.ready == 8
    now += 2.0
    frames = take(memory, 1)  # one of the later ones; what nobody needed for so long goes back nevertheless
    done(memory)
    assert memory.ready == 3
    now += 5.0
    done(memory)
    assert memory.ready == 2
    assert frames


def test_the_reserve_is_smaller_when_nothing_has_run_for_long(monkeypatch):
    now = 1000.0
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: now)
    for module in (memory_module, backing_module):
        monkeypatch.setattr(module, "time", clock)
    memory = make(reserve_pages=6, idle_reserve_pages=1, idle_seconds=5.0)
    frames = take(memory, 1)
    done(memory)
    assert memory.ready == memory.reserve_now == 6
    memory.free(frames)
    done(memory)
    now += 29.0
    while memory.housekeep():
        pass
    assert memory.ready == 6
    now += 1.0
    memory.complete(memory.launch(idle=True))  # for a health check
    while memory.housekeep():
        pass
    assert memory.ready == memory.reserve_now == 1
    now += 100.0
    take(memory, 1)
    done(memory)
    assert memory.ready == memory.reserve_now == 6, "it is there again for the next one"


def test_the_worker_gives_no_page_back_while_frames_are_listed(monkeypatch):
    memory = make()
    frames = take(memory, 4)
    memory.free(frames)
    done(memory)
    worker, is_vacant = threading.Thread(target=memory.trim), memory.placement.is_vacant

    def vacant(frame: int) -> bool:
        if worker.ident is None:
            worker.start()
            worker.join(0.5)  # time enough to give all back, if nothing holds it up
        return is_vacant(frame)

    monkeypatch.setattr(memory.placement, "is_vacant", vacant)
    assert memory.frames_left() == sorted(frames)
    worker.join()
    assert memory.frames_left() == []


# Running out.


def test_where_the_driver_gives_no_more_free_pages_are_used_wherever_they_are():
    vmm = FaultyVirtualMemory(capacity_bytes=9 * LAYOUT.page_bytes)  # 8, and the padding page
    memory = make(vmm, num_frames=512)
    first, other = take(memory, 6), take(memory, 2)
    memory.free(first[:4])
    (more,) = memory.allocate([Ask(other[-1], 3, own=True)])
    assert set(more) <= set(first[:4]), "the frames behind have no memory, and get none"
    assert memory.short
    assert take(memory, 1) is not None
    assert take(memory, 1) is None
    memory.check_integrity()


def test_a_full_device_is_an_answer_and_is_said_once(caplog):
    vmm = FaultyVirtualMemory(capacity_bytes=4 * LAYOUT.page_bytes)
    memory = make(vmm)
    memory.worker.retry_seconds = 0.0
    for _ in range(3):
        assert take(memory, 5) is None
    assert len(caplog.records) == 1
    assert "the device gives no more memory" in caplog.text
    assert memory.stats()["shortages"] == 1
    assert memory.in_pages(memory.missing_bytes()) == 13
    frames = take(memory, 3)
    vmm.capacity_bytes = None
    memory.free(frames)
    assert len(take(memory, 16)) == 16
    assert not memory.short
    assert memory.in_pages(memory.missing_bytes()) == 0


def test_a_device_that_is_full_is_left_alone_for_a_while():
    vmm = FaultyVirtualMemory(capacity_bytes=4 * LAYOUT.page_bytes)
    memory = make(vmm)
    memory.worker.retry_seconds = 3600.0
    assert take(memory, 5) is None
    seen = vmm.seen["create"]
    assert take(memory, 5) is None
    memory.housekeep()
    assert vmm.seen["create"] == seen
    assert len(take(memory, 3)) == 3, "what is there is handed out"


def test_the_worker_finds_out_that_the_device_gives_again():
    vmm = FaultyVirtualMemory(capacity_bytes=4 * LAYOUT.page_bytes)
    memory = make(vmm)
    memory.worker.retry_seconds = 0.0
    assert take(memory, 5) is None
    memory.housekeep()
    assert memory.short
    vmm.capacity_bytes = None
    memory.housekeep()
    assert not memory.short


# What the worker does.


def test_the_worker_keeps_pages_ready_and_gives_idle_ones_back():
    memory = make(worker=True, reserve_pages=3, idle_seconds=0.05)
    try:
        wait_for(lambda: memory.ready == 3)
        frames = take(memory, 8)
        assert memory.backed >= 9
        memory.free(frames)
        memory.complete(memory.launch())
        wait_for(lambda: memory.ready == 3)
        memory.check_integrity()
    finally:
        memory.close()
    assert memory.vmm.created_bytes == 0


def test_the_worker_survives_a_full_device():
    vmm = FaultyVirtualMemory(capacity_bytes=4 * LAYOUT.page_bytes)
    memory = make(vmm, worker=True, reserve_pages=8)
    try:
        wait_for(lambda: memory.ready == 3)
        assert take(memory, 4) is None
        assert len(take(memory, 3)) == 3
        memory.check_integrity()
    finally:
        memory.close()


LEFT_RUNNING = """
import atexit, logging, time

atexit.register(time.sleep, 1.5)  # runs last: a worker that ran on would meet what the others have torn down
logging.basicConfig()

from tests.unit.test_memory import FaultyVirtualMemory, make, take

class Slow(FaultyVirtualMemory):
    def release(self, handle):
        time.sleep(0.05)
        super().release(handle)

memory = make(Slow(), worker=True, idle_seconds=0)
memory.free(take(memory, 16))
memory.complete(memory.launch())
"""


def test_the_worker_ends_before_the_process_takes_the_memory_down():
    ended = subprocess.run([sys.executable, "-c", LEFT_RUNNING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def slow():
    """A driver whose next call of a kind, in the thread that makes it, does not return before `go` is set."""
    vmm, begun, go = FaultyVirtualMemory(), threading.Event(), threading.Event()

    def slow_down(call):
        original = getattr(vmm, call)

        def waits(*args):
            setattr(vmm, call, original)
            begun.set()
            assert go.wait(SECONDS)
            return original(*args)

        setattr(vmm, call, waits)

    yield vmm, slow_down, begun, go
    go.set()


def in_thread(step, *args):
    got = []
    thread = threading.Thread(target=lambda: got.append(step(*args)))
    thread.start()
    return thread, got


def test_the_last_page_is_waited_for_in_the_workers_hands(slow):
    vmm, slow_down, begun, go = slow
    memory = make(vmm, reserve_pages=16)
    take(memory, 15)
    slow_down("clear")
    worker_thread, _ = in_thread(memory.housekeep)
    assert begun.wait(SECONDS)
    taker, got = in_thread(take, memory, 1)
    taker.join(0.1)
    assert taker.is_alive(), "the page was handed out before it was there"
    go.set()
    for thread in (worker_thread, taker):
        thread.join(SECONDS)
    assert len(got[0]) == 1
    memory.check_integrity()


def test_who_goes_on_waits_for_the_frame_that_the_worker_is_giving_memory(slow):
    vmm, slow_down, begun, go = slow
    memory = make(vmm, reserve_pages=4)
    frames = take(memory, 2)
    slow_down("clear")
    worker_thread, _ = in_thread(memory.housekeep)
    assert begun.wait(SECONDS)
    taker, got = in_thread(go_on, memory, frames)
    other = take(memory, 1)
    assert len(other) == 1, "nobody else waits"
    taker.join(0.1)
    assert taker.is_alive()
    go.set()
    for thread in (worker_thread, taker):
        thread.join(SECONDS)
    assert got == [[frames[-1] + 1]], "in place, as the worker meant it to be"
    memory.check_integrity()


def test_a_side_that_comes_back_waits_for_the_worker_that_gives_it_back(slow):
    vmm, slow_down, begun, go = slow
    memory = make(vmm, sides=[LAYOUT, WINDOW], idle_seconds=0)
    frames = take(memory, 2)
    memory.let_go(1, frames)
    memory.complete(memory.launch())
    slow_down("unmap")
    worker_thread, _ = in_thread(memory.housekeep)
    assert begun.wait(SECONDS)
    mender, got = in_thread(memory.back_again, 1, frames)
    mender.join(0.1)
    assert mender.is_alive(), "the worker would unmap the new page"
    go.set()
    for thread in (worker_thread, mender):
        thread.join(SECONDS)
    assert got == [True]
    window = memory.layer_views(0, 1)[0]
    for frame in frames:
        window[frame * 8] = float(frame)
    memory.check_integrity()


def test_a_side_does_not_come_back_where_its_old_page_is_stuck():
    vmm = FaultyVirtualMemory()
    memory = make(vmm, sides=[LAYOUT, WINDOW], idle_seconds=0)
    frames = take(memory, 2)
    memory.let_go(1, frames)
    memory.complete(memory.launch())
    vmm.fail_at, vmm.fail_calls = 1, ("unmap",)
    memory.housekeep()
    assert memory.backings[1].stuck == 1
    assert not memory.back_again(1, frames)
    assert not memory.short, "the driver was not asked"
    memory.worker._again_at.clear()
    done(memory)
    assert memory.back_again(1, frames)
    memory.check_integrity()


def test_a_thread_that_polls_gives_way_to_the_worker(monkeypatch):
    """What an idle server's event loop does: it asks a socket, and others get the interpreter for moments only."""
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind("inproc://polled")
    memory = make(capacity_pages=400, max_tokens=160, num_frames=4096, worker=True, idle_seconds=0.0)
    try:
        for frames in [take(memory, 20) for _ in range(20)]:
            memory.free(frames)
            memory.complete(memory.launch())
        memory.allow(0)

        def nap(seconds):
            """Long enough for the worker to have come to something, if it has anything to do."""
            done, end = memory.backing.releases, time.monotonic() + SECONDS
            while memory.worker._working and memory.backing.releases == done and time.monotonic() < end:
                time.sleep(seconds)

        clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=time.perf_counter, sleep=nap)
        monkeypatch.setattr(worker, "time", clock)
        for _ in range(1500):
            with pytest.raises(zmq.Again):
                socket.recv(zmq.NOBLOCK)
            sum(n for n in range(10_000))
            memory.complete(memory.launch())
            memory.give_way()
            if memory.backed == 1:
                break
        assert memory.backed == 1, "only the padding page"
        memory.check_integrity()
    finally:
        memory.close()
        socket.close()


def test_the_worker_rests_while_a_graph_is_captured():
    memory = make(worker=True, reserve_pages=4)
    try:
        wait_for(lambda: memory.ready == 4)
        with memory.paused():
            take(memory, 4)
            ready = memory.ready
            time.sleep(0.1)
            assert memory.ready == ready == 0
        wait_for(lambda: memory.ready == 4)
    finally:
        memory.close()


def test_the_clock_counts_everything_once(monkeypatch):
    """Calls within calls, and what holds no lock; naps where they are taken beside something that is counted."""
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now, sleep=passes)
    memory = make(vmm := FaultyVirtualMemory())
    before = memory.clock.seconds
    for module in (memory_module, clock_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(worker, "time", clock)
    create = vmm.create
    vmm.create = lambda nbytes: passes(3.0) or create(nbytes)
    with memory.clock:
        passes(10.0)
        take(memory, 2)
        with memory.clock:
            passes(1.0)
    assert memory.clock.seconds - before == pytest.approx(17.0)
    passes(100.0)
    memory.worker._thread, memory.worker._due_at = threading.current_thread(), 0.0
    memory.give_way()  # of a thread that has nothing else to do
    assert memory.clock.seconds - before == pytest.approx(17.0)
    with memory.clock:
        memory.give_way()
    assert memory.clock.seconds - before == pytest.approx(17.0 + worker.GIVE_WAY_SECONDS)
    memory.worker._thread = None


def test_nobody_waits_for_a_worker_that_has_nothing_to_do(monkeypatch):
    memory = make()
    memory.worker._thread = threading.current_thread()
    memory.worker._wake.clear()
    try:
        slept = []
        clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=time.perf_counter, sleep=slept.append)
        monkeypatch.setattr(worker, "time", clock)
        memory.give_way()
        assert not slept
        for has_to_do in ({"_due_at": 0.0}, {"_working": True}, {"_wake": SimpleNamespace(is_set=lambda: True)}):
            with monkeypatch.context() as something:
                for name, value in has_to_do.items():
                    something.setattr(memory.worker, name, value)
                memory.give_way()
        assert slept == 3 * [worker.GIVE_WAY_SECONDS]
    finally:
        monkeypatch.undo()
        memory.worker._thread = None
        memory.close()
    without = make()
    without.worker._due_at = 0.0
    without.give_way()


@pytest.mark.parametrize("lanes", [3, 64])
def test_a_worker_and_a_scheduling_thread_race(lanes):
    """Batches run while others are made: each reads its pages again when it is done, and finds what was there."""
    rng = random.Random(lanes)
    vmm = FaultyVirtualMemory(capacity_bytes=22 * (LAYOUT.page_bytes + WINDOW.page_bytes))
    memory = make(
        vmm,
        [LAYOUT, WINDOW],
        capacity_pages=24,
        reserve_pages=4,
        idle_seconds=0.0,
        worker=True,
        num_frames=lanes * 16,
        lane_frames=16,
    )
    memory.worker.retry_seconds = 0.001
    views = [memory.layer_views(0, side)[0] for side in range(2)]
    stamps, requests, flying = {}, [], []

    def write(frames):
        for frame in frames:
            assert frame not in stamps
            stamps[frame] = float(len(stamps) + rng.randrange(1 << 20))
            for view in views:
                view[frame * 8 : frame * 8 + 8] = stamps[frame]

    def right(frames):
        return all((view[f * 8 : f * 8 + 8] == stamps[f]).all() for view in views for f in frames)

    logging.getLogger("sglang_vtensor").setLevel(logging.CRITICAL)
    try:
        for _ in range(1500):
            if requests and (len(requests) == 5 or rng.random() < 0.2):
                frames = requests.pop(rng.randrange(len(requests)))
                assert right(frames)
                memory.free(frames)
                for frame in frames:
                    del stamps[frame]
            growing = [request for request in requests if len(request) < 16 and rng.random() < 0.6]
            got = memory.allocate([Ask(request[-1], 1, own=True) for request in growing], growing=True)
            for request, more in zip(growing, got or [], strict=False):
                write(more)
                request += more
            got = memory.allocate([Ask(None, rng.randint(1, 5)) for _ in range(rng.randint(0, 2))])
            for frames in got or []:
                write(frames)
                requests.append(frames)
            flying.append((memory.launch(), [list(request) for request in requests]))
            if len(flying) > 2:
                epoch, batch = flying.pop(0)
                for frames in batch:
                    for view in views:
                        assert all(view[frame * 8].isfinite().all() for frame in frames), "it faults, or is there"
                memory.complete(epoch)
            if rng.random() < 0.02:
                memory.allow(rng.randint(4, 24))
            assert all(right(request) for request in requests)
            if rng.random() < 0.05:
                memory.check_integrity()
        memory.allow(24)
        for frames in requests:
            memory.free(frames)
        memory.complete(memory.launch())
        assert memory.worker.failures == 0
        memory.check_integrity()
    finally:
        logging.getLogger("sglang_vtensor").setLevel(logging.NOTSET)
        memory.close()
    assert vmm.created_bytes == 0


def test_statistics_are_plain_numbers():
    stats = make().stats()
    assert all(isinstance(value, int | float) for value in stats.values()), stats
    assert stats["pages_capacity"] == 16


def test_runs_of_contexts_are_told():
    memory = make()
    memory.ended(1, 1)
    memory.ended(3, 2)
    stats = memory.stats()
    assert (stats["contexts"], stats["context_runs"], stats["context_runs_most"], stats["broken_runs"]) == (2, 4, 3, 1)


# The driver fails at any call.


def moving_limits(memory):
    """What a server does while its limit goes down, to nothing, and up again; each step as often as it takes.

    Two requests share pages and write to their own; one ends, is evicted, and another takes its place.
    """

    def insist(step, *args, **kwargs):
        for _ in range(3):
            result = step(*args, **kwargs)
            if result is not None:
                return result
        raise AssertionError(f"{step.__name__} failed three times")

    def write(frames, value):
        for frame in frames:
            memory.layer_views(1)[0][frame * 8 : frame * 8 + 8] = value + frame

    def read(frames, value):
        for frame in frames:
            assert (memory.layer_views(1)[0][frame * 8 : frame * 8 + 8] == value + frame).all()

    def checked():
        done(memory)
        memory.check_integrity()

    shared = insist(take, memory, 3)
    write(shared, 0)
    owns = []
    for _ in range(2):
        (own,) = insist(memory.allocate, [Ask(shared[-1], 3)])
        owns.append(own)
        write(own, 0)
    checked()
    assert memory.allow(4) == 5
    checked()
    memory.free(owns[0])  # evicted
    checked()
    (grown,) = insist(memory.allocate, [Ask(owns[1][-1], 1, own=True)], growing=True)
    write(grown, 0)
    owns[1] += grown
    read(shared + owns[1], 0)
    memory.allow(0)
    checked()
    assert take(memory, 1) is None
    memory.free(shared + owns[1])
    checked()
    checked()
    assert memory.backed == 1, "asleep, it holds the padding page"
    memory.allow(16)
    frames = insist(take, memory, 10)
    write(frames, 100)
    read(frames, 100)
    occupy(memory, frames)
    memory.complete(memory.launch())  # what is read yet is given back for no other page
    others = insist(take, memory, 8)
    write(others, 200)
    checked()
    read(others, 200)
    leave(memory, frames)
    memory.free(others)
    checked()


def test_a_failure_at_every_call_of_the_driver_while_the_limit_moves():
    def build(vmm):
        memory = make(vmm, reserve_pages=2, idle_seconds=0.0)
        memory.worker.retry_seconds = 0.0
        return memory

    counted = FaultyVirtualMemory()
    memory = build(counted)
    moving_limits(memory)
    memory.close()
    for call in FaultyVirtualMemory.CALLS:
        assert counted.seen[call] > 4
        for at in range(2, counted.seen[call] + 1):
            vmm = FaultyVirtualMemory()
            memory = build(vmm)
            vmm.fail_calls, vmm.fail_at = (call,), at - 1
            moving_limits(memory)
            vmm.fail_at = None
            memory.close()
            assert vmm.created_bytes == 0, (call, at)


@pytest.mark.parametrize("sides", [LAYOUT, [LAYOUT, WINDOW]], ids=["one side", "two sides"])
def test_all_memory_goes_back_at_once(sides):
    memory = make(sides=sides, reserve_pages=4)
    frames = take(memory, 5)
    memory.tails.keep(frames[4], 3)
    memory.free(frames[:4])
    while memory.housekeep():
        pass
    memory.nothing_launched()
    memory.allow(0)
    assert memory.give_all_back()
    assert [backing.pages for backing in memory.backings] == [1] * len(memory.backings)
    assert not memory.housekeep(), "with an allowance of 0 nothing is created ahead"
    memory.allow(16)
    assert take(memory, 3) is not None
    memory.check_integrity()


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_page_that_the_driver_does_not_take_is_told_and_tried_again(call):
    memory = make(vmm := FaultyVirtualMemory())
    memory.free(take(memory, 4))
    memory.nothing_launched()
    memory.allow(0)
    vmm.fail_calls, vmm.fail_at = (call,), 2
    assert not memory.give_all_back()
    assert memory.backing.stuck == 1
    assert memory.backing.free == 0, "the others went"
    while memory.housekeep():
        pass
    assert memory.backing.pages == 1
    memory.check_integrity()
