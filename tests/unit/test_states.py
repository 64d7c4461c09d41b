"""States: where their parts lie, and slots in the budget of all pages."""

from __future__ import annotations

import pytest
import torch

from sglang_vtensor.states import StateLayout
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_memory import done, make, take

STATE = StateLayout(3, (2, 5, 7), torch.float32, ((4, 3), (6, 1)), torch.bfloat16, 4096)


def with_states(vmm=None, **kwargs):
    return make(vmm, **({"state_bytes": STATE.page_bytes, "state_slots": 9} | kwargs))


def test_a_state_is_whole_granules():
    assert STATE.state_bytes == 3 * (70 * 4 + 18 * 2) == 948
    assert STATE.page_bytes == 4096
    assert StateLayout(40, (8, 16), torch.float32, ((4, 3),), torch.float32, 4096).page_bytes == 24576


def test_no_two_elements_of_the_views_share_bytes():
    """Each view is written with numbers of its own, slot by slot; and all of them are read back."""
    region = torch.zeros(4, STATE.page_bytes, dtype=torch.uint8)
    conv, temporal = STATE.views(region)
    assert [tuple(view.shape) for view in conv] == [(3, 4, 4, 3), (3, 4, 6, 1)]
    assert tuple(temporal.shape) == (3, 4, 2, 5, 7)
    assert temporal[1, 2].is_contiguous()
    assert all(view[2, 1].is_contiguous() for view in conv)
    wanted = []
    for number, view in enumerate([temporal, *conv]):
        values = torch.randint(-120, 120, view.shape, generator=torch.Generator().manual_seed(number)).to(view.dtype)
        view.copy_(values)
        wanted.append(values)
    assert all(torch.equal(view, values) for view, values in zip([temporal, *conv], wanted, strict=True))
    before = [view.clone() for view in (temporal, *conv)]
    region[1] = 0
    for view, was in zip((temporal, *conv), before, strict=True):
        assert not view[:, 1].any()
        assert torch.equal(view[:, 2:], was[:, 2:]), "a slot's bytes are its own"
        assert torch.equal(view[:, 0], was[:, 0])


def test_slots_have_memory_while_they_are_owned_and_until_it_is_needed():
    memory = with_states(capacity_pages=4)  # of 4,096 bytes, as many as a state
    states = memory.states
    region = states.region()
    slots = states.take(3)
    assert 0 not in slots
    assert states.room() == memory.room() == 1
    region[slots[0]] = 7
    assert states.take(2) is None
    states.give(slots[:2])
    assert states.take(1) == [slots[1]], "the one that was given up last"
    states.give([slots[1]])
    assert region[slots[0], -1] == 7, "it stays where it is while nobody needs it"
    memory.complete(memory.launch())
    assert take(memory, 3) is not None, "in the bytes of the free ones"
    memory.check_integrity()
    stats = memory.stats()
    assert (stats["states_owned"], stats["states_owned_bytes"]) == (1, STATE.page_bytes)


def test_a_batch_in_flight_keeps_the_page_of_a_slot():
    memory = with_states(capacity_pages=2)
    slots = memory.states.take(2)
    memory.launch()
    memory.states.give(slots)
    assert take(memory, 1) is None, "the page is read yet"
    memory.complete(memory.launch())
    assert take(memory, 1) is not None
    assert memory.states.backing.pages == 2, "one of them, and the padding page"


def test_kept_pages_go_for_states():
    memory = with_states(capacity_pages=2)
    tail = memory.tails.keep(take(memory, 1)[0], 3)
    assert memory.states.take(1) is not None
    assert tail.frame is not None
    assert memory.states.take(1) is None, "a batch may read it yet"
    assert tail.frame is None
    memory.complete(memory.launch())
    assert memory.states.take(1) is not None


def test_what_the_driver_refuses_no_slot_has():
    vmm = FaultyVirtualMemory()
    memory = with_states(vmm)
    vmm.fail_calls, vmm.fail_at = ("create",), 2
    assert memory.states.take(3) is None
    assert memory.short
    assert memory.states.owned == 0
    memory.check_integrity()


def test_the_worker_asks_for_a_state_again_after_the_driver_refused_one():
    """Nobody can begin before it gives again, and so nobody else asks for one."""
    vmm = FaultyVirtualMemory()
    memory = with_states(vmm)
    memory.worker.retry_seconds = 0.0
    vmm.fail_calls, vmm.fail_at = ("create",), 1
    assert memory.states.take(1) is None
    vmm.fail_at = 1
    assert not memory.housekeep()
    assert memory.short, "it refused again"
    vmm.fail_at = None
    done(memory)
    assert not memory.short
    assert memory.states.backing.pages - 1 == 1
    assert memory.states.take(1) is not None
    memory.check_integrity()


@pytest.mark.parametrize("idle", [0.0, 1000.0])
def test_the_worker_gives_idle_states_back(idle):
    memory = with_states(idle_seconds=idle)
    memory.states.give(memory.states.take(4))
    done(memory)
    assert memory.states.backing.pages - 1 == (0 if idle == 0.0 else 4)


def test_everything_is_taken_back_at_once():
    memory = with_states()
    memory.states.take(4)
    take(memory, 2)
    memory.free_all()
    memory.allow(0)
    assert memory.give_all_back()
    assert memory.backed_bytes == sum(store.page_bytes for store in memory.stores)
