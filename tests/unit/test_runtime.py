from __future__ import annotations

from sglang_vtensor.segments import SegmentState
from sglang_vtensor.srt.runtime import RequestPages, Runtime
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
    runtime.map_extend([(1, 0, None), (2, 2, kept)], 2)
    segments = [runtime.requests[slot].segment for slot in (1, 2)]
    assert segments[0] is kept, "the longest parked one went first"
    assert segments[1] is spare
    assert [segment.pages for segment in segments] == [one, shared]
    assert all(segment.state is SegmentState.LEASED for segment in segments)
    memory.check_integrity()
