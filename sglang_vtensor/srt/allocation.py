"""Handing pages and segments to the requests of a batch: SGLang's `alloc_for_extend` and `alloc_for_decode`.

SGLang allocates for a batch of lengths; here it is for requests, because which page a token goes to must be known on
the host (invariant 6), and because a request's segment must show its pages before the batch is launched (invariant 2).

The driver may refuse what the pool's size promised. Then a batch gets nothing of what it asked for, on any rank: an
extend batch is put off (`PutOff`), and a decode batch is told before it is made (`secure_decode`), so that SGLang
retracts requests until the rest fits (invariant 7).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocation import alloc_req_slots, write_cache_indices
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.utils.common import is_pin_memory_available

from sglang_vtensor.srt.runtime import Extend, Partial, RequestPages, Runtime
from sglang_vtensor.vmm import VMMError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

logger = logging.getLogger(__name__)


class _Partials:
    """The requests of a batch that begin inside a page (`Partial`): claims what is to be claimed before the batch takes
    pages, holds what is to be copied while it does, and asks for the copies."""

    def __init__(self, batch: ScheduleBatch, reqs: list[Req]) -> None:
        self._batch = batch
        self._runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
        self._reqs = reqs
        prefix = self._runtime.sglang.prefix
        self._found = [(req, req.vtensor_partial) for req in reqs if prefix(req) % self._runtime.page_tokens]
        self._claimed: dict[int, Req] = {}  # by page
        self._locked = []
        self._there = True
        for req, partial in self._found:
            if partial.node is None:
                # Of several that continue one tail the first claims it, and the others copy from its page, which is
                # written to behind what they copy, and later.
                if partial.page not in self._claimed and self._claim(req, partial):
                    continue
                self._there = self._there and partial.page in self._claimed
            elif partial.node.gone:
                self._there = False
            else:
                batch.tree_cache.inc_lock_ref(partial.node)
                self._locked.append(partial.node)

    def agreed(self) -> bool:
        """Nothing that was found is gone since, on any rank. It cannot be, as the tree is not evicted between match and
        allocation, except where the limit leaves no page to claim; then the batch waits and is matched again."""
        return not self._found or self._runtime.agree(self._there)

    def _claim(self, req: Req, partial: Partial) -> bool:
        assert partial.tail is not None
        page = self._runtime.memory.claim(partial.tail)
        if page is None:
            return False
        self._claimed[page] = req
        self._record(req).pages.append(page)
        return True

    def _record(self, req: Req) -> RequestPages:
        return self._runtime.requests[self._runtime.sglang.slot(req)]

    def settle(self, secured: bool) -> None:
        """The batch has its pages, or waits."""
        for node in self._locked:
            self._batch.tree_cache.dec_lock_ref(node)
        if not secured:
            for req, partial in self._found:
                if self._claimed.get(partial.page) is req:
                    self._runtime.memory.unclaim(partial.tail, partial.page)
            for req in self._reqs:
                req.vtensor_whole_pages = True  # what it would copy from may be just what has to be evicted
            return
        for req in self._reqs:
            req.vtensor_whole_pages = False  # should it be retracted, it may begin inside a page again
        for req, partial in self._found:
            record = self._record(req)
            page = record.pages[record.protected]
            if page != partial.page:
                self._runtime.copies.append((partial.page, page, partial.tokens))


class PutOff(RuntimeError):
    """There is no memory for this extend batch now. It holds nothing that it did not hold before; it is to wait."""

    def __init__(self, reqs: list[Req]) -> None:
        super().__init__(f"no memory for {len(reqs)} requests")
        self.reqs = reqs


def alloc_for_extend(batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages, slots and segments for the new tokens of each request.

    Returns the new slots (int64, on the device, all requests one after another) and the request slots (int64, on the
    device and on the host). Raises `PutOff` if there is no memory; requests that just began then hold no slot either.
    """
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    sglang = runtime.sglang
    fresh = [req for req in batch.reqs if not sglang.begun(req)]  # from here on, all of them have a row
    begins = set(fresh)
    slots = alloc_req_slots(batch.req_to_token_pool, batch.reqs, batch.tree_cache)
    prefix_lens: list[int] = batch.prefix_lens
    seq_lens: list[int] = batch.seq_lens_cpu.tolist()

    records = []
    with runtime.memory.clock:
        for req, slot, prefix_len in zip(batch.reqs, slots, prefix_lens, strict=True):
            if req in begins:
                runtime.requests[slot] = _shared_prefix(batch, req, prefix_len, runtime)
            records.append(runtime.requests[slot])

    def map_segments(new: int) -> None:
        extends = []
        taken: set[int] = set()
        for req, slot, record, prefix_len, seq_len in zip(
            batch.reqs, slots, records, prefix_lens, seq_lens, strict=True
        ):
            adopt = batch.tree_cache.segment_for(req, taken) if record.segment is None else None
            if adopt is not None:
                taken.add(adopt.index)
            shared = record.protected if req in begins else 0
            extends.append(Extend(slot, shared, adopt, seq_len - prefix_len, seq_len))
        runtime.map_extend(extends, new)

    with runtime.memory.clock:
        partials = _Partials(batch, fresh)
        secured = partials.agreed() and _secure(
            runtime,
            batch.tree_cache,
            records,
            seq_lens,
            map_segments if runtime.extend_reads_segments else None,
            growing=len(fresh) < len(batch.reqs),
        )
        partials.settle(secured)
    if not secured:
        with runtime.memory.clock:
            for req in fresh:
                batch.tree_cache.give_back(req, runtime.requests.pop(sglang.slot(req)))
                batch.req_to_token_pool.free(req)
        raise PutOff(batch.reqs)
    runtime.memory.unfilled_tokens += _room(records, seq_lens, runtime.page_tokens)  # beside what decodes
    for req, prefix_len in zip(batch.reqs, prefix_lens, strict=True):
        if req in begins:
            runtime.memory.prefix_tokens_served += prefix_len
            runtime.memory.prompt_tokens += len(req.origin_input_ids) + len(req.output_ids)

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
        _prefix_slots(records, prefix_lens, runtime.page_tokens, batch.device),
        batch.req_to_token_pool,
    )
    for req, seq_len in zip(batch.reqs, seq_lens, strict=True):
        sglang.extended(req, seq_len)
    return out_cache_loc, slots_device, slots_cpu


def secure_decode(runtime: Runtime, tree: Any, reqs: list[Req]) -> bool:
    """Whether the next decode step of these requests has its memory. If so, they hold it already: what
    `alloc_for_decode` hands out is never refused."""
    return _secure_decode(runtime, tree, reqs, [runtime.sglang.committed(req) for req in reqs])


def alloc_for_decode(batch: ScheduleBatch, token_per_req: int) -> torch.Tensor:
    """The slot of each request's next token (int64, on the device). Raises `RuntimeError` if there is no room, which
    `secure_decode` would have told."""
    if token_per_req != 1:
        raise NotImplementedError(f"{token_per_req} tokens a decode step: speculative decoding is refused at start")
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    seq_lens: list[int] = batch.seq_lens_cpu.tolist()
    if not _secure_decode(runtime, batch.tree_cache, batch.reqs, seq_lens):
        memory = runtime.memory
        raise RuntimeError(
            f"no page for the next tokens of {len(seq_lens)} requests: {memory.available_pages()} are left below the "
            f"limit, {memory.pages.free_backed} of them backed. {batch.tree_cache.available_and_evictable_str()}"
        )
    tokens = runtime.page_tokens
    records = [runtime.requests[runtime.sglang.slot(req)] for req in batch.reqs]
    runtime.memory.unfilled_tokens = _room(records, seq_lens, tokens) - len(records)
    out = [record.pages[n // tokens] * tokens + n % tokens for n, record in zip(seq_lens, records, strict=True)]
    out_cache_loc = _to_device(np.array(out, dtype=np.int64), batch.device)
    # A copy: the batch advances seq_lens while this write may still be queued.
    batch.req_to_token_pool.write((batch.req_pool_indices, batch.seq_lens.clone()), out_cache_loc.to(torch.int32))
    for req in batch.reqs:
        runtime.sglang.decoded(req)
    return out_cache_loc


def _secure_decode(runtime: Runtime, tree: Any, reqs: list[Req], seq_lens: list[int]) -> bool:
    slots = [runtime.sglang.slot(req) for req in reqs]
    records = [runtime.requests[slot] for slot in slots]

    def map_segments(_: int) -> None:
        for slot in slots:
            runtime.map_request(slot)

    lengths = [n + 1 for n in seq_lens]
    reads = map_segments if runtime.decode_reads_segments else None
    with runtime.memory.clock:
        return _secure(runtime, tree, records, lengths, reads, growing=True)


def _shared_prefix(batch: ScheduleBatch, req: Req, prefix_len: int, runtime: Runtime) -> RequestPages:
    """The record of a request that starts: it has the whole pages that the tree matched, and nothing of its own."""
    tokens = runtime.page_tokens
    pages = batch.tree_cache.path_pages(req.last_node) if prefix_len >= tokens else []
    inside = req.vtensor_partial.tokens if prefix_len % tokens else 0
    if prefix_len % tokens != inside or prefix_len // tokens > len(pages):
        raise RuntimeError(
            f"request {req.rid} matched {prefix_len} tokens, but its path in the tree holds {len(pages)} pages of "
            f"{tokens}: the tree and the pages disagree"
        )
    return RequestPages(pages[: prefix_len // tokens], prefix_len // tokens)


def _secure(
    runtime: Runtime,
    tree: Any,
    records: list[RequestPages],
    lengths: list[int],
    map_segments: Callable[[int], None] | None,
    *,
    growing: bool,
) -> bool:
    """Give each record the pages that its length (in tokens) takes, and map them: `map_segments` is told how many are
    new. False if there is no memory: then no record has more than before, here and on every other rank. What is
    `growing` runs, and a lowered limit lets it.

    If the pool, the limit or the driver is short of pages, the tree is evicted of as many first: what it held is
    backed.
    """
    wanted = [
        runtime.memory.layout.pages_for(length) - len(record.pages)
        for length, record in zip(lengths, records, strict=True)
    ]
    total = sum(wanted)
    if not total and map_segments is None:
        return True
    short = total - runtime.memory.room()
    if short > 0:
        tree.evict(EvictParams(num_tokens=short * runtime.page_tokens))
    if _attempt(runtime, records, wanted, map_segments, growing):
        return True
    # Whatever was refused, and on whichever rank: all of them give up the same, kept pages first.
    evict = total - runtime.memory.forget_tails(total)
    tree.evict(EvictParams(num_tokens=evict * runtime.page_tokens))
    return _attempt(runtime, records, wanted, map_segments, growing)


def _attempt(
    runtime: Runtime,
    records: list[RequestPages],
    wanted: list[int],
    map_segments: Callable[[int], None] | None,
    growing: bool,
) -> bool:
    """Pages and mappings for all of the records, or for none."""
    pages = runtime.memory.allocate(sum(wanted), growing=growing)
    if pages is None:
        return runtime.agree(False)
    handed = iter(pages)
    for record, count in zip(records, wanted, strict=True):
        record.pages.extend(next(handed) for _ in range(count))
    if runtime.agree(_mapped(map_segments, len(pages))):
        return True
    for record, count in zip(records, wanted, strict=True):
        if count:
            del record.pages[-count:]
    runtime.memory.free(pages)
    return False


def _mapped(map_segments: Callable[[int], None] | None, new: int) -> bool:
    if map_segments is not None:
        try:
            map_segments(new)
        except VMMError as error:
            logger.debug("a batch cannot be mapped now: %s", error)
            return False
    return True


def _room(records: list[RequestPages], lengths: list[int], tokens: int) -> int:
    """Tokens that there is room for in the pages of requests of these lengths."""
    return sum(len(record.pages) for record in records) * tokens - sum(lengths)


def _slots(pages: list[int], start: int, stop: int, tokens: int) -> np.ndarray:
    """The slots of tokens `start` to `stop` (int64) of a request with these pages."""
    first = start // tokens
    starts = np.array(pages[first : -(-stop // tokens)], dtype=np.int64) * tokens
    slots = (starts[:, None] + np.arange(tokens)).reshape(-1)
    return slots[start - first * tokens : stop - first * tokens]


def _prefix_slots(records: list[RequestPages], prefix_lens: list[int], tokens: int, device: str) -> list[torch.Tensor]:
    """The slots of what comes before the new tokens of each request (int64, on the device), made there of its pages."""
    counts = [-(-prefix_len // tokens) for prefix_len in prefix_lens]
    pages = [page for record, count in zip(records, counts, strict=True) for page in record.pages[:count]]
    first = _to_device(np.array(pages, dtype=np.int64) * tokens, device)
    slots = (first[:, None] + torch.arange(tokens, device=device)).reshape(-1)
    of_each = slots.split([count * tokens for count in counts])
    return [own[:prefix_len] for own, prefix_len in zip(of_each, prefix_lens, strict=True)]


def _to_device(array: np.ndarray, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if is_pin_memory_available(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
