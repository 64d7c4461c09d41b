"""Pages and frames of one side, with the driver's failures at every call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_vtensor.backing import Backing
from sglang_vtensor.budget import Budget
from sglang_vtensor.placement import FrameState, Placement
from sglang_vtensor.vmm import OutOfMemory, VMMError
from tests.unit.faults import FaultyVirtualMemory

SIZE, CAPACITY = 4096, 8


class Frames:
    """A backing, with owners of its frames."""

    def __init__(self, *, device_pages: int | None = None, capacity: int = CAPACITY) -> None:
        self.vmm = FaultyVirtualMemory(capacity_bytes=None if device_pages is None else device_pages * SIZE)
        self.placement = Placement(64, 8)
        self.backing = Backing(self.vmm, self.placement, SIZE, Budget(capacity * SIZE))
        self.used: set[int] = set()

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        frames = self.placement.place(after, count, own=True)
        if not self.backing.take(frames):
            self.placement.free(frames)
            return None
        self.used |= set(frames)
        for frame in frames:
            self.stamp(frame)
        return frames

    def give(self, frames: list[int], epoch: int = 0) -> None:
        self.placement.free(frames)
        self.backing.give(frames, epoch)
        self.used -= set(frames)

    def byte(self, frame: int):
        return self.vmm.tensor(self.backing.address(frame), SIZE)[:1]

    def stamp(self, frame: int) -> None:
        self.byte(frame).fill_(frame)

    def back(self, frame: int) -> bool:
        """A turn of the worker's."""
        ahead = self.backing.begin_back(frame)
        if ahead is None:
            return False
        try:
            self.backing.back(ahead)
        finally:
            self.backing.finish_back(ahead)
        return True

    def again(self) -> bool:
        """Another turn: a page that is stuck goes back."""
        leaving = self.backing.begin_again()
        if leaving is None:
            return False
        self.backing.release(leaving)
        self.backing.finish_trim(leaving, done=True)
        return True

    def check(self) -> None:
        self.placement.check_integrity()
        self.backing.check_integrity(self.used)
        assert self.vmm.created_bytes == self.backing.pages * SIZE, "a page was lost"


@pytest.fixture
def frames():
    made = Frames()
    yield made
    made.check()


def full(frames: Frames, epoch: int = 0) -> list[int]:
    """Every page is created, and free; the longest free comes first."""
    there = frames.take(CAPACITY)
    frames.give(there, epoch)
    return there


def elsewhere(frames: Frames) -> int:
    """A frame without memory, in a lane that nobody began in."""
    return next(frame for frame in range(40, 64) if not frames.backing.has_page(frame))


def test_a_page_never_looks_used_as_the_worker_gives_it_back(frames):
    """Who matches what is cached asks without the lock: what its side let go of is another one's in a moment."""
    looked = []

    class Pages(dict):
        def pop(self, frame):
            looked.append((frame, frames.backing.uses(frame)))
            return super().pop(frame)

    (frame,) = frames.take(1)
    assert frames.backing.uses(frame)
    frames.give([frame], 0)
    frames.backing._pages = Pages(frames.backing._pages)
    assert frames.backing.trim(0) == 1
    assert looked == [(frame, False)]


def test_nothing_has_memory_before_it_is_used_but_the_padding_frame(frames):
    assert frames.backing.pages == 1
    assert frames.backing.has_page(0)
    there = frames.take(3)
    assert (frames.backing.pages, frames.backing.creates) == (4, 3)
    assert all(frames.byte(frame).item() == frame for frame in there)


def test_a_frame_keeps_its_page_and_what_is_in_it(frames):
    there = frames.take(3)
    frames.give(there)
    assert (frames.backing.pages, frames.backing.free, frames.backing.used) == (4, 3, 0)
    assert frames.placement.place(None, 3) == there
    assert frames.backing.take(there)
    frames.used |= set(there)
    assert frames.backing.creates == 3
    assert all(frames.byte(frame).item() == frame for frame in there)


def test_what_is_trimmed_is_the_longest_free(frames):
    there = frames.take(6)
    for frame in there:
        frames.give([frame])
    assert frames.backing.trim(keep=2) == 4
    assert [frames.backing.has_page(frame) for frame in there] == [False] * 4 + [True] * 2
    assert (frames.backing.creates, frames.backing.releases) == (6, 4)
    assert frames.backing.trim(keep=2) == 0


def test_what_a_batch_may_read_is_not_trimmed(frames):
    there = frames.take(6)
    frames.give(there[:3], epoch=1)
    frames.give(there[3:], epoch=2)
    assert frames.backing.trim(0) == 0
    frames.backing.completed = 1
    assert frames.backing.trim(0) == 3
    frames.backing.completed = 2
    assert frames.backing.trim(0) == 3


def test_only_what_is_used_can_be_given(frames):
    (frame,) = frames.take(1)
    frames.give([frame])
    with pytest.raises(AssertionError, match=f"frame {frame} is not used"):
        frames.backing.give([frame], 0)


def test_the_capacity_bounds_the_pages(frames):
    assert frames.take(CAPACITY) is not None
    assert frames.backing.creatable == 0
    assert frames.take(1) is None
    assert frames.backing.refusal is None, "the driver was not asked"
    assert not frames.back(elsewhere(frames))


def test_pages_in_hand_are_pages(frames):
    frames.take(CAPACITY - 1)
    ahead = frames.backing.begin_back(elsewhere(frames))
    assert (frames.backing.creatable, frames.backing.in_hand) == (0, 1)
    assert frames.take(1) is None
    frames.backing.back(ahead)
    frames.backing.finish_back(ahead)
    assert frames.take(1) is not None, "it makes room for another"


def test_after_a_refusal_nobody_has_anything_and_what_was_made_stays(frames):
    frames.vmm.fail_calls, frames.vmm.fail_at = ("create",), 3
    assert frames.take(4) is None
    assert str(frames.backing.refusal).startswith("create failed with INJECTED")
    assert (frames.backing.used, frames.backing.free) == (0, 2)
    frames.check()
    assert len(frames.take(4)) == 4
    assert frames.backing.refusal is None


@pytest.mark.parametrize("call", ["create", "map", "clear"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_while_pages_are_made_leaves_no_half_page(frames, call, at):
    frames.vmm.fail_calls, frames.vmm.fail_at = (call,), at
    assert frames.take(3) is None
    assert str(frames.backing.refusal).startswith(f"{call} failed with INJECTED")
    assert (frames.backing.used, frames.backing.free, frames.backing.stuck) == (0, at - 1, 0)
    frames.check()
    assert len(frames.take(3)) == 3


def test_pages_that_cannot_be_cleared_are_none(frames):
    frames.vmm.fail_calls, frames.vmm.fail_at = ("wait_cleared",), 1
    assert frames.take(3) is None
    assert (frames.backing.used, frames.backing.free) == (0, 0)
    frames.check()
    seen = frames.vmm.seen["wait_cleared"]
    assert len(frames.take(3)) == 3
    assert frames.vmm.seen["wait_cleared"] == seen + 1, "waited for all of them at once"


@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("at", ["take", "back"])
def test_a_page_that_is_half_made_and_not_taken_back_is_stuck(frames, call, at):
    original, before = getattr(frames.vmm, call), frames.vmm.clear

    def fails(*_):
        raise VMMError(call, "injected", "INJECTED")

    setattr(frames.vmm, call, fails)
    frames.vmm.clear = fails
    if at == "take":
        assert frames.take(1) is None
    else:
        with pytest.raises(VMMError, match="INJECTED"):
            frames.back(8)
    assert frames.backing.stuck == 1
    leaving = frames.backing.begin_again()
    assert (frames.backing.stuck, frames.backing.in_hand) == (1, 1), "nobody may count on it yet"
    frames.backing.finish_trim(leaving, done=False)
    assert frames.backing.stuck == 1
    frames.check()
    setattr(frames.vmm, call, original)
    frames.vmm.clear = before
    assert frames.again()
    assert frames.backing.pages == 1
    assert frames.take(1) == [8], "its frame is as any other"


@pytest.mark.parametrize("error", [VMMError("call", "injected", "INJECTED"), RuntimeError("injected"), SystemExit()])
@pytest.mark.parametrize("call", ["create", "map", "clear", "wait_cleared"])
def test_a_page_made_ahead_that_fails_is_given_back_whatever_it_raises(frames, call, error):
    original = getattr(frames.vmm, call)

    def fails(*_):
        raise error

    setattr(frames.vmm, call, fails)
    with pytest.raises(type(error)):
        frames.back(8)
    assert frames.backing.in_hand == 0
    setattr(frames.vmm, call, original)
    frames.check()
    frames.again()
    assert (frames.backing.pages, frames.backing.stuck) == (1, 0)
    assert frames.placement.is_vacant(8)


def test_nobody_is_placed_where_memory_is_on_its_way(frames):
    ahead = frames.backing.begin_back(40)
    assert frames.placement.state(40) == FrameState.ASIDE
    frames.backing.back(ahead)
    frames.backing.finish_back(ahead)
    assert frames.placement.is_vacant(40)
    assert frames.backing.free == 1


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_page_that_the_driver_does_not_take_is_stuck_and_goes_later(frames, call):
    there = full(frames)
    frames.vmm.fail_calls, frames.vmm.fail_at = (call,), 2
    with pytest.raises(VMMError, match="INJECTED"):
        frames.backing.trim(0)
    assert (frames.backing.stuck, frames.backing.free, frames.backing.pages) == (1, CAPACITY - 2, CAPACITY)
    stuck_at = there[1]
    assert frames.placement.is_vacant(stuck_at) == (call == "release"), "it is mapped there yet"
    frames.check()
    assert len(frames.take(CAPACITY - 1)) == CAPACITY - 1
    assert frames.take(1) is None
    assert frames.again()
    assert frames.placement.is_vacant(stuck_at) or stuck_at in frames.used
    assert len(frames.take(1)) == 1


def test_a_stuck_page_waits_until_it_is_due(frames):
    full(frames)
    frames.vmm.fail_calls, frames.vmm.fail_at = ("unmap",), 1
    with pytest.raises(VMMError):
        frames.backing.trim(0)
    assert frames.backing.begin_again(lambda frame: False) is None
    assert frames.again()


def test_a_full_device_is_an_answer():
    frames = Frames(device_pages=4)
    assert frames.take(5) is None
    assert isinstance(frames.backing.refusal, OutOfMemory)
    there = frames.take(3)
    with pytest.raises(OutOfMemory):
        frames.back(elsewhere(frames))
    frames.give(there)
    frames.check()
    assert len(frames.take(2)) == 2


def test_a_page_keeps_its_frame(frames):
    there = full(frames)
    assert not frames.back(40)
    frames.placement.take([40])
    assert frames.backing.take([40]), "one is given back, and another one is created"
    frames.used.add(40)
    assert frames.backing.releases == 1
    assert not frames.backing.has_page(there[0])


def test_a_page_that_is_read_yet_is_not_given_back_for_another(frames):
    full(frames, epoch=1)
    frames.placement.take([40])
    assert not frames.backing.take([40])
    frames.placement.free([40])
    frames.backing.completed = 1
    frames.check()
    frames.placement.take([40])
    assert frames.backing.take([40])
    frames.used.add(40)


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_page_that_is_not_taken_back_makes_no_room_for_another(frames, call):
    full(frames)
    frames.vmm.fail_calls, frames.vmm.fail_at = (call,), 1
    frames.placement.take([40])
    assert not frames.backing.take([40])
    frames.placement.free([40])
    assert frames.backing.stuck == 1
    frames.check()
    assert frames.again()
    frames.check()


def test_the_newest_free_frames_are_vacant_ones(frames):
    there = full(frames)
    frames.placement.set_aside(there[-1])
    frames.placement.take([there[-2]])
    assert frames.backing.newest_vacant(3) == there[-5:-2]
    frames.placement.put_back(there[-1])
    frames.placement.free([there[-2]])


def test_close_returns_everything_used_free_or_stuck(frames):
    there = full(frames)
    frames.take(2, after=frames.take(1)[0])
    frames.placement.take([40])
    assert frames.backing.take([40])
    frames.vmm.fail_calls, frames.vmm.fail_at = ("release",), 1
    with pytest.raises(VMMError):
        frames.backing.trim(0)
    frames.backing.close()
    assert there
    assert frames.vmm.created_bytes == 0
    frames.check = SimpleNamespace
