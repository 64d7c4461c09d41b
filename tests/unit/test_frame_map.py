"""The map of frames: runs, owners, sides; and the samples of the last minutes."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_vtensor import frame_map, history
from sglang_vtensor.frame_map import FIRST_OWNER, FREE, KEPT, PADDING, STUCK
from sglang_vtensor.handout import Ask
from sglang_vtensor.history import History
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.vmm.host import HostVirtualMemory


def make(capacity=24, sides=1):
    layout = KVLayout(1, 8, 64, torch.float32, 8, stride_bytes=4096, granularity=4096)
    return KVMemory(
        HostVirtualMemory(), [layout] * sides, capacity_pages=capacity, max_tokens=64, worker=False, num_frames=96
    )


@pytest.fixture
def memory():
    memory = make()
    yield memory
    memory.close()


def owners_of(drawn):
    """The owner of each frame."""
    return {
        first + n: owner
        for first, count, owner in zip(drawn["first"], drawn["count"], drawn["owner"], strict=True)
        for n in range(count)
    }


def drawn_map(memory, owners):
    with memory.held_still():
        return frame_map.frame_map(memory, owners)


def test_each_frame_with_memory_has_its_owner(memory):
    one, two = memory.allocate([Ask(None, 3), Ask(None, 2)])
    (gone,) = memory.allocate([Ask(None, 2)])
    (kept,) = memory.allocate([Ask(None, 1)])
    memory.free(gone)
    memory.tails.keep(kept[0], 5)
    drawn = drawn_map(memory, [one, two])
    expected = dict.fromkeys(one, FIRST_OWNER) | dict.fromkeys(two, FIRST_OWNER + 1) | {0: PADDING}
    expected |= dict.fromkeys(gone, FREE) | {kept[0]: KEPT}
    assert owners_of(drawn) == expected
    assert sum(drawn["count"]) == memory.backed
    assert drawn["first"] == sorted(drawn["first"])
    assert (drawn["frames"], drawn["sides"]) == (96, [])


def test_a_run_ends_where_its_owner_does(memory):
    (frames,) = memory.allocate([Ask(None, 4)])
    drawn = drawn_map(memory, [frames[:2], frames[2:]])
    assert drawn["count"] == [1, 2, 2]
    assert drawn["owner"] == [PADDING, FIRST_OWNER, FIRST_OWNER + 1]


def test_frames_that_go_down_are_runs_of_their_own(memory):
    (frames,) = memory.allocate([Ask(None, 3)])
    assert drawn_map(memory, [frames[::-1]])["first"] == [0, *frames]


def test_a_page_that_the_driver_did_not_take_back_is_stuck(memory, monkeypatch):
    (frames,) = memory.allocate([Ask(None, 1)])
    memory.free(frames)
    memory.nothing_launched()
    backing = memory.backing
    leaving = backing.begin_trim(0)
    backing.finish_trim(leaving, done=False)
    assert owners_of(drawn_map(memory, [])) == {0: PADDING, frames[0]: STUCK}


def test_a_side_has_its_own_frames_with_memory():
    memory = make(sides=2)
    (frames,) = memory.allocate([Ask(None, 6)])
    memory.let_go(1, frames[:2])
    memory.nothing_launched()
    memory.backings[1].trim(0)
    drawn = drawn_map(memory, [frames])
    assert drawn["sides"] == [[0, 1, frames[2], 4]]
    assert drawn["count"] == [1, 6]
    memory.close()


def test_a_memory_with_too_many_pages_has_no_map(memory, monkeypatch):
    monkeypatch.setattr(frame_map, "MOST_PAGES", 3)
    memory.allocate([Ask(None, 3)])
    assert drawn_map(memory, []) is None


def test_random_histories_agree_with_a_loop(memory):
    chance, held = random.Random(3), []
    for _ in range(200):
        if held and chance.random() < 0.45:
            memory.free(held.pop(chance.randrange(len(held))))
        elif (placed := memory.allocate([Ask(None, chance.randint(1, 5))])) is not None:
            held += placed
        expected = {0: PADDING} | dict.fromkeys(memory.backing.free_frames(), FREE)
        for number, frames in enumerate(held):
            expected |= dict.fromkeys(frames, FIRST_OWNER + number)
        assert owners_of(drawn_map(memory, held)) == expected


def test_a_history_has_a_sample_every_two_seconds(monkeypatch):
    now, values = [100.0], iter(range(10**6))
    monkeypatch.setattr(history.time, "monotonic", lambda: now[0])
    lines = History(["a", "b"], lambda: (next(values), 7))
    assert lines.columns() == {"age": [], "a": [], "b": []}
    for _ in range(5):
        lines.sample()
        now[0] += 1.0
    assert lines.columns() == {"age": [5.0, 3.0, 1.0], "a": [0, 1, 2], "b": [7, 7, 7]}
    for _ in range(1000):
        lines.sample()
        now[0] += 2.0
    columns = lines.columns()
    assert len(columns["age"]) == 300
    assert max(columns["age"]) <= history.SPAN_SECONDS
    now[0] += 590
    assert len(lines.columns()["age"]) == 5, "older ones are not told"
