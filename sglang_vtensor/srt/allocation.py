"""Handing frames to the requests of a batch: SGLang's `alloc_for_extend` and `alloc_for_decode`.

SGLang allocates for a batch of lengths; here it is for requests, because which slot a token goes to must be known on
the host (invariant 6), and because a request goes on where its last frame is.

The driver may refuse what the pool's size promised. Then a batch gets nothing of what it asked for, on any rank: an
extend batch is put off (`PutOff`), and a decode batch is told before it is made (`secure_decode`), so that SGLang
retracts requests until the rest fits (invariant 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocation import alloc_req_slots, write_cache_indices
from sglang.srt.utils.common import is_pin_memory_available

from sglang_vtensor.srt.runtime import Partial, RequestFrames, Runtime

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class _Partials:
    """The requests of a batch that begin inside a page (`Partial`): claims what is to be claimed before the batch takes
    frames, holds what is to be copied while it does, and asks for the copies."""

    def __init__(self, batch: ScheduleBatch, reqs: list[Req]) -> None:
        self._batch = batch
        self._runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
        self._reqs = reqs
        prefix = self._runtime.sglang.prefix
        self._found = [(req, req.vtensor_partial) for req in reqs if prefix(req) % self._runtime.page_tokens]
        self._claimed: dict[int, Req] = {}  # by frame
        self._locked: list[Partial] = []
        self._there = True
        for req, partial in self._found:
            if partial.begun is not None:
                # Written by a batch in front of this one. Should its request end meanwhile, the page stays until this
                # batch is done (invariant 3).
                self._there = self._there and self._runtime.writes_in(partial.begun)
            elif partial.node is None:
                # Of several that continue one tail the first claims it, and the others copy from its page, which is
                # written to behind what they copy, and later.
                if partial.frame not in self._claimed and self._claim(req, partial):
                    continue
                self._there = self._there and partial.frame in self._claimed
            elif partial.node.gone:
                self._there = False
            else:
                batch.tree_cache.inc_lock_ref(partial.node)
                if self._runtime.window is not None:
                    self._runtime.window.hold([partial.frame])
                self._locked.append(partial)

    def agreed(self) -> bool:
        """Whether all that the matches found is still there, on every rank. It is, as nothing evicts the tree between
        match and allocation. Only where the limit leaves no page to claim it is not, or where a request was preempted
        that kept the window of another: then the batch waits and is matched again."""
        window = self._runtime.window
        if window is not None:
            for req in self._reqs:
                record = self._record(req)
                self._there = self._there and all(map(window.there, record.frames[record.behind : record.protected]))
            self._there = self._there and all(window.there(partial.frame) for partial in self._locked)
        votes = self._found or window is not None  # alike on every rank
        return self._runtime.agree(self._there) if votes else self._there

    def _claim(self, req: Req, partial: Partial) -> bool:
        assert partial.tail is not None
        frame = self._runtime.memory.tails.claim(partial.tail)
        if frame is None:
            return False
        self._claimed[frame] = req
        self._record(req).frames.append(frame)
        return True

    def _record(self, req: Req) -> RequestFrames:
        return self._runtime.requests[self._runtime.sglang.slot(req)]

    def settle(self, secured: bool) -> None:
        """The batch has its frames, or waits."""
        for partial in self._locked:
            self._batch.tree_cache.dec_lock_ref(partial.node)
            if self._runtime.window is not None:
                self._runtime.window.release([partial.frame], self._runtime.memory.next_epoch)
        if not secured:
            for req, partial in self._found:
                if self._claimed.get(partial.frame) is req:
                    self._runtime.memory.tails.unclaim(partial.tail, partial.frame)
            for req in self._reqs:
                req.vtensor_whole_pages = True  # what it would copy from may be just what has to be evicted
            return
        for req in self._reqs:
            req.vtensor_whole_pages = False  # should it be retracted, it may begin inside a page again
        every = range(len(self._runtime.memory.sides))
        for req, partial in self._found:
            record = self._record(req)
            if self._claimed.get(partial.frame) is req:
                self._batch.tree_cache.note_claimed(req, record, partial)
            frame = record.frames[record.protected]
            if frame != partial.frame:
                self._runtime.copies.append((partial.frame, frame, partial.tokens, every))


class PutOff(RuntimeError):
    """There is no memory for this extend batch now. It holds nothing that it did not hold before; it is to wait."""

    def __init__(self, reqs: list[Req]) -> None:
        super().__init__(f"no memory for {len(reqs)} requests")
        self.reqs = reqs


def alloc_for_extend(batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames and slots for the new tokens of each request.

    Returns the new slots (int64, on the device, all requests one after another) and the request slots (int64, on the
    device and on the host). Raises `PutOff` if there is no memory; requests that just began then hold no slot either,
    and no state.
    """
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    sglang = runtime.sglang
    fresh = [req for req in batch.reqs if not sglang.begun(req)]  # from here on, all of them have a row
    begins = set(fresh)
    states: list[list[int]] = []
    if runtime.states is not None:
        with runtime.memory.clock:
            found = runtime.states.begin(batch.tree_cache, fresh)
        if found is None:
            raise PutOff(batch.reqs)
        states = found
    slots = alloc_req_slots(batch.req_to_token_pool, batch.reqs, batch.tree_cache)
    prefix_lens: list[int] = batch.prefix_lens
    seq_lens: list[int] = batch.seq_lens_cpu.tolist()

    records = []
    runtime.changes += 1  # by frames, and by what is unfilled: the next decode step counts that anew
    with runtime.memory.clock:
        for req, slot, prefix_len in zip(batch.reqs, slots, prefix_lens, strict=True):
            if req in begins:
                runtime.begin(slot, _shared_prefix(batch, req, prefix_len, runtime))
            records.append(runtime.requests[slot])
        for req, own in zip(fresh, states, strict=bool(states)):
            runtime.requests[sglang.slot(req)].states = list(own)

    with runtime.memory.clock:
        # What a chunk left in its last page is counted already, and the next one fills it.
        counted = sum(
            _room([record], [prefix_len], runtime.page_tokens)
            for req, record, prefix_len in zip(batch.reqs, records, prefix_lens, strict=True)
            if req not in begins
        )
        partials = _Partials(batch, fresh)
        secured = partials.agreed() and _secure(
            runtime,
            batch.tree_cache,
            records,
            seq_lens,
            growing=len(fresh) < len(batch.reqs),
        )
        partials.settle(secured)
    if not secured:
        with runtime.memory.clock:
            for req in fresh:
                runtime.drop(req)
                batch.req_to_token_pool.free(req)
        raise PutOff(batch.reqs)
    if runtime.states is not None:
        runtime.states.begun()
    runtime.memory.unfilled_tokens += _room(records, seq_lens, runtime.page_tokens) - counted  # beside what decodes
    _slide(runtime, records, prefix_lens)
    if runtime.window is not None:
        for req, record in zip(batch.reqs, records, strict=True):
            # What comes of given embeddings, for instance, never goes to the tree.
            kept_from_it = batch.tree_cache.disable or getattr(req, "skip_radix_cache_insert", False)
            record.awaited = not kept_from_it
    counts = runtime.memory.counts
    for req, prefix_len in zip(batch.reqs, prefix_lens, strict=True):
        if req in begins:
            counts["prefix_tokens"] += prefix_len
            counts["prompt_tokens"] += len(req.origin_input_ids) + len(req.output_ids)
            counts["shared"] += runtime.requests[sglang.slot(req)].protected

    out = [
        _slots(record.frames, start, stop, runtime.page_tokens)
        for record, start, stop in zip(records, prefix_lens, seq_lens, strict=True)
    ]
    out_cache_loc = _to_device(torch.from_numpy(np.concatenate(out)), batch.device)
    slots_cpu = torch.tensor(slots, dtype=torch.int64)
    slots_device = slots_cpu.to(batch.device, non_blocking=True)
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
    committed, slot = runtime.sglang.committed, runtime.sglang.slot
    with runtime.memory.clock:
        full, before = runtime.decode.full(reqs), runtime.changes
        if full is None:
            records = [runtime.requests[slot(req)] for req in reqs]
            return _secure_decode(runtime, tree, records, [committed(req) for req in reqs])
        if not full[0]:
            return True
        done = _secure_decode(runtime, tree, *full)
        if done:
            runtime.memory.unfilled_tokens += len(full[0]) * runtime.page_tokens
            runtime.decode.grown(before)
        return done


def alloc_for_decode(batch: ScheduleBatch, token_per_req: int) -> torch.Tensor:
    """The slot of each request's next token (int64, on the device). Raises `RuntimeError` if there is no room, which
    `secure_decode` would have told."""
    if token_per_req != 1:
        raise NotImplementedError(f"{token_per_req} tokens a decode step: speculative decoding is refused at start")
    runtime: Runtime = batch.token_to_kv_pool_allocator.runtime
    lengths: torch.Tensor = batch.seq_lens_cpu
    with runtime.memory.clock:
        places = runtime.decode.next(batch.reqs, lengths)
        if places is not None:
            runtime.memory.unfilled_tokens -= len(places)
        else:
            slot, seq_lens = runtime.sglang.slot, lengths.tolist()
            records = [runtime.requests[slot(req)] for req in batch.reqs]
            if _secure_decode(runtime, batch.tree_cache, records, seq_lens):
                _slide(runtime, records, seq_lens)
                runtime.memory.unfilled_tokens = _room(records, seq_lens, runtime.page_tokens) - len(records)
                places = runtime.decode.look(batch.reqs, records, lengths)
    if places is None:
        memory = runtime.memory
        raise RuntimeError(
            f"no page for the next tokens of {len(lengths)} requests: {memory.available_pages()} are left below the "
            f"limit, {memory.free_backed} of them backed. {batch.tree_cache.available_and_evictable_str()}"
        )
    out_cache_loc = _to_device(places, batch.device)
    # A copy: the batch advances seq_lens while this write may still be queued.
    batch.req_to_token_pool.write((batch.req_pool_indices, batch.seq_lens.clone()), out_cache_loc.to(torch.int32))
    for req in batch.reqs:
        runtime.sglang.decoded(req)
    return out_cache_loc


def _secure_decode(runtime: Runtime, tree: Any, records: list[RequestFrames], seq_lens: list[int]) -> bool:
    tokens = runtime.page_tokens
    if all(n < len(record.frames) * tokens for n, record in zip(seq_lens, records, strict=True)):
        return True  # nearly always: a page is taken once in so many tokens
    return _secure(runtime, tree, records, [n + 1 for n in seq_lens], growing=True)


def _shared_prefix(batch: ScheduleBatch, req: Req, prefix_len: int, runtime: Runtime) -> RequestFrames:
    """The record of a request that starts: it has the whole pages that the tree matched, and nothing of its own."""
    tokens = runtime.page_tokens
    frames = batch.tree_cache.path_frames(req.last_node) if prefix_len >= tokens else []
    inside = req.vtensor_partial.tokens if prefix_len % tokens else 0
    if prefix_len % tokens != inside or prefix_len // tokens > len(frames):
        raise RuntimeError(
            f"request {req.rid} matched {prefix_len} tokens, but its path in the tree holds {len(frames)} pages of "
            f"{tokens}: the tree and the frames disagree"
        )
    found = prefix_len // tokens
    record = RequestFrames(frames[:found], found, found, leaf=req.last_node)
    if runtime.window is not None:
        runtime.window.begins(record, prefix_len)
    return record


def _secure(runtime: Runtime, tree: Any, records: list[RequestFrames], lengths: list[int], *, growing: bool) -> bool:
    """Give each record the frames that its length (in tokens) takes. False if there is no memory: then no record has
    more than before, here and on every other rank. What is `growing` runs, and a lowered limit lets it.

    If the limit or the driver is short of pages, the tree is evicted of as many first: what it held is backed.
    Batches that are done by now are noted before, so that what only they read can be given back for this.
    """
    tokens = runtime.page_tokens
    lacking = [
        (record, pages)
        for record, length in zip(records, lengths, strict=True)
        if (pages := -(-length // tokens) - len(record.frames)) > 0
    ]
    if not lacking:
        return True
    runtime.poll()
    total = sum(pages for _, pages in lacking)
    short = total - runtime.memory.room()
    if short > 0:
        tree.reclaim(short)
    if _attempt(runtime, lacking, growing):
        return True
    # Whatever was refused, and on whichever rank: all of them give up the same, kept pages first.
    tree.reclaim(total - runtime.memory.tails.forget_some(total))
    return _attempt(runtime, lacking, growing)


def _attempt(runtime: Runtime, lacking: list[tuple[RequestFrames, int]], growing: bool) -> bool:
    """So many frames more for each of these records on every rank, or for none."""
    asks = [record.ask(count) for record, count in lacking]
    placed = runtime.memory.allocate(asks, growing=growing)
    if not runtime.agree(placed is not None):
        for frames in placed or []:
            runtime.memory.free(frames, runtime.last_reader)  # their pages may be what a copy is yet to read
        return False
    assert placed is not None
    runtime.changes += 1
    for (record, _), frames in zip(lacking, placed, strict=True):
        record.frames += frames
    return True


def _slide(runtime: Runtime, records: list[RequestFrames], starts: list[int]) -> None:
    """The batch computes tokens from these on."""
    if runtime.window is not None:
        for record, start in zip(records, starts, strict=True):
            runtime.window.slide(record, start)


def _room(records: list[RequestFrames], lengths: list[int], tokens: int) -> int:
    """Tokens that there is room for in the pages of requests of these lengths."""
    return sum(len(record.frames) for record in records) * tokens - sum(lengths)


def _slots(frames: list[int], start: int, stop: int, tokens: int) -> np.ndarray:
    """The slots of tokens `start` to `stop` (int64) of a request with these frames."""
    first = start // tokens
    starts = np.array(frames[first : -(-stop // tokens)], dtype=np.int64) * tokens
    slots = (starts[:, None] + np.arange(tokens)).reshape(-1)
    return slots[start - first * tokens : stop - first * tokens]


def _prefix_slots(records: list[RequestFrames], prefix_lens: list[int], tokens: int, device: str) -> list[torch.Tensor]:
    """The slots of what comes before the new tokens of each request (int64, on the device), made there of frames."""
    counts = [-(-prefix_len // tokens) for prefix_len in prefix_lens]
    frames = [frame for record, count in zip(records, counts, strict=True) for frame in record.frames[:count]]
    first = _to_device(torch.tensor(frames, dtype=torch.int64) * tokens, device)
    slots = (first[:, None] + torch.arange(tokens, device=device)).reshape(-1)
    of_each = slots.split([count * tokens for count in counts])
    return [own[:prefix_len] for own, prefix_len in zip(of_each, prefix_lens, strict=True)]


def _to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    if is_pin_memory_available(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
