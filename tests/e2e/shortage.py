"""A driver that refuses: injected into a scheduler of the harness, in its process."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from sglang_vtensor.neighbours import Record
from sglang_vtensor.vmm import OutOfMemory, VMMError
from sglang_vtensor.worker import RETRY_SECONDS
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.harness import Do, Request


def refuse_at_random(scheduler: Any, share: float, seed: int) -> None:
    """From now on `share` of the calls that create and map fail, some eight in a row, as the driver would."""
    memory = _memory(scheduler)
    memory.worker.retry_seconds = 0.002
    for call in ("create", "map"):
        memory.vmm.__dict__.pop(call, None)
    if not share:
        memory.worker.retry_seconds = RETRY_SECONDS  # a worker that asks 500 times a second takes time from other tests
        return
    rng, bad = random.Random(seed), False

    def refused() -> bool:
        nonlocal bad
        if rng.random() < (1 / 8 if bad else share / (1 - share) / 8):
            bad = not bad
        return bad

    for call, kind in (("create", OutOfMemory), ("map", VMMError)):
        setattr(memory.vmm, call, _sometimes(getattr(memory.vmm, call), call, kind, refused))


def _sometimes(original: Any, call: str, kind: type[VMMError], refused: Callable[[], bool]) -> Any:
    def wrapped(*args: Any) -> Any:
        if refused():
            raise kind(call, "injected", "INJECTED")
        return original(*args)

    return wrapped


def leave_pages(scheduler: Any, pages: int | None) -> None:
    """The device has room for this many pages in all, the padding pages included; None: for all of them again.

    What is free beyond that goes back to it first, as another process that takes memory would find.
    """
    memory = _memory(scheduler)
    memory.worker.retry_seconds = 0.002
    original, released = type(memory.vmm).create, type(memory.vmm).release
    for call in ("create", "release"):
        memory.vmm.__dict__.pop(call, None)
    if pages is None:
        memory.worker.retry_seconds = RETRY_SECONDS
        return
    if memory.vmm.device.type == "cuda":
        torch.cuda.synchronize()  # the host computes in the call: there no batch is in flight
    scheduler.token_to_kv_pool_allocator.runtime.copy_partials()  # of the batch that is said to be done
    memory.complete(memory.launch())
    memory.trim()

    held, lock = sum(store.pages for store in memory.stores), threading.Lock()  # both threads create and release

    def create(nbytes: int) -> Any:
        nonlocal held
        with lock:
            if held >= pages:
                raise OutOfMemory("create", f"the device has room for {pages} pages", "INJECTED")
            held += 1
        return original(memory.vmm, nbytes)

    def release(page: Any) -> None:
        nonlocal held
        released(memory.vmm, page)
        with lock:
            held -= 1

    memory.vmm.create, memory.vmm.release = create, release


def worker_holds(scheduler: Any, pages: int) -> None:
    """So many free pages are in the worker's hands, in a call of the driver that does not return; 0: it returns."""
    memory = _memory(scheduler)
    with memory.worker._turn:  # between two turns of the real one
        while _HELD:
            leaving = _HELD.pop()
            memory.backing.release(leaving)
            memory.backing.finish_trim(leaving, done=True)
        memory.worker._took_at = 0.0  # long ago: nobody waits for it
        for _ in range(pages):
            leaving = memory.backing.begin_trim(0)
            if leaving is not None:
                _HELD.append(leaving)


_HELD: list[Any] = []


def share_device(scheduler: Any, pages: int) -> None:
    """The device has room for this many pages of all servers that are neighbours, padding pages included."""
    memory, neighbours = _memory(scheduler), scheduler.vtensor_elastic.neighbours
    memory.vmm.headroom_bytes = 0  # it is more than such a device has
    page = memory.layout.page_bytes
    create, release = type(memory.vmm).create, type(memory.vmm).release
    held, lock = memory.backed, threading.RLock()  # both threads create and release, and so look at the others
    look, tell = neighbours.others, neighbours.tell

    def others() -> list[Any]:
        with lock:
            return look()

    def free() -> int:
        return pages * page - held * page - sum(other.backed for other in neighbours.others())

    def hold(change: int) -> None:
        nonlocal held
        held += change
        told(neighbours._record)

    def told(record: Record) -> None:
        with lock:  # pages in the worker's hand, too
            tell(replace(record, backed=held * page))

    def created(nbytes: int) -> Any:
        with lock:
            if free() < nbytes:
                raise OutOfMemory("create", f"the device has room for {pages} pages of all servers", "INJECTED")
            hold(1)
        return create(memory.vmm, nbytes)

    def released(handle: Any) -> None:
        release(memory.vmm, handle)
        with lock:
            hold(-1)

    memory.vmm.create, memory.vmm.release = created, released
    neighbours.others, neighbours.tell = others, told
    memory.vmm.memory = lambda: (max(0, free()), pages * page)


def neighbour_gives(scheduler: Any, pages: int, least: int, seconds: float, wanted: int = 0) -> None:
    """Behind `share_device`: there is a neighbour that holds so many pages, and gives one every `seconds` down to
    `least` of them, as one does whose requests end. It wants so many itself.

    It gives only while a request that was retracted waits here. So it is not the machine's speed that decides whether
    memory comes before a request lacks it."""
    page, neighbours = _memory(scheduler).layout.page_bytes, scheduler.vtensor_elastic.neighbours
    waited, looked_at = 0.0, time.monotonic()

    def others() -> list[Any]:
        nonlocal waited, looked_at
        now = time.monotonic()
        if neighbours._record.wanted and any(req.retraction_count for req in scheduler.waiting_queue):
            waited += now - looked_at
        looked_at = now
        return [Record(backed=max(least, pages - int(waited / seconds)) * page, wanted=wanted * page)]

    neighbours.others = others


def _memory(scheduler: Any) -> Any:
    # SGLang's check between two batches does not count the pages of a request that waits between two chunks. Its check
    # of the idle server, and ours, do.
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "0"
    return scheduler.token_to_kv_pool_allocator.runtime.memory


def check_while_the_driver_fails(reference, ours, longest):
    """Random requests, of up to `longest` tokens behind what they share, to both, while calls of the driver fail at
    random: the answers are the same, and nothing is lost."""

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.05, 0.2, 0.4]), count=st.integers(3, 16))
    def run(seed, share, count):
        prompt = Prompts(seed)
        stem = prompt(seed % 50)
        script = []
        for n in range(count):
            script.append([Request(f"s{seed}n{n}.", stem + prompt(1 + (seed >> n) % longest), 1 + (seed >> n) % 24)])
            script += [[] for _ in range((seed >> (2 * n)) % 4)]
        expected = reference.run(script)
        try:
            got = ours.run([[Do(refuse_at_random, (share, seed))], *script])
        finally:
            ours.run([[Do(refuse_at_random, (0, seed))]])
        ours.check()
        for rid, theirs in expected.items():
            assert_same(theirs, got[rid], tie=TIE["float32"], what=rid)

    run()
