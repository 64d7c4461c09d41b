"""Ranks that schedule the same batches (invariant 8): what one of them was refused, none of them has."""

from __future__ import annotations

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sglang_vtensor import patches
from sglang_vtensor.srt.allocation import _attempt
from sglang_vtensor.srt.runtime import RequestFrames, Runtime
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_memory import make, take


def rank(number: int, store: str) -> None:
    """Both run this; what fails, fails on one of them only."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    vmm = FaultyVirtualMemory()
    memory = make(vmm)
    memory.worker.retry_seconds = 0.0
    runtime = Runtime(memory, 4, patches.load().requests)
    runtime.use_group(dist.group.WORLD)
    assert runtime.several_ranks
    records = [RequestFrames([], 0, 0), RequestFrames([], 0, 0)]
    tail = memory.tails.keep(take(memory, 1)[0], 3)

    def lacking(*counts):
        return list(zip(records, counts, strict=True))

    def have():
        memory.check_integrity()
        return [len(record.frames) for record in records], memory.owned

    if number == 1:
        vmm.fail_calls, vmm.fail_at = ("create",), 3
    assert not _attempt(runtime, lacking(2, 3), False), "the driver of one rank refused a page"
    assert have() == ([0, 0], 0)
    assert memory.short == (number == 1)
    assert runtime.missing_tokens() == 0, "admission counts with what all ranks know"
    assert tail.frame is not None

    if number == 0:
        vmm.fail_calls, vmm.fail_at = ("create",), 4
    assert not _attempt(runtime, lacking(4, 12), False), "the other one's; both forgot the kept page for it"
    assert have() == ([0, 0], 0)
    assert tail.frame is None

    assert _attempt(runtime, lacking(2, 3), False)
    assert have() == ([2, 3], 5)
    # What one rank could not have in place, it has elsewhere: where frames are is nothing that ranks compare.
    if number == 1:
        memory.placement.set_aside(records[0].frames[-1] + 1)
    assert _attempt(runtime, lacking(1, 1), True)
    assert have() == ([3, 4], 7)
    dist.destroy_process_group()


def test_what_one_rank_is_refused_none_has(tmp_path):
    # Forked, as what takes time is to import SGLang.
    multiprocessing.start_processes(rank, args=(str(tmp_path / "store"),), nprocs=2, start_method="fork")
