"""The memory against a model that is plainly right: a dict of who owns what.

With two sides they share one budget: frames that need the first side only leave room for others, up to `most_frames`,
and the sum of the pages never exceeds the budget, whatever either side does. States, which requests have once, share it
too.

Every page carries a stamp in real memory, written by slot. What a batch reads is read until it ends, so an address that
was unmapped too early faults, and one that shows another page has another stamp.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_vtensor.handout import Ask
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.tails import Tail
from sglang_vtensor.vmm import Handle, VMMError
from tests.unit.faults import FaultyVirtualMemory

LOGGERS = [logging.getLogger(f"sglang_vtensor.{name}") for name in ("memory", "worker")]

SIDES = [
    KVLayout(1, 1, 64, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096),
    KVLayout(2, 1, 64, torch.float32, page_tokens=8, stride_bytes=1024, granularity=4096),
]
CAPACITY, CONTEXT_PAGES, RUNNING = 16, 8, 7
DEVICE_PAGES = 15  # fewer than the capacity: running out must be an answer
MOST_FRAMES = 24  # more than the capacity, which is counted on both sides
STATE_BYTES, STATE_SLOTS = 3 * 4096, 9


#: How often histories came to what they are for.
SEEN: Counter[str] = Counter()


@dataclass(eq=False)
class Request:
    frames: list[int]
    #: Frames from the start on that need the second side no more.
    behind: int = 0
    #: Slots of its states.
    states: list[int] = field(default_factory=list)


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        lanes=st.sampled_from([9, 16, 200]),
        sides=st.sampled_from([1, 2]),
        most=st.sampled_from([None, CAPACITY, 8]),
        states=st.booleans(),
    )
    def begin(self, lanes: int, sides: int, most: int | None, states: bool) -> None:
        for logger in LOGGERS:
            logger.setLevel(logging.CRITICAL)  # hundreds of histories fail hundreds of calls, each of which is said
        self.sides = SIDES[:sides]
        capacity_bytes = DEVICE_PAGES * sum(side.page_bytes for side in self.sides) + states * STATE_BYTES
        self.vmm = FaultyVirtualMemory(capacity_bytes=capacity_bytes)
        self.vmm.fail_calls = self.vmm.CALLS
        self.memory = KVMemory(
            self.vmm,
            self.sides,
            capacity_pages=CAPACITY,
            max_tokens=CONTEXT_PAGES * 8,
            most_frames=MOST_FRAMES if sides == 2 else None,
            most_pages={1: most} if sides == 2 and most is not None else None,
            state_bytes=STATE_BYTES if states else 0,
            state_slots=STATE_SLOTS,
            reserve_pages=2,
            idle_seconds=0.0,
            worker=False,
            num_frames=lanes * 8,
        )
        self.memory.worker.retry_seconds = 0.0
        self.keys = [self.memory.layer_views(0, side)[0] for side in range(sides)]
        self.states = None if self.memory.states is None else self.memory.states.region()
        self.state_stamps: dict[int, int] = {}  # slot -> stamp
        self.owned: dict[int, int] = {}  # frame -> stamp
        self.stamps = 0
        self.requests: list[Request] = []
        self.kept: list[tuple[Tail, int, int]] = []  # with its frame, and the stamp there
        #: Of each batch its epoch, and by side and frame what page it reads there.
        self.flying: list[tuple[int, dict[tuple[int, int], Handle | None]]] = []

    def stamp(self, frames: list[int]) -> None:
        for frame in frames:
            assert frame not in self.owned, "a frame was handed out twice"
            self.stamps += 1
            self.owned[frame] = self.stamps
            for keys in self.keys:
                keys[frame * 8] = float(self.stamps)

    def ask(self, asks: list[Ask], fail: int | None, *, growing: bool = False) -> list[list[int]] | None:
        room = max(0, self.memory.room(growing=growing))
        self.vmm.fail_at = fail
        got = self.memory.allocate(asks, growing=growing)
        self.vmm.fail_at = None
        assert got is None or sum(map(len, got)) <= room
        assert got is None or [len(frames) for frames in got] == [ask.count for ask in asks]
        for frames in got or []:
            self.stamp(frames)
        return got

    @rule(counts=st.lists(st.integers(1, CONTEXT_PAGES), min_size=1, max_size=2), fail=st.none() | st.integers(1, 6))
    def start(self, counts: list[int], fail: int | None) -> None:
        """All requests of a batch get what they ask for, or none does."""
        if len(self.requests) + len(counts) <= RUNNING:
            got = self.ask([Ask(None, count) for count in counts], fail)
            self.requests += [Request(frames) for frames in got or []]

    @rule(data=st.data(), fail=st.none() | st.integers(1, 4))
    @precondition(lambda self: 0 < len(self.requests) < RUNNING)
    def branch(self, data, fail: int | None) -> None:
        """A request begins behind a frame of another's, as one does that found it in the tree."""
        other = data.draw(st.sampled_from(self.requests))
        got = self.ask([Ask(data.draw(st.sampled_from(other.frames)), data.draw(st.integers(1, 3)))], fail)
        if got is not None:
            self.requests.append(Request(got[0]))

    @rule(data=st.data(), fail=st.none() | st.integers(1, 4))
    @precondition(lambda self: self.requests)
    def grow(self, data, fail: int | None) -> None:
        """What runs may go on beyond the allowance."""
        growing = data.draw(st.lists(st.sampled_from(self.requests), min_size=1, unique_by=id))
        growing = [request for request in growing if len(request.frames) < CONTEXT_PAGES]
        got = self.ask([Ask(request.frames[-1], 1, own=True) for request in growing], fail, growing=True)
        for request, frames in zip(growing, got or [], strict=False):
            request.frames = request.frames + frames

    @rule(data=st.data())
    @precondition(lambda self: self.requests and len(self.sides) > 1)
    def slide(self, data) -> None:
        """The window of a request moves on: what is behind it needs the first side only."""
        request = data.draw(st.sampled_from(self.requests))
        stop = data.draw(st.integers(request.behind, len(request.frames) - 1))
        self.memory.let_go(1, request.frames[request.behind : stop])
        request.behind = stop

    @rule(data=st.data(), count=st.integers(1, 3), fail=st.none() | st.integers(1, 4))
    @precondition(lambda self: self.requests and self.states is not None)
    def take_states(self, data, count: int, fail: int | None) -> None:
        """A request gets slots of states: all that it asks for, or none."""
        request = data.draw(st.sampled_from(self.requests))
        room = max(0, self.memory.states.room())
        self.vmm.fail_at = fail
        slots = self.memory.states.take(count)
        self.vmm.fail_at = None
        assert slots is None or len(set(slots)) == count <= room
        SEEN["states that found no room"] += slots is None
        for slot in slots or []:
            assert slot, "the padding slot was handed out"
            assert slot not in self.state_stamps, "a slot was handed out twice"
            self.stamps += 1
            self.state_stamps[slot] = self.stamps % 251
            self.states[slot] = self.state_stamps[slot]
        request.states += slots or []

    @rule(data=st.data())
    @precondition(lambda self: any(request.states for request in self.requests))
    def give_states(self, data) -> None:
        request = data.draw(st.sampled_from([request for request in self.requests if request.states]))
        self.give_up_states(request, data.draw(st.integers(1, len(request.states))))

    def give_up_states(self, request: Request, count: int) -> None:
        given, request.states = request.states[:count], request.states[count:]
        if given:
            self.memory.states.give(given)
        for slot in given:
            del self.state_stamps[slot]

    def page(self, side: int, frame: int) -> Handle | None:
        """What is mapped at a frame."""
        return self.memory.stores[side]._pages.get(frame)

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def launch(self, data) -> None:
        """A batch of some requests reads what they have, until it is done."""
        batch = data.draw(st.lists(st.sampled_from(self.requests), min_size=1, unique_by=id))
        reads = {
            (side, frame): self.page(side, frame)
            for request in batch
            for side in range(len(self.sides))
            for frame in (request.frames[request.behind :] if side else request.frames)
        }
        side = len(self.sides)
        reads |= {(side, slot): self.page(side, slot) for request in batch for slot in request.states}
        self.flying.append((self.memory.launch(), reads))

    @rule()
    @precondition(lambda self: self.flying)
    def complete(self) -> None:
        """The oldest batch ends. Until here it could read what it was launched on."""
        epoch, reads = self.flying.pop(0)
        for side, frame in reads:  # faults if anything was unmapped
            if side < len(self.sides):
                self.keys[side][frame * 8 : frame * 8 + 8].sum()
            else:
                self.states[frame].sum()
        self.memory.complete(epoch)

    def give_up(self, frames: list[int]) -> None:
        self.memory.free(frames)
        for frame in frames:
            del self.owned[frame]

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def finish(self, data) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.give_up(request.frames)
        self.give_up_states(request, len(request.states))

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def keep(self, data) -> None:
        """A request ends, and the page it did not fill is kept."""
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        frame = request.frames.pop()
        self.give_up(request.frames)
        self.give_up_states(request, len(request.states))
        self.kept.append((self.memory.tails.keep(frame, 3), frame, self.owned.pop(frame)))

    @rule(data=st.data(), back=st.booleans())
    @precondition(lambda self: self.kept)
    def claim(self, data, back: bool) -> None:
        """Whoever continues it finds it as it was, or not at all."""
        entry = data.draw(st.sampled_from(self.kept))
        tail, was, stamp = entry
        self.kept.remove(entry)
        there = tail.frame is not None
        frame = self.memory.tails.claim(tail)
        assert (frame is not None) == there
        if frame is None:
            self.memory.tails.forget(tail)
            return
        assert frame == was
        assert all(keys[frame * 8, 0, 0].item() == stamp for keys in self.keys)
        if back:
            self.memory.tails.unclaim(tail, frame)
            self.kept.append(entry)
        elif len(self.requests) < RUNNING:
            self.owned[frame] = stamp
            self.requests.append(Request([frame]))
        else:
            self.memory.free([frame])

    @rule(fail=st.none() | st.integers(1, 3), turns=st.integers(1, 6))
    def housekeep(self, fail: int | None, turns: int) -> None:
        """The worker's part, in which any call of the driver may fail."""
        self.vmm.fail_at = fail
        for _ in range(turns):
            self.memory.housekeep()
        self.vmm.fail_at = None

    @rule()
    @precondition(lambda self: self.memory.short)
    def recover(self) -> None:
        """The driver gives again. If it has room for a page of any kind more, it is soon known that it does."""
        for _ in range(4 * CAPACITY):
            self.memory.housekeep()
        largest = max(store.page_bytes for store in self.memory.stores)
        room = min(self.memory.room_bytes(), self.memory.allowed_bytes - self.memory.budget.taken)
        possible = (
            self.vmm.memory()[0] >= largest
            and self.memory.available_pages() > 0
            and (self.memory.states is None or self.memory.states.left > 0)
            and all(side.most is None or side.held < side.most for side in self.memory.backings)
            and not self.kept
            and room >= self.memory.page_bytes + largest
        )
        SEEN["it is known that the driver gives again"] += possible
        assert not (possible and self.memory.short)

    @rule(fail=st.none() | st.integers(1, 3))
    def trim(self, fail: int | None) -> None:
        self.vmm.fail_at = fail
        with contextlib.suppress(VMMError):
            self.memory.trim()
        self.vmm.fail_at = None

    @rule(limit=st.integers(1, CAPACITY))
    def set_limit(self, limit: int) -> None:
        self.memory.allow(limit)

    @rule(tokens=st.integers(1, 8), data=st.data())
    @precondition(lambda self: len(self.owned) > 1)
    def copy(self, tokens: int, data) -> None:
        source, target = data.draw(st.permutations(sorted(self.owned)))[:2]
        in_use = [request for request in self.requests if {source, target} & set(request.frames[: request.behind])]
        if in_use:
            return
        self.memory.copy_tokens(source, target, tokens)
        for keys in self.keys:
            assert keys[target * 8, 0, 0].item() == self.owned[source]
            keys[target * 8] = float(self.owned[target])

    def needed(self) -> list[int]:
        """Pages of each side that requests need."""
        return [
            sum(len(request.frames) - (request.behind if side else 0) for request in self.requests)
            for side in range(len(self.sides))
        ]

    def padding(self) -> int:
        """Bytes of the padding pages."""
        return sum(store.page_bytes for store in self.memory.stores)

    @invariant()
    def one_budget(self) -> None:
        """What requests need is used, with what is kept, and nothing else; what all pages take is within the budget,
        and where there is room, there is room for what requests have and for that."""
        kept = sum(tail.frame is not None for tail, _, _ in self.kept)
        assert [backing.used for backing in self.memory.backings] == [pages + kept for pages in self.needed()]
        page_bytes = [side.page_bytes for side in self.sides]
        needed = sum(pages * size for pages, size in zip(self.needed(), page_bytes, strict=True))
        if self.states is not None:
            assert self.memory.states.owned == self.memory.states.backing.used == len(self.state_stamps)
            needed += len(self.state_stamps) * STATE_BYTES
        assert self.memory.needed_bytes == needed
        assert self.vmm.created_bytes - self.padding() <= CAPACITY * sum(page_bytes)
        room = self.memory.room(growing=True)
        SEEN["more frames than there is memory for on both sides"] += self.memory.owned > CAPACITY
        SEEN["a side at its bound"] += any(backing.held == backing.most for backing in self.memory.backings)
        assert needed + room * sum(page_bytes) <= CAPACITY * sum(page_bytes)
        assert self.memory.owned + room <= self.memory.limit
        for pages, backing in zip(self.needed(), self.memory.backings, strict=True):
            assert backing.most is None or pages + room <= backing.most

    @invariant()
    def sums_agree(self) -> None:
        self.memory.check_integrity()
        assert self.memory.owned == len(self.owned)
        backed = sum(store.pages * store.page_bytes for store in self.memory.stores)
        assert self.vmm.created_bytes == backed == self.memory.backed_bytes
        assert len(self.memory.tails) == sum(tail.frame is not None for tail, _, _ in self.kept)

    @invariant()
    def what_flies_is_there(self) -> None:
        """A batch in flight reads the pages that it was launched on; and their memory is theirs yet."""
        for _, reads in self.flying:
            for (side, frame), page in reads.items():
                assert page is not None
                assert self.page(side, frame) == page, "changed under a batch in flight"
                assert page in self.vmm._sizes, "released under a batch in flight"

    @invariant()
    def no_page_lost_its_bytes(self) -> None:
        for request in self.requests:
            for side, keys in enumerate(self.keys):
                for frame in request.frames[request.behind :] if side else request.frames:
                    assert keys[frame * 8, 0, 0].item() == self.owned[frame]
        for slot, stamp in self.state_stamps.items():
            assert self.states[slot, 0] == self.states[slot, -1] == stamp

    def teardown(self) -> None:
        for logger in LOGGERS:
            logger.setLevel(logging.NOTSET)
        for tail, _, _ in self.kept:
            self.memory.tails.forget(tail)
        for request in self.requests:
            self.give_up(request.frames)
            self.give_up_states(request, len(request.states))
        self.memory.complete(self.memory.launch())
        self.memory.reserve_pages = 0
        self.memory.chores._device_low = False
        while self.memory.housekeep():
            pass
        assert self.memory.owned == 0
        assert all(store.pages == 1 for store in self.memory.stores)
        self.memory.close()
        assert self.vmm.created_bytes == 0


MemoryMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestMemory = MemoryMachine.TestCase


class Draws:
    """Draws for rules that ask for data, from a generator: `st.data()` of long and busy histories."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def draw(self, strategy: st.SearchStrategy) -> Any:
        strategy = getattr(strategy, "wrapped_strategy", strategy)
        if hasattr(strategy, "elements"):
            return self.rng.choice(strategy.elements)
        if hasattr(strategy, "values"):  # permutations
            return self.rng.sample(strategy.values, len(strategy.values))
        if hasattr(strategy, "element_strategy"):
            values = getattr(strategy.element_strategy, "wrapped_strategy", strategy.element_strategy).elements
            return self.rng.sample(values, self.rng.randint(1, len(values)))
        return self.rng.randint(strategy.start, strategy.end)


def busy_history(rng: random.Random) -> None:
    """A long history in which batches fly for long, and the worker and the driver's failures come in between."""
    machine, data = MemoryMachine(), Draws(rng)
    machine.begin(rng.choice([9, 16, 200]), rng.choice([1, 2]), rng.choice([None, CAPACITY, 8]), rng.random() < 0.3)

    def fail() -> int | None:
        return rng.randint(1, 6) if rng.random() < 0.15 else None

    steps = {
        lambda: machine.start([rng.randint(1, CONTEXT_PAGES) for _ in range(rng.randint(1, 2))], fail()): (6, True),
        lambda: machine.branch(data, fail()): (3, lambda: 0 < len(machine.requests) < RUNNING),
        lambda: machine.grow(data, fail()): (6, lambda: machine.requests),
        lambda: machine.slide(data): (8, lambda: machine.requests and len(machine.sides) > 1),
        lambda: machine.take_states(data, rng.randint(1, 3), fail()): (
            4,
            lambda: machine.requests and machine.states is not None,
        ),
        lambda: machine.give_states(data): (3, lambda: any(request.states for request in machine.requests)),
        lambda: machine.launch(data): (8, lambda: machine.requests and len(machine.flying) < 4),
        lambda: machine.complete(): (4, lambda: machine.flying),
        lambda: machine.finish(data): (2, lambda: machine.requests),
        lambda: machine.keep(data): (2, lambda: machine.requests),
        lambda: machine.claim(data, rng.random() < 0.3): (2, lambda: machine.kept),
        lambda: machine.housekeep(fail(), rng.randint(1, 12)): (5, True),
        lambda: machine.trim(fail()): (1, True),
        machine.recover: (3, lambda: machine.memory.short),
        lambda: machine.set_limit(rng.choice([CAPACITY, CAPACITY, rng.randint(1, CAPACITY)])): (2, True),
        lambda: machine.copy(rng.randint(1, 8), data): (1, lambda: len(machine.owned) > 1),
    }
    for _ in range(60):
        able = [(step, weight) for step, (weight, possible) in steps.items() if possible is True or possible()]
        rng.choices([step for step, _ in able], [weight for _, weight in able])[0]()
        machine.sums_agree()
        machine.one_budget()
        machine.what_flies_is_there()
        machine.no_page_lost_its_bytes()
    machine.teardown()


def test_busy_histories():
    SEEN.clear()
    for seed in range(400):
        try:
            busy_history(random.Random(seed))
        except BaseException:
            print(f"the history of seed {seed} fails")
            raise
    print(f"seen: {dict(SEEN)}")
    assert all(SEEN[what] > 50 for what in SEEN), SEEN
