"""Placement against a model that is plainly right: a dict of who has which frame. With many addresses and with so few
that they are always short."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_vtensor.placement import Placement, runs_of


class PlacementMachine(RuleBasedStateMachine):
    @initialize(lanes=st.sampled_from([2, 3, 8, 64]), lane=st.sampled_from([1, 2, 8, 16]))
    def begin(self, lanes: int, lane: int) -> None:
        self.placement = Placement(lanes * lane, lane)
        self.owner: dict[int, int] = {}  # frame -> request
        self.requests: dict[int, list[int]] = {}  # its own frames, in the order of its tokens
        self.kept: set[int] = set()
        self.aside: list[int] = []
        self.started = 0

    def vacant(self) -> int:
        return self.placement.num_frames - 1 - len(self.owner) - len(self.kept) - len(set(self.aside) - self.taken())

    def taken(self) -> set[int]:
        return set(self.owner) | self.kept

    def got(self, request: int, frames: list[int], *, claimed: bool = False) -> None:
        assert not set(frames) & (self.taken() | {0}), "somebody has it"
        assert claimed or not set(frames) & set(self.aside), "it is not to be handed out"
        assert len(set(frames)) == len(frames)
        self.owner |= dict.fromkeys(frames, request)
        self.requests.setdefault(request, []).extend(frames)

    @rule(count=st.integers(1, 12), data=st.data())
    def start(self, count: int, data) -> None:
        """A request begins, with nothing before it, or behind a frame that another one owns."""
        after = data.draw(st.sampled_from([None, *self.owner]))
        room = self.vacant()
        frames = self.placement.place(after, count)
        assert (frames is None) == (room < count)
        if frames is not None:
            self.started += 1
            self.got(self.started, frames)

    @rule(count=st.integers(1, 4), data=st.data())
    @precondition(lambda self: self.requests)
    def grow(self, count: int, data) -> None:
        """A request goes on in place wherever that is vacant."""
        request = data.draw(st.sampled_from([*self.requests]))
        last = self.requests[request][-1]
        behind = self.placement.room_behind(last)
        room = self.vacant()
        frames = self.placement.place(last, count, own=True)
        assert (frames is None) == (room < count)
        if frames is None:
            return
        if behind is not None:
            assert frames[0] == behind == last + 1
        self.got(request, frames)

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def end(self, data) -> None:
        request = data.draw(st.sampled_from([*self.requests]))
        frames = self.requests.pop(request)
        self.placement.free(frames)
        for frame in frames:
            del self.owner[frame]

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def keep(self, data) -> None:
        request = data.draw(st.sampled_from([*self.requests]))
        frame = self.requests[request].pop()
        if not self.requests[request]:
            del self.requests[request]
        del self.owner[frame]
        self.placement.keep(frame)
        self.kept.add(frame)

    @rule(data=st.data(), claim=st.booleans())
    @precondition(lambda self: self.kept)
    def want_or_forget(self, data, claim: bool) -> None:
        frame = data.draw(st.sampled_from(sorted(self.kept)))
        self.kept.remove(frame)
        if claim:
            self.placement.claim(frame)
            self.started += 1
            self.got(self.started, [frame], claimed=True)
        else:
            self.placement.forget(frame)

    @rule(data=st.data())
    def set_aside(self, data) -> None:
        frame = data.draw(st.integers(1, self.placement.num_frames - 1))
        self.placement.set_aside(frame)
        self.aside.append(frame)

    @rule(data=st.data())
    @precondition(lambda self: self.aside)
    def put_back(self, data) -> None:
        frame = data.draw(st.sampled_from(self.aside))
        self.aside.remove(frame)
        self.placement.put_back(frame)

    @rule(data=st.data())
    def take(self, data) -> None:
        frame = data.draw(st.integers(1, self.placement.num_frames - 1))
        if frame in self.taken() or frame in self.aside:
            return
        self.placement.take([frame])
        self.started += 1
        self.got(self.started, [frame])

    @rule(data=st.data())
    def look_ahead(self, data) -> None:
        """Where memory is put ahead of need nobody is."""
        with_memory = data.draw(st.frozensets(st.integers(0, self.placement.num_frames - 1)))
        frame = self.placement.next_without(with_memory.__contains__)
        assert frame is None or (self.placement.is_vacant(frame) and frame not in with_memory)

    @invariant()
    def sums_agree(self) -> None:
        self.placement.check_integrity()
        assert self.placement.owned == len(self.owner)
        assert self.placement.kept == len(self.kept)
        assert self.placement.owned_frames() == sorted(self.owner)
        for frames in self.requests.values():
            runs = list(runs_of(frames))
            assert [first + n for first, count in runs for n in range(count)] == frames
            assert all(a[0] + a[1] != b[0] for a, b in pairwise(runs))

    def teardown(self) -> None:
        for request in [*self.requests]:
            self.placement.free(self.requests.pop(request))
        for frame in self.kept:
            self.placement.forget(frame)
        for frame in self.aside:
            self.placement.put_back(frame)
        self.placement.check_integrity()
        lanes = self.placement.num_frames // self.placement.lane_frames
        # All halves have grown together again: as many whole lanes as there are, but for the padding frame's.
        if lanes > 1 and self.placement.lane_frames > 1:
            for _ in range(lanes - 1):
                frames = self.placement.place(None, self.placement.lane_frames)
                assert frames is not None
                assert len(list(runs_of(frames))) == 1


PlacementMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestPlacement = PlacementMachine.TestCase
