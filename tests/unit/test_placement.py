"""Who gets which frames: in place where that can be, whole lanes first, halves of what was unused the longest next."""

from __future__ import annotations

import pytest

from sglang_vtensor.placement import LEAD, FrameState, Placement, lane_frames_for, runs_of

LANE = 8


@pytest.fixture
def placement():
    """Four lanes; the first frame of the first one is the padding frame."""
    made = Placement(4 * LANE, LANE)
    yield made
    made.check_integrity()


def runs(frames):
    return list(runs_of(frames))


def test_runs_are_what_follows_one_another():
    assert runs([]) == []
    assert runs([4, 5, 6, 9, 10, 3]) == [(4, 3), (9, 2), (3, 1)]
    assert runs([0, 0]) == [(0, 1), (0, 1)]


def test_a_lane_is_a_power_of_two():
    assert [lane_frames_for(frames) for frames in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("frames", "lane"), [(24, 6), (20, 8), (1, 1)])
def test_impossible_sizes_are_refused(frames, lane):
    with pytest.raises(ValueError, match=f"{frames} frames in lanes of {lane}: a power of two"):
        Placement(frames, lane)


def test_the_padding_frame_is_nobodys(placement):
    assert placement.owned == 0
    assert placement.state(0) == FrameState.OWNED
    taken = placement.place(None, placement.num_frames - 1)
    assert sorted(taken) == list(range(1, placement.num_frames))
    assert placement.place(None, 1) is None
    with pytest.raises(ValueError, match="frame 0: one between 1 and 31 wanted"):
        placement.free([0])


@pytest.mark.parametrize("frame", [-1, 4 * LANE])
def test_frames_that_there_are_not_are_refused(placement, frame):
    with pytest.raises(ValueError, match=f"frame {frame}: one between"):
        placement.free([frame])


def test_each_step_asks_for_the_state_that_it_needs(placement):
    (frame,) = placement.place(None, 1)
    with pytest.raises(ValueError, match="is OWNED: KEPT wanted"):
        placement.claim(frame)
    with pytest.raises(ValueError, match="is OWNED: VACANT wanted"):
        placement.take([frame])
    placement.keep(frame)
    with pytest.raises(ValueError, match="is KEPT: OWNED wanted"):
        placement.free([frame])
    placement.forget(frame)
    for step in (placement.keep, placement.claim, placement.forget, lambda frame: placement.free([frame])):
        with pytest.raises(ValueError, match="is VACANT"):
            step(frame)


def test_more_than_there_is_is_refused_and_changes_nothing(placement):
    before = placement.place(None, 20)
    assert placement.place(None, 12) is None
    assert placement.owned_frames() == sorted(before)
    assert len(placement.place(None, 11)) == 11


def test_each_request_begins_in_a_lane_of_its_own(placement):
    one, other = placement.place(None, 2), placement.place(None, 2)
    assert runs(one) == [(LANE, 2)]
    assert runs(other) == [(2 * LANE, 2)]


def test_a_continuing_request_goes_on_in_place(placement):
    frames = placement.place(None, 3)
    placement.place(None, 1)  # in the next lane
    for _ in range(LANE - 3):
        frames += placement.place(frames[-1], 1, own=True)
    assert runs(frames) == [(frames[0], LANE)]
    frames += placement.place(frames[-1], 2, own=True)
    assert len(runs(frames)) == 2, "a lane is as long as it is"
    assert placement.extent_of(frames[-1]) is not placement.extent_of(frames[0])


def test_the_first_one_behind_a_shared_start_goes_on_there_and_a_branch_begins_its_own(placement):
    system = placement.place(None, 2)
    first, branch = placement.place(system[-1], 2), placement.place(system[-1], 2)
    assert runs(system + first) == [(system[0], 4)]
    assert len(runs(system + branch)) == 2
    assert placement.extent_of(branch[0]).start == branch[0]
    placement.free(first)
    assert placement.place(system[-1], 1) == first[:1], "the next new one takes the place of one that was evicted"


def test_what_does_not_fit_behind_a_shared_start_is_one_run_elsewhere(placement):
    system = placement.place(None, 6)
    branch = placement.place(system[-1], 4)
    assert len(runs(branch)) == 1
    assert branch[0] != system[-1] + 1


def test_what_does_not_fit_behind_ones_own_takes_what_there_is(placement):
    frames = placement.place(None, 6)
    placement.place(None, 1)  # in the next lane
    frames += placement.place(frames[-1], 4, own=True)
    assert [count for _, count in runs(frames)] == [8, 2]


def test_nobody_goes_on_where_somebody_is(placement):
    system = placement.place(None, 2)
    first = placement.place(system[-1], 1)
    assert placement.room_behind(system[-1]) is None
    assert placement.room_behind(first[-1]) == first[-1] + 1
    grown = placement.place(system[-1], 1, own=True)
    assert grown[0] != system[-1] + 1


def test_the_end_of_an_extent_is_no_place_to_go_on(placement):
    frames = placement.place(None, LANE)
    assert placement.is_vacant(frames[-1] + 1)
    assert placement.room_behind(frames[-1]) is None


def test_the_lane_that_was_freed_last_is_the_next(placement):
    one, other = placement.place(None, 2), placement.place(None, 3)
    placement.free(one)
    placement.free(other)
    assert placement.place(None, 2) == other[:2], "it may still have memory, as a new one has not"
    assert placement.place(None, 2) == one


def test_an_extent_is_live_as_long_as_a_frame_of_it_is_kept(placement):
    one = placement.place(None, 3)
    placement.keep(one[2])
    placement.free(one[:2])
    assert placement.place(None, 2)[0] not in one
    placement.forget(one[2])
    assert placement.place(None, 3) == one


def test_a_kept_frame_is_claimed_as_it_is(placement):
    (frame,) = placement.place(None, 1)
    placement.keep(frame)
    assert (placement.owned, placement.kept) == (0, 1)
    placement.claim(frame)
    assert (placement.owned, placement.kept) == (1, 0)


def lanes_in_use(placement):
    """A request of two frames in each lane; beside the padding frame's, which is the longest unused."""
    return [placement.place(None, 2) for _ in range(3)]


def test_the_longest_unused_extents_are_halved_first_and_from_behind(placement):
    one, two, three = lanes_in_use(placement)
    two += placement.place(two[-1], 1, own=True)
    assert placement.place(None, 1) == [4], "behind the padding frame"
    assert placement.place(None, 1) == [one[0] + 4]
    assert placement.place(None, 1) == [three[0] + 4]
    assert placement.place(None, 1) == [two[0] + 4]
    assert placement.halved == 4
    assert runs(one + placement.place(one[-1], 2, own=True)) == [(one[0], 4)], "what is left of it is its own"


def test_an_extent_in_use_is_halved_only_for_more_than_is_free(placement):
    lanes_in_use(placement)
    first = placement.place(None, 1)
    placement.free(first)
    assert placement.place(None, 1) == first
    assert placement.halved == 1


def test_halves_grow_together_again(placement):
    lanes = lanes_in_use(placement)
    halves = [placement.place(None, 1) for _ in range(4)]
    quarter = placement.place(None, 1)
    for frames in (halves[1], lanes[0], quarter, halves[2], lanes[1], lanes[2], halves[0], halves[3]):
        placement.free(frames)
        placement.check_integrity()
    assert [placement.extent_of(lane * LANE).size for lane in range(1, 4)] == [LANE] * 3
    assert all(len(runs(placement.place(None, LANE))) == 1 for _ in range(3))


def test_a_half_that_is_used_grows_together_with_nothing(placement):
    (one, *_) = lanes_in_use(placement)
    placement.place(None, 1)
    half = placement.place(None, 1)
    placement.free(one)
    assert placement.extent_of(one[0]).size == LANE // 2
    placement.free(half)
    assert placement.extent_of(one[0]).size == LANE


def test_frames_are_broken_up_only_where_nothing_else_is_to_be_had(placement):
    placement.place(None, 3)
    lanes = [placement.place(None, LANE) for _ in range(2)]
    assert placement.place(4, 3, own=True) is not None
    for lane in lanes:
        placement.free(lane[1::2])
    vacant = placement.count(FrameState.VACANT)
    frames = placement.place(None, vacant)
    assert len(frames) == vacant
    assert len(runs(frames)) > len(lanes)


def test_nobody_is_placed_at_a_frame_aside(placement):
    placement.set_aside(LANE)
    placement.set_aside(LANE)
    assert placement.place(None, 1) == [2 * LANE], "a run begins with the first frame of an extent"
    placement.put_back(LANE)
    assert placement.state(LANE) == FrameState.ASIDE, "once for each side"
    placement.put_back(LANE)
    assert placement.place(None, 1) == [LANE]


def test_an_owner_stays_at_a_frame_that_is_set_aside(placement):
    (frame,) = placement.place(None, 1)
    placement.set_aside(frame)
    assert placement.state(frame) == FrameState.OWNED
    placement.free([frame])
    assert placement.state(frame) == FrameState.ASIDE
    placement.put_back(frame)
    assert placement.is_vacant(frame)


def test_who_goes_on_does_not_go_on_into_a_frame_aside(placement):
    frames = placement.place(None, 2)
    placement.set_aside(frames[-1] + 1)
    assert placement.room_behind(frames[-1]) is None
    assert placement.place(frames[-1], 1, own=True)[0] != frames[-1] + 1


def test_an_extent_that_could_not_be_halved_for_a_frame_aside_can_be_later(placement):
    placement.set_aside(6)  # until some batch is done
    lanes_in_use(placement)
    assert placement.place(None, 1) != [4]
    placement.put_back(6)
    assert placement.place(None, 1) == [4]


def test_memory_is_put_where_requests_begin_next():
    placement = Placement(4 * 16, 16)
    lane = placement.place(None, 2)
    placement.free(lane)
    wanted = []
    while (frame := placement.next_without(wanted.__contains__)) is not None:
        wanted.append(frame)
    assert wanted[:LEAD] == list(range(lane[0], lane[0] + LEAD)), "the lane that is the next"
    assert placement.place(None, 3) == wanted[:3]
    assert len(wanted) == 3 * LEAD
    placement.check_integrity()
