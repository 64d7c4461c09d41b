"""Handing pages and segments to the requests of a batch: SGLang's `alloc_for_extend` and `alloc_for_decode`.

SGLang allocates for a batch of lengths; here it is for requests, because which page a token goes to must be known on
the host (invariant 6), and because a request's segment must show its pages before the batch is launched (invariant 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.mem_cache.allocation import alloc_req_slots, write_cache_indices
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.utils.common import is_pin_memory_available

from sglang_vtensor.srt.runtime import RequestPages, Runtime
from sglang_vtensor.vmm import VMMError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def alloc_for_extend(batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages, slots and segments for the new tokens of each request.

    Returns the new slots (int64, on the device, all requests one after another) and the request slots (int64, on the
    device and on the host). Raises `RuntimeError` where SGLang's admission was wrong and there is no room.
    """
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    slots = alloc_req_slots(batch.req_to_token_pool, batch.reqs, batch.tree_cache)
    prefix_lens: list[int] = batch.prefix_lens
    seq_lens: list[int] = batch.seq_lens_cpu.tolist()

    records, fresh = [], []
    for req, slot, prefix_len in zip(batch.reqs, slots, prefix_lens, strict=True):
        if req.kv is None:
            runtime.requests[slot] = _shared_prefix(batch, req, prefix_len, runtime)
            fresh.append(slot)
            runtime.memory.prefix_tokens_served += prefix_len
        records.append(runtime.requests[slot])
    wanted = [
        runtime.memory.layout.pages_for(n) - len(record.pages) for n, record in zip(seq_lens, records, strict=True)
    ]
    try:
        _grow(batch, runtime, records, wanted)
        if runtime.extend_reads_segments:
            for req, slot, record in zip(batch.reqs, slots, records, strict=True):
                adopt = batch.tree_cache.parked_segment(req.last_node) if record.segment is None else None
                runtime.map_request(slot, shared=record.protected if slot in fresh else 0, adopt=adopt)
    except RuntimeError:
        # These requests were not running before, and will not run now.
        for slot in fresh:
            record = runtime.requests.pop(slot)
            runtime.memory.free(record.pages[record.protected :])
            if record.segment is not None:
                runtime.memory.release(record.segment)
        raise

    out = [
        _slots(record.pages, start, stop, runtime.page_tokens)
        for record, start, stop in zip(records, prefix_lens, seq_lens, strict=True)
    ]
    out_cache_loc = _to_device(np.concatenate(out), batch.device)
    slots_cpu = torch.tensor(slots, dtype=torch.int64)
    slots_device = slots_cpu.to(batch.device, non_blocking=True)
    if runtime.extend_reads_segments:
        runtime.publish_segments(slots, slots_device)
    prefix_lens_cpu = torch.tensor(prefix_lens, dtype=torch.int64)
    extend_lens_cpu = torch.tensor(batch.extend_lens, dtype=torch.int64)
    write_cache_indices(
        out_cache_loc,
        slots_device,
        slots_cpu,
        prefix_lens_cpu.to(batch.device, non_blocking=True),
        prefix_lens_cpu,
        batch.seq_lens,
        batch.seq_lens_cpu,
        extend_lens_cpu.to(batch.device, non_blocking=True),
        extend_lens_cpu,
        [req.prefix_indices for req in batch.reqs],
        batch.req_to_token_pool,
    )
    _note_allocated(batch.reqs, seq_lens)
    return out_cache_loc, slots_device, slots_cpu


def alloc_for_decode(batch: ScheduleBatch, token_per_req: int) -> torch.Tensor:
    """The slot of each request's next token (int64, on the device). Raises `RuntimeError` if there is no room."""
    if token_per_req != 1:
        raise NotImplementedError(f"{token_per_req} tokens a decode step: speculative decoding is refused at start")
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    seq_lens: list[int] = batch.seq_lens_cpu.tolist()
    records = [runtime.requests[req.req_pool_idx] for req in batch.reqs]
    tokens = runtime.page_tokens
    _grow(batch, runtime, records, [n // tokens + 1 - len(r.pages) for n, r in zip(seq_lens, records, strict=True)])
    if runtime.decode_reads_segments:
        for req in batch.reqs:
            runtime.map_request(req.req_pool_idx)

    out = [record.pages[n // tokens] * tokens + n % tokens for n, record in zip(seq_lens, records, strict=True)]
    out_cache_loc = _to_device(np.array(out, dtype=np.int64), batch.device)
    # A copy: the batch advances seq_lens while this write may still be queued.
    batch.req_to_token_pool.write((batch.req_pool_indices, batch.seq_lens.clone()), out_cache_loc.to(torch.int32))
    for req in batch.reqs:
        req.kv.kv_allocated_len += 1
    return out_cache_loc


def _shared_prefix(batch: ScheduleBatch, req: Req, prefix_len: int, runtime: Runtime) -> RequestPages:
    """The record of a request that starts: it has what the tree matched, and nothing of its own."""
    tokens = runtime.page_tokens
    pages = batch.tree_cache.path_pages(req.last_node) if prefix_len else []
    if prefix_len % tokens or prefix_len // tokens > len(pages):
        raise RuntimeError(
            f"request {req.rid} matched {prefix_len} tokens, but its path in the tree holds {len(pages)} pages of "
            f"{tokens}: the tree and the pages disagree"
        )
    return RequestPages(pages[: prefix_len // tokens], prefix_len // tokens)


def _grow(batch: ScheduleBatch, runtime: Runtime, records: list[RequestPages], wanted: list[int]) -> None:
    """Give each record as many new pages as it wants, evicting from the tree first if the pool is short of them."""
    total = sum(wanted)
    if not total:
        return
    short = total - runtime.memory.available_pages()
    if short > 0:
        batch.tree_cache.evict(EvictParams(num_tokens=short * runtime.page_tokens))
    pages = runtime.memory.allocate(total)
    if pages is None:
        # The device had less than the limit promised. What the tree holds is backed: use that.
        batch.tree_cache.evict(EvictParams(num_tokens=total * runtime.page_tokens))
        pages = runtime.memory.allocate(total)
    if pages is None:
        raise VMMError(
            "allocate",
            f"{total} pages for {len(records)} requests; {runtime.memory.available_pages()} are left below the limit, "
            f"{runtime.memory.pages.free_backed} of them backed. {batch.tree_cache.available_and_evictable_str()}",
        )
    start = 0
    for record, count in zip(records, wanted, strict=True):
        record.pages.extend(pages[start : start + count])
        start += count


def _slots(pages: list[int], start: int, stop: int, tokens: int) -> np.ndarray:
    """The slots of tokens `start` to `stop` (int64) of a request with these pages."""
    first = start // tokens
    starts = np.array(pages[first : -(-stop // tokens)], dtype=np.int64) * tokens
    slots = (starts[:, None] + np.arange(tokens)).reshape(-1)
    return slots[start - first * tokens : stop - first * tokens]


def _to_device(array: np.ndarray, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if is_pin_memory_available(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _note_allocated(reqs: list[Req], seq_lens: list[int]) -> None:
    from sglang.srt.managers.schedule_batch import ReqKvInfo

    for req, seq_len in zip(reqs, seq_lens, strict=True):
        if req.kv is None:
            req.kv = ReqKvInfo(kv_allocated_len=seq_len, swa_evicted_seqlen=0)
        else:
            req.kv.kv_allocated_len = seq_len
