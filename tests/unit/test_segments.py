import pytest

from sglang_vtensor.pages import PagePool
from sglang_vtensor.segments import SegmentPool, SegmentState
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory

SIZE = 4096


@pytest.fixture
def vmm():
    return FaultyVirtualMemory()


@pytest.fixture
def pages(vmm):
    return PagePool(vmm, SIZE, 33)


@pytest.fixture
def pool(vmm, pages):
    return SegmentPool(vmm, pages, num_segments=4, max_pages=8, max_parked=2)


def shown(pool, segment, count):
    """What the segment shows: each page's first byte, which `stamp` made its id."""
    return pool.vmm.tensor(segment.address, pool.segment_bytes)[: count * SIZE : SIZE].tolist()


def stamp(pages, ids):
    for page in ids:
        pages.vmm.tensor(pages.address(page), SIZE)[0] = page
    return ids


def tidy(pool):
    """Do what the mapping worker does for parked segments. Returns in how many calls of the driver."""
    calls = 0
    while (in_hand := pool.begin_tidy()) is not None:
        pool.tidy_segment(*in_hand)
        pool.finish_tidy(*in_hand, done=True)
        calls += 1
    return calls


def test_a_segment_shows_its_pages_in_order(pool, pages):
    ids = stamp(pages, pages.allocate(4))[::-1]
    segment = pool.fit(pool.take(), ids)
    assert shown(pool, segment, 4) == ids
    pool.check_integrity()


def test_fit_maps_only_what_is_new(pool, pages):
    ids = stamp(pages, pages.allocate(5))
    segment = pool.fit(pool.take(), ids[:3])
    maps = pool.maps
    assert pool.fit(segment, ids) is segment
    assert pool.maps == maps + 2
    assert pool.fit(segment, ids[:2]) is segment, "a shorter context needs no unmapping"
    assert pool.maps == maps + 2
    assert shown(pool, segment, 5) == ids


def test_fit_replaces_what_the_tree_swapped(pool, pages):
    ids = stamp(pages, pages.allocate(5))
    segment = pool.fit(pool.take(), ids[:4])
    swapped = [ids[0], ids[4], ids[2]]
    assert pool.fit(segment, swapped) is segment
    assert shown(pool, segment, 3) == swapped
    assert pool.swaps == 1
    pool.check_integrity()


def test_a_busy_segment_is_left_alone(pool, pages):
    ids = stamp(pages, pages.allocate(4))
    segment = pool.fit(pool.take(), ids[:3])
    segment.busy_until = 1
    grown = pool.fit(segment, ids)
    assert grown is segment, "mapping behind the end disturbs no reader"
    other = pool.fit(segment, [ids[1], ids[0]])
    assert other is not segment
    assert shown(pool, segment, 4) == ids, "the reader still sees what it was launched on"
    assert segment.state is SegmentState.RETIRED
    pool.reclaim()
    assert segment.state is SegmentState.RETIRED
    pool.completed = 1
    pool.reclaim()
    assert segment.state is SegmentState.IDLE
    assert segment.pages == []
    pool.check_integrity()


def test_parked_segments_are_adopted_as_they_are(pool, pages):
    ids = stamp(pages, pages.allocate(4))
    segment = pool.fit(pool.take(), ids)
    pool.park(segment, ids[:3], "leaf")
    assert tidy(pool) == 1, "the page that is not kept is unmapped behind"
    assert (segment.owner, segment.pages) == ("leaf", ids[:3])
    maps = pool.maps
    assert pool.fit(pool.adopt(segment), ids[:3]) is segment
    assert (pool.maps, pool.adoptions, segment.owner) == (maps, 1, None)


def test_what_a_parked_segment_lacks_is_mapped_behind(pool, pages):
    ids = stamp(pages, pages.allocate(5))
    segment = pool.fit(pool.take(), ids[:2])
    segment.busy_until = 1
    pool.park(segment, ids, "leaf")
    assert tidy(pool) == 3, "behind the end a reader in flight is not disturbed"
    assert shown(pool, segment, 5) == ids
    maps = pool.maps
    pool.fit(pool.adopt(segment), ids)
    assert (pool.maps, pool.maps_behind) == (maps, 3)
    pool.check_integrity()


def test_a_busy_parked_segment_loses_nothing(pool, pages):
    ids = stamp(pages, pages.allocate(4))
    segment = pool.fit(pool.take(), ids[:3])
    segment.busy_until = 1
    pool.park(segment, [ids[0], ids[3]], "leaf")
    assert tidy(pool) == 0
    assert shown(pool, segment, 3) == ids[:3], "the reader still sees what it was launched on"
    pool.completed = 1
    assert tidy(pool) == 3
    assert shown(pool, segment, 2) == [ids[0], ids[3]]
    pool.check_integrity()


def test_a_segment_is_prepared_only_where_one_is_idle(pool, pages):
    ids = stamp(pages, pages.allocate(3))
    segment = pool.prepare(ids, "waiting")
    assert tidy(pool) == 3
    assert (shown(pool, segment, 3), segment.owner) == (ids, "waiting")
    other = pool.prepare(ids, "another")
    assert pool.prepare(ids, "one too many") is None, "some are left to those that begin"
    for _ in range(3):
        pool.take()
    assert (segment.owner, other.owner) == (None, "another"), "a prepared one goes before a request waits"
    segment = other
    pool.fresh = 0
    pool.adopt(segment)
    assert (pool.prepared, pool.adoptions, pool.fresh) == (1, 0, 0)
    pool.check_integrity()


def test_pages_that_nobody_owns_any_more_are_not_mapped_behind(pool, pages):
    ids = pages.allocate(3)
    segment = pool.prepare(ids, "waiting")
    pages.free(ids[1:])
    assert tidy(pool) == 1
    assert segment.pages == ids[:1]
    pool.check_integrity()


def test_a_segment_in_hand_is_neither_unmapped_nor_lost(pool, pages, vmm):
    ids = stamp(pages, pages.allocate(2))
    segment = pool.prepare(ids, "waiting")
    in_hand = pool.begin_tidy()
    assert in_hand == (segment, ids[0])
    pool.drop(segment)
    pool.reclaim()
    assert segment.state is SegmentState.RETIRED
    pages.free(ids)
    assert pages.begin_trim(0, 0) == ids[1], "the page in hand stays"
    pages.release_page(ids[1])
    pages.finish_trim(ids[1])
    pool.tidy_segment(*in_hand)
    pool.finish_tidy(*in_hand, done=True)
    pool.check_integrity()
    pool.reclaim()
    assert segment.state is SegmentState.IDLE
    assert tidy(pool) == 0
    pool.check_integrity()


def test_a_map_that_fails_behind_is_tried_again_and_holds_up_no_other(pool, pages):
    one, other = stamp(pages, pages.allocate(2)), stamp(pages, pages.allocate(2))
    first, second = pool.prepare(one, "first"), pool.prepare(other, "second")
    assert first is not None
    in_hand = pool.begin_tidy()
    assert in_hand[0] is first
    pool.finish_tidy(*in_hand, done=False)
    in_hand = pool.begin_tidy(lambda segment: segment is not first)
    assert in_hand[0] is second
    pool.tidy_segment(*in_hand)
    pool.finish_tidy(*in_hand, done=True)
    assert tidy(pool) == 3
    assert (first.pages, second.pages) == (one, other)
    pool.check_integrity()


def test_one_that_is_dropped_while_its_map_fails_is_not_tried_again(pool, pages):
    segment = pool.prepare(stamp(pages, pages.allocate(2)), "waiting")
    in_hand = pool.begin_tidy()
    pool.drop(segment)
    pool.finish_tidy(*in_hand, done=False)
    assert pool.begin_tidy() is None
    pool.check_integrity()


def test_a_map_that_fails_behind_is_left_to_the_lease(pool, pages, vmm):
    ids = stamp(pages, pages.allocate(3))
    segment = pool.prepare(ids, "waiting")
    in_hand = pool.begin_tidy()
    vmm.fail_calls, vmm.fail_at = ("map",), 1
    with pytest.raises(VMMError, match="INJECTED"):
        pool.tidy_segment(*in_hand)
    pool.finish_tidy(*in_hand, done=False)
    pool.check_integrity()
    assert shown(pool, pool.fit(pool.adopt(segment), ids), 3) == ids


def test_the_oldest_parked_segment_goes_first(pool, pages):
    ids = pages.allocate(3)
    parked = [pool.fit(pool.take(), [page]) for page in ids]
    for i, segment in enumerate(parked):
        pool.park(segment, ids[i : i + 1], i)
    assert [segment.owner for segment in parked] == [None, 1, 2], "two may be parked"
    for _ in range(4):
        pool.take()
    assert [segment.owner for segment in parked] == [None, None, None], "a request goes before a parked one"
    with pytest.raises(VMMError, match=r"all 4 segments are in use.*--max-running-requests"):
        pool.take()


def test_a_context_longer_than_a_segment_is_refused(pool, pages):
    with pytest.raises(ValueError, match="9 pages do not fit a segment of 8"):
        pool.fit(pool.take(), pages.allocate(9))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failing_map_leaves_the_segment_as_it_was(pool, pages, vmm, at):
    ids = stamp(pages, pages.allocate(5))
    segment = pool.fit(pool.take(), ids[:2])
    vmm.fail_calls, vmm.fail_at = ("map",), at
    with pytest.raises(VMMError, match="INJECTED"):
        pool.fit(segment, ids)
    assert segment.pages == ids[:2]
    assert shown(pool, segment, 2) == ids[:2]
    pool.check_integrity()
    pool.fit(segment, ids)
    assert shown(pool, segment, 5) == ids


def test_a_failing_map_for_a_busy_segment_keeps_it_leased(pool, pages, vmm):
    ids = stamp(pages, pages.allocate(4))
    segment = pool.fit(pool.take(), ids[:3])
    segment.busy_until = 1
    vmm.fail_calls, vmm.fail_at = ("map",), 2
    with pytest.raises(VMMError, match="INJECTED"):
        pool.fit(segment, ids[::-1])
    assert segment.state is SegmentState.LEASED
    assert shown(pool, segment, 3) == ids[:3]
    pool.check_integrity()


def test_a_failing_unmap_loses_no_segment_and_holds_up_no_other(pool, pages, vmm):
    bad, good = (pool.fit(pool.take(), pages.allocate(3)) for _ in range(2))
    pool.release(bad)
    pool.release(good)
    vmm.fail_calls, vmm.fail_at = ("unmap",), 2
    pool.reclaim()
    assert (bad.state, good.state) == (SegmentState.RETIRED, SegmentState.IDLE)
    pool.check_integrity()
    pool.reclaim()
    assert bad.state is SegmentState.IDLE
    pool.check_integrity()


def test_an_unbacked_page_is_never_mapped(pool, pages):
    (page,) = pages.allocate(1)
    pages.free([page])
    pages.trim(keep=0, completed=0)
    with pytest.raises(VMMError, match="UNBACKED"):
        pool.fit(pool.take(), [page])
    pool.check_integrity()
