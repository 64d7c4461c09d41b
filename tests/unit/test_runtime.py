from __future__ import annotations

import pytest
import torch

from sglang_vtensor import patches
from sglang_vtensor.segments import SegmentState
from sglang_vtensor.srt.runtime import MAX_MAPS_AHEAD, Extend, RequestPages, Runtime
from tests.unit.test_manager import make


def test_a_parked_segment_given_up_for_another_request_of_the_batch_is_not_adopted():
    """No segment is idle: the first request takes the longest parked one, which the second was to go on in."""
    memory = make(capacity_pages=200, max_running=2)
    runtime = Runtime(memory, 3, patches.load().requests)
    one, two, shared = (memory.allocate(2) for _ in range(3))
    kept, spare = (memory.lease(None, pages) for pages in (shared, two))
    while memory.segments.idle:
        memory.lease(None, memory.allocate(1))
    memory.complete(memory.launch())
    memory.park(kept, shared, object())
    memory.park(spare, two, object())
    runtime.requests[1] = RequestPages(one, 0)
    runtime.requests[2] = RequestPages(shared, 2)
    runtime.map_extend([Extend(1, 0, None, 32, 32), Extend(2, 2, kept, 1, 32)], 2)
    segments = [runtime.requests[slot].segment for slot in (1, 2)]
    assert segments[0] is kept, "the longest parked one went first"
    assert segments[1] is spare
    assert [segment.pages for segment in segments] == [one, shared]
    assert all(segment.state is SegmentState.LEASED for segment in segments)
    memory.check_integrity()


@pytest.mark.parametrize("pays", [False, True], ids=["pages as good", "segments pay"])
@pytest.mark.parametrize("new", [MAX_MAPS_AHEAD, MAX_MAPS_AHEAD + 1])
def test_a_batch_with_many_new_pages_reads_pages_where_segments_do_not_pay(new, pays):
    memory = make(capacity_pages=200, max_tokens=512, max_running=2)
    runtime = Runtime(memory, 3, patches.load().requests)
    runtime.extend_reads_pages = True
    asked = []
    runtime.segments_pay = lambda *batch: asked.append(batch) or pays
    runtime.requests[1] = RequestPages(memory.allocate(new), 0)
    runtime.map_extend([Extend(1, 0, None, 4 * new, 4 * new)], new)
    segment = runtime.requests[1].segment
    assert runtime.by_pages == (new > MAX_MAPS_AHEAD and not pays)
    assert asked == ([([4 * new], [4 * new])] if new > MAX_MAPS_AHEAD else [])
    assert segment.pages == ([] if runtime.by_pages else runtime.requests[1].pages)
    while memory.housekeep():
        pass
    assert segment.pages == runtime.requests[1].pages, "the worker maps what the batch did not wait for"


def test_a_batch_whose_prefix_is_not_mapped_reads_pages_even_where_segments_pay():
    memory = make(capacity_pages=200, max_tokens=512, max_running=2)
    runtime = Runtime(memory, 3, patches.load().requests)
    runtime.extend_reads_pages, runtime.segments_pay = True, lambda new, contexts: True
    runtime.requests[1] = RequestPages(memory.allocate(MAX_MAPS_AHEAD + 2), 1)
    runtime.map_extend([Extend(1, 1, None, 4, 4 * MAX_MAPS_AHEAD + 8)], 1)
    assert runtime.by_pages


def test_a_segment_that_was_mapped_ahead_of_an_eviction_is_not_read_as_it_is():
    """A request's prefix was mapped while it waited, and evicted in part before it began. Its first chunk reads pages.
    Its second chunk would read a segment that is long enough, and that shows what is another request's now."""
    memory = make(capacity_pages=300, max_tokens=8 * 120)
    runtime = Runtime(memory, 5, patches.load().requests)
    runtime.extend_reads_segments = runtime.extend_reads_pages = True
    by_slot, by_segment = memory.identity_views(0)[0], memory.segment_views(0)[0]
    tree, own, stranger = 1.0, 2.0, 3.0

    def write(pages, who):
        for page in pages:
            by_slot[8 * page : 8 * page + 8] = who

    prefix = memory.allocate(60)
    write(prefix, tree)
    prepared = memory.prepare(prefix, "waiting")
    while memory.housekeep():
        pass
    memory.complete(memory.launch())
    memory.free(prefix[10:])
    write(memory.allocate(50), stranger)

    runtime.requests[1] = record = RequestPages(prefix[:10] + memory.allocate(1), 10)
    write(record.pages[10:], own)
    runtime.requests[2] = RequestPages(memory.allocate(40), 0)
    runtime.map_extend([Extend(2, 0, None, 320, 320), Extend(1, 10, prepared, 8, 88)], 41)
    assert runtime.by_pages
    while memory.housekeep():
        pass
    memory.complete(memory.launch())
    new = memory.allocate(20)
    write(new, own)
    record.pages += new
    runtime.map_extend([Extend(1, 0, None, 160, 248)], 20)
    assert not runtime.by_pages
    assert by_segment[record.segment.index, : 31 * 8 : 8, 0, 0].tolist() == [tree] * 10 + [own] * 21

    table = torch.zeros(5, 248, dtype=torch.int64)
    table[1] = torch.tensor(record.pages).repeat_interleave(8) * 8 + torch.arange(8).repeat(31)
    assert runtime.check_batch([1], [248], table, decode=False)
    record.segment.pages[12] = prefix[12]
    with pytest.raises(AssertionError, match="slot 1"):
        runtime.check_batch([1], [248], table, decode=False)
    runtime.by_pages = True
    assert not runtime.check_batch([1], [248], table, decode=False)
    table[1, 100] += 8
    with pytest.raises(AssertionError, match="slot 1: not its pages in the table"):
        runtime.check_batch([1], [248], table, decode=False)


def test_a_segment_that_the_worker_leased_ahead_is_the_one_that_is_read_later():
    """The batch that it was leased for reads pages; the next one finds all of it mapped, and reads it."""
    memory = make(capacity_pages=200, max_tokens=512, max_running=2)
    runtime = Runtime(memory, 3, patches.load().requests)
    runtime.extend_reads_segments = runtime.extend_reads_pages = True
    runtime.requests[1] = record = RequestPages(memory.allocate(MAX_MAPS_AHEAD + 1), 0)
    runtime.map_extend([Extend(1, 0, None, 8, 8 * MAX_MAPS_AHEAD + 8)], 0)
    assert runtime.by_pages
    while memory.housekeep():
        pass
    runtime.map_request(1)
    assert runtime.segment_of[1] == record.segment.index
    assert record.segment.pages == record.pages
