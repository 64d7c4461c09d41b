"""Ranks that schedule the same batches (invariant 8): what one of them was refused, none of them has."""

from __future__ import annotations

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sglang_vtensor import patches
from sglang_vtensor.srt.allocation import _attempt
from sglang_vtensor.srt.runtime import RequestPages, Runtime
from sglang_vtensor.vmm import VMMError
from tests.unit.faults import FaultyVirtualMemory
from tests.unit.test_manager import make


def rank(number: int, store: str) -> None:
    """Both run this; what fails, fails on one of them only."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    vmm = FaultyVirtualMemory()
    memory = make(vmm)
    memory.retry_seconds = 0.0
    runtime = Runtime(memory, 4, patches.load().requests)
    runtime.use_group(dist.group.WORLD)
    assert runtime.several_ranks
    records = [RequestPages([], 0), RequestPages([], 0)]

    def attempt(map_segments=None):
        return _attempt(runtime, records, [2, 3], map_segments, False)

    def have():
        memory.check_integrity()
        return [len(record.pages) for record in records], memory.pages.owned

    if number == 1:
        vmm.fail_calls, vmm.fail_at = ("create",), 3
    assert not attempt(), "the driver of one rank refused a page"
    assert have() == ([0, 0], 0)
    assert memory.short == (number == 1)
    assert runtime.missing_tokens() == 0, "admission counts with what all ranks know"

    def fails_on_the_other(new):
        assert new == 5
        if number == 0:
            raise VMMError("map", "injected", "INJECTED")

    assert not attempt(fails_on_the_other), "one rank could not map what it has"
    assert have() == ([0, 0], 0)

    assert attempt()
    assert have() == ([2, 3], 5)
    dist.destroy_process_group()


def test_what_one_rank_is_refused_none_has(tmp_path):
    # Forked, as what takes time is to import SGLang.
    multiprocessing.start_processes(rank, args=(str(tmp_path / "store"),), nprocs=2, start_method="fork")
