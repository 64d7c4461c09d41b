from __future__ import annotations

import pytest

from sglang_vtensor.segments import SegmentState
from sglang_vtensor.srt.runtime import MAX_MAPS_AHEAD, Extend, RequestPages, Runtime
from tests.unit.test_manager import make


def test_a_parked_segment_given_up_for_another_request_of_the_batch_is_not_adopted():
    """No segment is idle: the first request takes the longest parked one, which the second was to go on in."""
    memory = make(capacity_pages=200, max_running=2)
    runtime = Runtime(memory, 3)
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
    runtime = Runtime(memory, 3)
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
    runtime = Runtime(memory, 3)
    runtime.extend_reads_pages, runtime.segments_pay = True, lambda new, contexts: True
    runtime.requests[1] = RequestPages(memory.allocate(MAX_MAPS_AHEAD + 2), 1)
    runtime.map_extend([Extend(1, 1, None, 4, 4 * MAX_MAPS_AHEAD + 8)], 1)
    assert runtime.by_pages
