"""What GPU tests do inside a scheduler of the harness, in its process."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

_HELD: list[torch.Tensor] = []
_PREFILLS: list[int] = []


def without_checks(scheduler: Any) -> None:
    """SGLang's checks between two batches read back from the device: off, where synchronizations or time count."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "0"
    os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "0"


def only_cheap_checks(scheduler: Any) -> None:
    """Keep the sums over the pool between two batches, leave out the comparison of every slot on the device."""
    os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "0"


def synchronizations(scheduler: Any, script: Any) -> int:
    """How often PyTorch saw an operation wait for the device while the script ran."""
    from tests.harness import _run

    without_checks(scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _run(scheduler, script)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def hog(scheduler: Any, leave_bytes: int | None) -> None:
    """Take the device's memory but `leave_bytes`, as another process would; None: let go of it. What torch has cached
    for activations it keeps: the driver is to refuse pages, and nothing else."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "0"  # as in tests/e2e/shortage.py
    memory = scheduler.token_to_kv_pool_allocator.runtime.memory
    memory.worker.retry_seconds = 0.01
    torch.cuda.synchronize()
    if leave_bytes is None:
        _HELD.clear()
        torch.cuda.empty_cache()
        return
    memory.complete(memory.launch())
    memory.trim()
    memory.vmm.headroom_bytes = 0  # so that it is cuMemCreate itself that fails
    free, _ = memory.vmm.memory()
    _HELD.append(torch.empty(max(0, free - leave_bytes), dtype=torch.uint8, device="cuda"))


def count_our_prefills(scheduler: Any) -> None:
    """From now on, for `our_prefills`: the tokens of each layer's call of our prefill kernel. It is compiled then."""
    for compiling in scheduler.token_to_kv_pool_allocator.runtime.compiling:
        compiling.wait()
    ours = scheduler.tp_worker.model_runner.attn_backend.prefill_backend.ours
    attend = ours.attend

    def counted(q: torch.Tensor, *args: Any) -> torch.Tensor:
        _PREFILLS.append(len(q))
        return attend(q, *args)

    ours.attend = counted


def our_prefills(scheduler: Any) -> list[int]:
    return _PREFILLS
