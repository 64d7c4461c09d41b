"""One rank's KV memory as SGLang uses it: the memory, and which request has which pages.

Page ids are known on the host from the moment they are handed out, so nothing here reads them back from the device
(invariant 6). A request's record lives from its first extend to its release:

    pages    [ 0 ........ protected | protected ........ len )
              owned by tree nodes,   owned by the request, the
              which it has locked    last one partly written
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_vtensor.manager import KVMemory
from sglang_vtensor.pages import Tail
from sglang_vtensor.segments import Segment

if TYPE_CHECKING:
    from sglang_vtensor.srt.batch_sharing import BatchSharing
    from sglang_vtensor.srt.metrics import Metrics
    from sglang_vtensor.srt.requests import Requests


#: So many pages are mapped for an extend batch, at most, if its kernel can read pages instead; beside the new ones,
#: where segments are worth that. A page takes the driver 25 us (H200), and two to four times as long where other
#: processes map on that host too; a batch that waits for it is a batch later.
MAX_MAPS_AHEAD = 32

#: What is told of shared decode where there is none.
NO_SHARING = dict.fromkeys(("decode_steps_shared", "decode_steps_plain", "shared_bytes_saved", "grouping_seconds"), 0)


@dataclass(slots=True)
class RequestPages:
    """The pages of a running request, in the order of its tokens, and the segment they are mapped in."""

    pages: list[int]
    protected: int
    #: It may show other pages, or fewer: those that the tree swapped since, or that were evicted while the request
    #: waited. Nothing reads it before `Runtime.map_request` has compared it with `pages`.
    segment: Segment | None = None


@dataclass(slots=True, frozen=True)
class Extend:
    """A request of an extend batch: of its pages it found `shared` in the tree; its segment is to be `adopt`, if that
    is given; and it has `new` tokens of a context of `context`."""

    slot: int
    shared: int
    adopt: Segment | None
    new: int
    context: int


@dataclass(slots=True)
class Partial:
    """What a match found inside a page: its first `tokens` are those of the request, whose own page is to begin so.

    They are copied from `page`, which `node` holds; or `tail` is that page, which nobody owns, and is claimed.
    """

    page: int
    tokens: int
    node: Any = None
    tail: Tail | None = None


def slots_of(pages: Sequence[int], tokens: int) -> torch.Tensor:
    """The slots of these pages of so many tokens (int64, on the host)."""
    first = torch.tensor(pages, dtype=torch.int64) * tokens
    return (first[:, None] + torch.arange(tokens)).reshape(-1)


class Runtime:
    """Ties a `KVMemory` to SGLang's request slots.

    `segment_of[slot]` is the index of the segment that a request reads, for the attention backend; meaningful only
    for slots of the batch being launched, if `extend_reads_segments` (or `decode_reads_segments`) says that kernels
    read segments at all; and not where that batch is to be read by pages (`by_pages`).
    """

    def __init__(self, memory: KVMemory, num_request_slots: int, sglang: Requests) -> None:
        self.memory = memory
        #: How the running version of SGLang keeps requests.
        self.sglang = sglang
        self.requests: dict[int, RequestPages] = {}
        self.segment_of = np.zeros(num_request_slots, dtype=np.int64)
        #: Copies that the next batch begins with: source page, target page, tokens.
        self.copies: list[tuple[int, int, int]] = []
        self._device_table: torch.Tensor | None = None
        self._flying: deque[tuple[int, torch.cuda.Event]] = deque()
        self.extend_reads_segments = False
        self.decode_reads_segments = False
        #: Whether the kernels for extend can read pages too, about as fast as segments.
        self.extend_reads_pages = False
        #: Whether a batch of so many new tokens, over contexts of so many, is so much faster over segments that mapping
        #: its new pages first is worth it.
        self.segments_pay: Callable[[Sequence[int], Sequence[int]], bool] = lambda new, contexts: False
        #: The extend batch that is launched next reads pages: mapping its segments would have held it up.
        self.by_pages = False
        self.extends_by_pages = 0
        #: Where decode may read what requests share once.
        self.sharing: BatchSharing | None = None
        #: Requests that waited for a prefix that another one was computing.
        self.awaited_prefixes = 0
        #: Made with the first batch, where the server is asked for metrics.
        self.metrics: Metrics | None = None
        self.tree_stats: Callable[[], dict[str, int]] = dict
        self.elastic_stats: Callable[[], dict[str, int]] = dict
        self._group: torch.distributed.ProcessGroup | None = None

    @property
    def page_tokens(self) -> int:
        return self.memory.layout.page_tokens

    # Several ranks (invariant 8): what one of them was refused, none of them has.

    def use_group(self, group: torch.distributed.ProcessGroup | None) -> None:
        """The ranks that schedule the same batches, on the host's process group; None for a single one."""
        self._group = group if group is not None and group.size() > 1 else None

    @property
    def several_ranks(self) -> bool:
        return self._group is not None

    def agree(self, done: bool) -> bool:
        """Whether every rank has done it. All of them must ask, at the same point of the same batch."""
        if self._group is None:
            return done
        vote = torch.tensor(int(done))
        with self.memory.clock:
            torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(vote)

    def missing_tokens(self) -> int:
        """Tokens that the pool's size promises and that are not to be had; admission is to count without them.

        Where there are several ranks, the limit's only: what drivers refuse differs, and they find out by `agree`.
        """
        memory = self.memory
        pages = memory.missing_pages() if self._group is None else memory.pages.limit - memory.allowance
        return pages * self.page_tokens

    def map_request(self, slot: int, *, shared: int = 0, adopt: Segment | None = None) -> None:
        """Lease (adopt, extend, reconcile) the segment of a request that the next batch reads.

        Every batch that reads segments passes here. What a segment shows is compared page by page with what the request
        has: it may have been mapped ahead of an eviction, or for pages that the tree swapped for equal ones.
        """
        record = self.requests[slot]
        segment = record.segment
        if segment is None or not self.memory.shows(segment, record.pages):
            record.segment = segment = self.memory.lease(segment or adopt, record.pages, shared=shared)
        else:
            segment.busy_until = self.memory.next_epoch
        self.segment_of[slot] = segment.index

    def map_extend(self, batch: Sequence[Extend], new_pages: int) -> None:
        """Segments for an extend batch that has got `new_pages`.

        What was not mapped ahead would be mapped now, with everything waiting for it. If that is much, the batch reads
        pages, and the worker maps, for the next chunk or turn.
        """
        self.by_pages = self.extend_reads_pages and self.waits_for(batch, new_pages) > MAX_MAPS_AHEAD
        for extend in batch:
            slot, adopt = extend.slot, extend.adopt
            record = self.requests[slot]
            if adopt is not None and adopt.owner is None:
                adopt = None  # given up since for a request before this one, which found no idle segment
            if not self.by_pages:
                self.map_request(slot, shared=extend.shared, adopt=adopt)
            else:
                record.segment = self.memory.lease_later(record.segment or adopt, record.pages)
        self.extends_by_pages += self.by_pages

    def waits_for(self, batch: Sequence[Extend], new_pages: int) -> int:
        """Pages that the segments of these requests do not show yet; without the new ones, if segments are worth
        that."""
        missing = 0
        for extend in batch:
            record = self.requests[extend.slot]
            missing += len(record.pages) - self.memory.shown(record.segment or extend.adopt, record.pages)
        if missing > MAX_MAPS_AHEAD and self.segments_pay(
            [extend.new for extend in batch], [extend.context for extend in batch]
        ):
            missing -= new_pages
        return missing

    def copy_partials(self) -> None:
        """Make the copies that the next batch begins with, on the current stream: behind the batches that wrote the
        sources, and that may still write to what the targets were before."""
        with self.memory.clock:
            for source, target, tokens in self.copies:
                self.memory.copy_tokens(source, target, tokens)
        self.copies.clear()

    def end_request(self, slot: int, allocated_tokens: int) -> RequestPages:
        """Take the record of a request that is over. The page of a next token that is not to come is freed."""
        record = self.requests.pop(slot)
        if self.sharing is not None:
            self.sharing.left(slot)
        used = self.memory.layout.pages_for(allocated_tokens)
        self.memory.free(record.pages[used:])
        del record.pages[used:]
        return record

    # On a GPU: the same table on the device, and the batches in flight.

    def use_device_table(self) -> None:
        """Keep `segment_of` on the device too. Slot 0, SGLang's padding request, reads the padding page."""
        self.segment_of[0] = self.memory.pin_padding().index
        self._device_table = torch.from_numpy(self.segment_of).to(self.memory.vmm.device, torch.int32)

    def publish_segments(self, slots: list[int], slots_device: torch.Tensor) -> None:
        """Write the segments of these slots (a list, and the same int64 on the device) into the device's table.

        On the current stream, which runs before the forward pass that reads the table, and after the one before it.
        """
        if self._device_table is not None:
            with self.memory.clock:
                segments = torch.from_numpy(self.segment_of[slots].astype(np.int32)).pin_memory()
                self._device_table[slots_device] = segments.to(self.memory.vmm.device, non_blocking=True)

    def device_segments(self, slots: torch.Tensor) -> torch.Tensor:
        """The segments (int32, on the device) of request slots (on the device)."""
        assert self._device_table is not None
        return self._device_table[slots]

    def launched(self, stream: torch.cuda.Stream) -> None:
        """A batch was launched on `stream`. Batches that are done by now are told to the memory; nothing waits."""
        with self.memory.clock:
            event = torch.cuda.Event()
            event.record(stream)
            self._flying.append((self.memory.launch(), event))
            self.poll()

    def poll(self) -> None:
        """Tell the memory which batches are done."""
        with self.memory.clock:
            while self._flying and self._flying[0][1].query():
                self.memory.complete(self._flying.popleft()[0])

    def idle(self) -> None:
        """Between two batches, with none to be made now. What was freed since the last one is read by nobody once all
        are done, although no next one is launched that would say so."""
        self.poll()
        if not self._flying:
            self.memory.complete(self.memory.launch())
        if not self.requests:
            self.memory.unfilled_tokens = 0
        self.memory.give_way()

    def clear(self) -> None:
        """Forget every request and free every page: the caches are flushed."""
        self.requests.clear()
        self.copies.clear()
        if self.sharing is not None:
            self.sharing.clear()
        self.memory.free_all()

    def stats(self) -> dict[str, Any]:
        """What `sglang-vtensor stats` shows: the memory's statistics, the tree's, and the running requests."""
        tree = self.tree_stats()
        stats: dict[str, Any] = self.memory.stats().as_dict()
        stats.update(tree)
        stats.update(self.elastic_stats())
        stats.update(NO_SHARING if self.sharing is None else self.sharing.stats())
        stats["requests"] = len(self.requests)
        stats["awaited_prefixes"] = self.awaited_prefixes
        stats["extends_by_pages"] = self.extends_by_pages
        stats["pages_cached"] = tree.get("tree_tokens", 0) // self.page_tokens
        stats["pages_live"] = stats["pages_owned"] - stats["pages_cached"]
        return stats

    def check_integrity(self) -> None:
        """Every owned page has one owner among requests and nodes, as far as this side can see."""
        self.memory.check_integrity()
        own = [page for record in self.requests.values() for page in record.pages[record.protected :]]
        assert len(own) == len(set(own)), "two requests own one page"

    def check_batch(
        self, slots: Sequence[int], contexts: Sequence[int], table: torch.Tensor | None, *, decode: bool
    ) -> bool:
        """Whether the batch that is about to be launched reads segments. Raises `AssertionError` where that, or
        SGLang's table of slots (if it is given), shows any of its requests (`contexts` tokens each) what is not its
        own."""
        tokens = self.page_tokens
        by_segments = self.decode_reads_segments if decode else self.extend_reads_segments and not self.by_pages
        for slot, context in zip(slots, contexts, strict=True):
            pages = self.requests[slot].pages[: self.memory.layout.pages_for(context)]
            assert len(pages) * tokens >= context, f"slot {slot}: {len(pages)} pages for {context} tokens"
            if table is not None:
                positions = torch.arange(context)
                own = torch.tensor(pages)[positions // tokens] * tokens + positions % tokens
                assert table[slot, :context].cpu().tolist() == own.tolist(), f"slot {slot}: not its pages in the table"
            if by_segments:
                segment, read = self.requests[slot].segment, self.segment_of[slot]
                assert segment is not None, f"slot {slot} reads segment {read}, and has none"
                assert segment.index == read, f"slot {slot} reads segment {read}, and has {segment}"
                assert segment.pages[: len(pages)] == pages, f"slot {slot}: {segment}, and its pages are {pages}"
        return by_segments
