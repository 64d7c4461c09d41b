"""What is told of the memory: `sglang-vtensor stats` and the metrics begin with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_vtensor.memory import KVMemory


def snapshot(memory: KVMemory) -> dict[str, int | float]:
    """Counts are pages, `_bytes` and `_seconds` say so; counters grow from the start. The caller holds the lock."""
    windows = memory.backings[1:]
    states = [] if memory.states is None else [memory.states.backing]
    return {
        "page_tokens": memory.layout.page_tokens,
        "page_bytes": memory.page_bytes,
        "waste": memory.layout.waste,
        "frames": memory.placement.num_frames,
        "pages_capacity": memory.limit,
        "capacity_bytes": memory.budget.nbytes + memory.padding_bytes,
        "pages_limit": memory.owned + memory.room(),
        "pages_backed": memory.backed,
        "pages_free": memory.free_backed,
        "pages_kept": len(memory.tails),
        "kept_tokens": memory.tails.tokens,
        "pages_stuck": sum(backing.stuck for backing in memory.stores),
        "pages_owned": memory.owned,
        "backed_bytes": memory.backed_bytes,
        "owned_bytes": sum(backing.used * backing.page_bytes for backing in memory.stores),
        "windows_backed_bytes": sum(backing.pages * backing.page_bytes for backing in windows),
        "windows_owned_bytes": sum(backing.used * backing.page_bytes for backing in windows),
        "states_owned": sum(backing.used for backing in states),
        "states_backed_bytes": sum(backing.pages * backing.page_bytes for backing in states),
        "states_owned_bytes": sum(backing.used * backing.page_bytes for backing in states),
        "pages_created": sum(backing.creates for backing in memory.stores),
        "pages_released": sum(backing.releases for backing in memory.stores),
        "pages_allocated": memory.counts["allocated"],
        "pages_with_memory": memory.counts["with_memory"],
        "pages_created_at_once": memory.counts["created"],
        "pages_in_place": memory.counts["in_place"],
        "extents_halved": memory.placement.halved,
        "contexts": memory.contexts,
        "context_runs": memory.context_runs,
        "context_runs_most": memory.most_runs,
        "broken_runs": memory.broken_runs,
        "pages_shared": memory.counts["shared"],
        "prefix_tokens_served": memory.counts["prefix_tokens"],
        "prompt_tokens": memory.counts["prompt_tokens"],
        "partial_copies": memory.counts["copies"],
        "partial_tokens": memory.counts["copied_tokens"],
        "tails_continued": memory.counts["tails_continued"],
        "shortages": memory.supply.shortages,
        "worker_failures": memory.worker.failures,
        "scheduling_seconds": memory.clock.seconds,
        "worker_seconds": memory.worker.seconds,
        "worker_driver_seconds": memory.worker.driver_seconds,
    }
