"""Which request has which frames, and what a batch reads."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from sglang_vtensor import memory as memory_module
from sglang_vtensor import patches
from sglang_vtensor.handout import Ask
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.srt import elastic as elastic_module
from sglang_vtensor.srt.allocation import _attempt
from sglang_vtensor.srt.allocator import VTensorAllocator
from sglang_vtensor.srt.batch_sharing import BatchSharing
from sglang_vtensor.srt.demand import Demand
from sglang_vtensor.srt.elastic import Elastic
from sglang_vtensor.srt.runtime import RequestFrames, Runtime, slots_of
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_memory import make, take
from tests.waiting import SECONDS

TOKENS = 8


@pytest.fixture
def runtime():
    return Runtime(make(capacity_pages=16), 4, patches.load().requests)


def record(frames, protected):
    """Of a request that found the first ones in the tree."""
    return RequestFrames(frames, protected, protected)


def test_slots_of_frames():
    assert slots_of([3, 1], 4).tolist() == [12, 13, 14, 15, 4, 5, 6, 7]
    assert slots_of([], 4).tolist() == []


def test_a_request_goes_on_behind_its_last_frame_and_says_whose_that_is():
    assert record([], 0).ask(2) == Ask(None, 2)
    assert record([5, 6], 2).ask(1) == Ask(6, 1), "the tree's"
    assert record([5, 6, 7], 2).ask(1) == Ask(7, 1, own=True)


def test_runs_end_with_the_context(runtime):
    runtime.requests[1] = record([3, 4, 9, 10, 11], 2)
    assert runtime.runs(1, 40) == [(24, 16), (72, 24)]
    assert runtime.runs(1, 33) == [(24, 16), (72, 17)]
    assert runtime.runs(1, 16) == [(24, 16)]
    assert runtime.runs(1, 5) == [(24, 5)]


def test_a_padding_request_reads_the_padding_frame(runtime):
    assert runtime.runs(3, 1) == [(0, 1)]
    assert runtime.runs(3, 20) == [(0, 8), (0, 8), (0, 4)], "a frame is a page long, however long it stands in for"


def table_of(runtime, context):
    table = torch.zeros(4, 64, dtype=torch.int32)
    for slot, request in runtime.requests.items():
        table[slot, :context] = slots_of(request.frames, TOKENS)[:context].int()
    return table


def test_what_a_batch_reads_is_checked(runtime):
    runtime.requests[1] = record(take(runtime.memory, 3), 0)
    runtime.requests[2] = record(take(runtime.memory, 3), 0)
    table = table_of(runtime, 20)
    runtime.check_batch([1, 2], [20, 20], table)
    runtime.check_batch([1, 2], [20, 20], None)
    table[2, 11] += 8
    with pytest.raises(AssertionError, match="slot 2: not its frames in the table"):
        runtime.check_batch([1, 2], [20, 20], table)
    with pytest.raises(AssertionError, match="slot 1: 3 frames for 25 tokens"):
        runtime.check_batch([1], [25], None)
    runs, runtime.runs = runtime.runs, lambda slot, context: [(8, context)]
    with pytest.raises(AssertionError, match="slot 2: not its frames in its runs"):
        runtime.check_batch([2], [20], None)
    runtime.runs = runs
    runtime.memory.backing.give(runtime.requests[1].frames[:1], 0)
    with pytest.raises(AssertionError, match="slot 1: frames without memory"):
        runtime.check_batch([1], [20], table)


def test_two_requests_own_no_frame_together(runtime):
    frames = take(runtime.memory, 2)
    runtime.requests[1], runtime.requests[2] = record(list(frames), 0), record(list(frames), 1)
    with pytest.raises(AssertionError, match="two requests own one frame"):
        runtime.check_integrity()
    runtime.requests[2].protected = 2
    runtime.check_integrity()


def test_the_frame_of_a_token_that_is_not_to_come_is_freed_and_runs_are_counted(runtime):
    shared, own = take(runtime.memory, 2), take(runtime.memory, 3)
    runtime.requests[1] = record(shared + own, 2)
    assert runtime.end_request(1, 4 * TOKENS).frames == shared + own[:2]
    assert not runtime.requests
    assert runtime.memory.placement.is_vacant(own[2])
    stats = runtime.stats()
    assert (stats["contexts"], stats["context_runs"], stats["broken_runs"], stats["requests"]) == (1, 2, 0, 0)


def test_copies_are_made_once_before_the_batch(runtime):
    source, target = take(runtime.memory, 2)
    keys = runtime.memory.layer_views(0)[0]
    keys[source * TOKENS : source * TOKENS + TOKENS] = 7.0
    runtime.copies.append((source, target, 3, (0,)))
    runtime.copy_partials()
    assert keys[target * TOKENS : target * TOKENS + 4, 0, 0].tolist() == [7.0] * 3 + [0.0]
    assert not runtime.copies
    runtime.copy_partials()
    assert runtime.memory.counts["copies"] == 1


def test_what_a_copy_is_yet_to_read_stays_where_another_rank_was_refused(runtime, monkeypatch):
    memory, source = runtime.memory, take(runtime.memory, 3)
    one = record(source[:2], 0)
    runtime.begin(0, one)
    runtime.copies.append((source[2], source[0], 3, (0,)))
    memory.free(source[2:], runtime.last_reader)
    runtime.check_batch([], [], None)
    monkeypatch.setattr(runtime, "agree", lambda done: False)
    assert not _attempt(runtime, [(one, 1)], True), "it had just that page in place, and another rank had none"
    assert memory.counts["in_place"] == 1
    runtime.check_batch([], [], None)
    memory.trim()
    runtime.copy_partials()
    memory.free(one.frames, memory.launched)


def test_what_is_done_is_told_in_order_and_nobody_waits(runtime):
    done = [True, False, True]
    runtime._flying = deque(
        (runtime.memory.launch(), SimpleNamespace(query=lambda n=n: done[n])) for n in range(len(done))
    )
    runtime.poll()
    assert runtime.memory.backing.completed == 1
    runtime.idle()
    assert runtime.memory.backing.completed == 1, "one flies yet"
    done[1] = True
    runtime.idle()
    assert runtime.memory.backing.completed == 3
    runtime.memory.free(take(runtime.memory, 1))
    runtime.idle()
    assert runtime.memory.backing.completed == 4, "nobody reads what was freed since the last one"
    runtime.idle()
    assert runtime.memory.launched == 4, "nothing was freed since"


def test_clear_forgets_everything(runtime):
    runtime.requests[1] = record(take(runtime.memory, 3), 0)
    runtime.memory.tails.keep(take(runtime.memory, 1)[0], 3)
    runtime.copies.append((1, 2, 3, (0,)))
    runtime.clear()
    assert (runtime.requests, runtime.copies, runtime.memory.owned) == ({}, [], 0)
    runtime.check_integrity()


def test_admission_counts_without_what_is_not_to_be_had(runtime):
    assert runtime.missing_tokens() == 0
    runtime.memory.allow(10)
    assert runtime.missing_tokens() == 6 * TOKENS


def test_memory_has_come_where_there_is_more_than_admission_counted_with(monkeypatch):
    """What the driver refused meanwhile counts, although it gives again before anybody looks the next time."""
    now = 100.0
    monkeypatch.setattr(elastic_module, "time", SimpleNamespace(monotonic=lambda: now))
    vmm = FaultyVirtualMemory()
    runtime = Runtime(make(vmm, capacity_pages=16, reserve_pages=4), 4, patches.load().requests)
    runtime.memory.worker.retry_seconds = 0.0
    elastic = Elastic(runtime, None, cache_idle_seconds=None, minimum_bytes=0)
    take(runtime.memory, 2)
    assert not elastic.has_more_room()
    vmm.fail_calls, vmm.fail_at = ("create",), 1
    runtime.memory.housekeep()
    counted = runtime.missing_tokens()
    assert counted > 0
    while runtime.memory.housekeep():
        pass
    assert runtime.missing_tokens() == 0
    assert not elastic.has_more_room(), "it has looked just now"
    now += 1.0
    assert elastic.has_more_room()
    now += 1.0
    assert not elastic.has_more_room()


def test_what_neighbours_are_told_is_of_one_moment(runtime, monkeypatch):
    elastic = Elastic(runtime, SimpleNamespace(evictable_size=lambda: 0), cache_idle_seconds=None, minimum_bytes=0)
    count, had = elastic._cached, []

    def meanwhile():
        """Another thread, such as the worker, wants the lock."""
        with ThreadPoolExecutor(1) as pool:
            had.append(pool.submit(runtime.memory.worker.lock.acquire, blocking=False).result())
        return count()

    monkeypatch.setattr(elastic, "_cached", meanwhile)
    assert elastic.record(Demand([])).backed == runtime.memory.backed_bytes
    assert had == [False]


def test_a_watchdog_is_not_held_up_by_who_hangs_in_the_driver(runtime, monkeypatch):
    monkeypatch.setattr(memory_module, "LOCKED_SECONDS", 0.05)
    pool = SimpleNamespace(page_size=TOKENS, dtype=torch.float32, device="cpu", runtime=runtime)
    allocator = VTensorAllocator(16 * TOKENS, pool)
    told = []
    watchdog = threading.Thread(target=lambda: told.append(allocator.get_all_free_pages()))
    with runtime.memory.held_still():
        watchdog.start()
        watchdog.join(SECONDS)
        assert told == [None]
    assert allocator.get_all_free_pages().tolist() == []


def test_sglangs_allocator_counts_tokens_of_the_capacity_and_hands_out_slots_of_frames():
    vmm = FaultyVirtualMemory()
    runtime = Runtime(make(vmm, capacity_pages=16), 4, patches.load().requests)
    pool = SimpleNamespace(page_size=TOKENS, dtype=torch.float32, device="cpu", runtime=runtime)
    allocator = VTensorAllocator(16 * TOKENS, pool)
    assert allocator.available_size() == 16 * TOKENS
    slots = allocator.alloc(2 * TOKENS + 1)
    assert slots.tolist() == list(range(int(slots[0]), int(slots[0]) + 17))
    assert allocator.available_size() == 13 * TOKENS
    assert allocator.alloc(14 * TOKENS) is None
    assert allocator.free_pages.tolist() == []
    allocator.free(slots[:1])
    allocator.free(slots[:0])
    allocator.free(slots[TOKENS:])
    assert allocator.free_pages.tolist() == sorted(set((slots // TOKENS).tolist()))
    assert allocator.release_pages.numel() == 0
    allocator.alloc(5)
    allocator.clear()
    assert allocator.available_size() == 16 * TOKENS


def test_what_is_not_read_again_is_counted_without_padding():
    padded = KVLayout(2, 1, 24, torch.float32, page_tokens=8, stride_bytes=512, granularity=4096)
    assert padded.kv_bytes < padded.stride_bytes
    runtime = Runtime(make(sides=padded, capacity_pages=16), 4, patches.load().requests)
    sharing = BatchSharing(runtime, requests=4, group=1, token_bytes=padded.kv_bytes)
    for slot in (1, 2, 3):
        runtime.requests[slot] = record([5, 6, 7 + slot], 2)
    sharing.begin([1, 2, 3], 60, 20)
    sharing.count(True)
    assert sharing.stats()["shared_bytes_saved"] == 2 * 16 * padded.kv_bytes, "two pages, for two requests more"
