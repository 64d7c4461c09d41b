"""What the parts of `srt` share: the memory, and which request has which frames.

Frames are known on the host from the moment they are handed out, so nothing here reads them back from the device
(invariant 6). A request's record lives from its first extend to its release:

    frames   [ 0 ........ protected | protected ........ len )
              owned by tree nodes,   owned by the request, the
              which it has locked    last one partly written
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sglang_vtensor.handout import Ask
from sglang_vtensor.history import History
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.placement import runs_of
from sglang_vtensor.srt.decode_batch import DecodeBatch
from sglang_vtensor.srt.memory_map import LINES, lines
from sglang_vtensor.srt.window_side import SIDE, WindowSide
from sglang_vtensor.tails import Tail

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.kernels.compiling import Compiling
    from sglang_vtensor.srt.batch_sharing import BatchSharing
    from sglang_vtensor.srt.metrics import Metrics
    from sglang_vtensor.srt.requests import Requests
    from sglang_vtensor.srt.state_side import StateSide

#: What is told of shared decode where there is none.
NO_SHARING = dict.fromkeys(("decode_steps_shared", "decode_steps_plain", "shared_bytes_saved", "grouping_seconds"), 0)


@dataclass(slots=True)
class RequestFrames:
    """The frames of a running request, in the order of its tokens; the first `protected` of them are the tree's. Those
    before `own` were there before it, and those before `behind` are behind its window. `leaf` is the tree's node that
    the `protected` ones end with. With a window it is `awaited` from an extend batch until the tree has got what that
    computed. With states, `states` are the slots of its own and of its tracks; None: the tree has got that."""

    frames: list[int]
    protected: int
    own: int
    behind: int = 0
    leaf: Any = None
    awaited: bool = False
    states: list[int | None] = field(default_factory=list)

    def ask(self, count: int) -> Ask:
        """What to ask the memory for, to get `count` more frames behind the last one."""
        after = self.frames[-1] if self.frames else None
        return Ask(after, count, own=len(self.frames) > self.protected)


@dataclass(slots=True, eq=False)
class Begun:
    """An unfilled page of a running request, which goes on writing behind what it has there: page `page` of its
    context, the first one of its own (`Runtime.writes_in`)."""

    slot: int
    record: RequestFrames
    page: int


@dataclass(slots=True)
class Partial:
    """What a match found inside a page: its first `tokens` are those of the request, whose own page is to begin so.

    They are copied from `frame`, which `node` holds, or which is that of `begun`; or `tail` is that frame, which nobody
    owns, and is claimed.
    """

    frame: int
    tokens: int
    node: Any = None
    tail: Tail | None = None
    begun: Begun | None = None


def slots_of(frames: Sequence[int], tokens: int) -> torch.Tensor:
    """The slots of these frames of so many tokens (int64, on the host)."""
    first = torch.tensor(frames, dtype=torch.int64) * tokens
    return (first[:, None] + torch.arange(tokens)).reshape(-1)


class Runtime:
    """Ties a `KVMemory` to SGLang's request slots, of which there are `request_slots`. `reach` says how many tokens
    before one the second side is read, where there are two; `chunk`, how many tokens of a request an extend batch
    computes at most."""

    def __init__(
        self,
        memory: KVMemory,
        request_slots: int,
        sglang: Requests,
        *,
        reach: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self.memory = memory
        self.window = None if reach is None else WindowSide(self, reach, chunk)
        #: Set where the model has states, once there is SGLang's pool of requests.
        self.states: StateSide | None = None
        self.request_slots = request_slots
        #: How the running version of SGLang keeps requests.
        self.sglang = sglang
        self.requests: dict[int, RequestFrames] = {}
        #: How often a request's frames changed, or which requests there are. To be counted by who does that.
        self.changes = 0
        self.decode = DecodeBatch(self)
        #: The request slots of the batch that is being launched, in its order; else none.
        self.batch: list[int] = []
        #: Copies that the next batch begins with: source frame, target frame, tokens, and of which sides.
        self.copies: list[tuple[int, int, int, Sequence[int]]] = []
        self._flying: deque[tuple[int, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []  # of batches that are done
        #: Where decode may read what requests share once.
        self.sharing: BatchSharing | None = None
        #: Kernels that are compiled while the server starts, and behind that.
        self.compiling: list[Compiling] = []
        #: The most bytes that admission counted as lacking since memory was last found to have come.
        self.lacked = 0
        #: Requests that waited for a prefix that another one was computing.
        self.awaited_prefixes = 0
        #: Tokens that launched batches computed for answers: what requests were given, and for each that ended at most
        #: one more, where a batch was in flight by then.
        self.generated_tokens = 0
        #: Whether the next one who asks for the statistics gets the map of the memory too.
        self.map_wanted = False
        self.history = History(LINES, lambda: lines(self))
        #: Made with the first batch, where the server is asked for metrics.
        self.metrics: Metrics | None = None
        self.tree_stats: Callable[[], dict[str, int]] = dict
        self.elastic_stats: Callable[[], dict[str, int]] = dict
        self._group: torch.distributed.ProcessGroup | None = None

    @property
    def ends(self) -> WindowSide | StateSide | None:
        """What the ends of nodes have beside the memory of all tokens, where a match needs more than that."""
        return self.window or self.states

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
        """Whether every rank says `done`: a vote of the ranks. All of them must call this at the same point of the same
        batch."""
        if self._group is None:
            return done
        vote = torch.tensor(int(done))
        with self.memory.clock:
            torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(vote)

    def lacking_bytes(self) -> int:
        """How much of the budget cannot be had now, because of the limit or of the driver, or, where it has pages of
        several kinds, as a batch in flight reads it yet: pages of one kind cannot go for those of another then.
        Admission counts without it, and `lacked` keeps the most that it did.

        With several ranks only the limit counts, as it is the same for all; what one rank's driver refuses, the others
        learn by `agree`, and each has other batches in flight.
        """
        memory = self.memory
        if self.several_ranks:
            lacking = memory.budget.nbytes - memory.allowed_bytes
        else:
            lacking = memory.missing_bytes() + (0 if self.ends is None else memory.budget.flying)
        self.lacked = max(self.lacked, lacking)
        return lacking

    def missing_tokens(self) -> int:
        """The same in tokens of the pool's size."""
        return self.memory.in_pages(self.lacking_bytes()) * self.page_tokens

    def bytes_for(self, tokens: int) -> int:
        """What a request of so many tokens takes at most, on all sides."""
        nbytes = self.memory.layout.pages_for(tokens) * self.memory.layout.page_bytes
        if self.states is not None:
            nbytes += self.states.request_bytes
        return nbytes if self.window is None else nbytes + self.window.most_pages(tokens) * self.window.page_bytes

    def cached_bytes(self, evictable_tokens: int) -> int:
        """What cached pages take that are given up where memory is short, of which the first side has
        `evictable_tokens`."""
        nbytes = evictable_tokens // self.page_tokens * self.memory.layout.page_bytes
        if self.states is not None:
            nbytes += self.states.cached_bytes
        return nbytes if self.window is None else nbytes + self.window.spare * self.window.page_bytes

    def runs(self, slot: int, context: int) -> list[tuple[int, int]]:
        """The runs of the first `context` tokens of a request: `(first slot, tokens)` of each. Of SGLang's padding
        requests, and of those that only stand in for others while a graph is captured, that is the padding frame."""
        tokens, runs, left = self.page_tokens, [], context
        pages = self.memory.layout.pages_for(context)
        record = self.requests.get(slot)
        for first, count in runs_of([0] * pages if record is None else record.frames[:pages]):
            runs.append((first * tokens, min(left, count * tokens)))
            left -= count * tokens
        return runs

    def writes_in(self, begun: Begun) -> bool:
        """Whether the page is yet what it was: its request runs, no node has taken it, and it is behind no window."""
        record = begun.record
        return self.requests.get(begun.slot) is record and record.behind <= begun.page == record.protected

    @property
    def last_reader(self) -> int:
        """The epoch of the last batch that may read what is not needed from now on: one that was launched, unless the
        next one begins with copies."""
        return self.memory.next_epoch if self.copies else self.memory.launched

    def begin(self, slot: int, record: RequestFrames) -> None:
        """A request begins."""
        self.changes += 1
        self.requests[slot] = record

    def drop(self, req: Req) -> None:
        """Forget a request that has no page of its own."""
        self.changes += 1
        record = self.requests.pop(self.sglang.slot(req))
        if self.window is not None:
            self.window.over(record)
        if self.states is not None:
            self.states.over(req, record)

    def copy_partials(self) -> None:
        """Make the copies that the next batch begins with, on the current stream: behind the batches that wrote the
        sources, and that may still write to what the targets were before."""
        with self.memory.clock:
            for source, target, tokens, sides in self.copies:
                self.memory.copy_tokens(source, target, tokens, sides)
        self.copies.clear()

    def end_request(self, slot: int, allocated_tokens: int) -> RequestFrames:
        """Take the record of a request that is over. The frame of a next token that is not to come is freed."""
        self.changes += 1
        record = self.requests.pop(slot)
        if self.window is not None:
            self.window.over(record)
        if self.sharing is not None:
            self.sharing.left(slot)
        used = self.memory.layout.pages_for(allocated_tokens)
        self.memory.free(record.frames[used:], self.last_reader)
        del record.frames[used:]
        with self.memory.clock:
            left = len(record.frames) * self.page_tokens - allocated_tokens
            self.memory.unfilled_tokens = max(0, self.memory.unfilled_tokens - left)
            runs = sum(1 for _ in runs_of(record.frames))
            self.memory.ended(runs, sum(1 for _ in runs_of(record.frames[record.own :])))
        return record

    # On a GPU: the batches in flight.

    def launched(self, stream: torch.cuda.Stream, *, idle: bool) -> None:
        """A batch was launched on `stream`. Batches that are done by now are told to the memory; nothing waits. `idle`
        as for `KVMemory.launch`."""
        with self.memory.clock:
            event = self._spare.pop() if self._spare else torch.cuda.Event()
            event.record(stream)
            self._flying.append((self.memory.launch(idle=idle), event))
            self.poll()

    def poll(self) -> None:
        """Tell the memory which batches are done."""
        while self._flying and self._flying[0][1].query():
            epoch, event = self._flying.popleft()
            self.memory.complete(epoch)
            self._spare.append(event)

    def idle(self) -> None:
        """Between two batches, with none to be made now. It takes nothing of a thread that has nothing else to do, and
        the clock does not run."""
        self.poll()
        if not self._flying:
            self.memory.nothing_launched()
        if not self.requests:
            self.memory.unfilled_tokens = 0
            self.decode.forget()
        self.memory.give_way()

    def clear(self) -> None:
        """Forget every request and free every page: the caches are flushed."""
        self.changes += 1
        self.requests.clear()
        self.copies.clear()
        if self.ends is not None:
            self.ends.clear()
        if self.sharing is not None:
            self.sharing.clear()
        self.memory.free_all()

    def pages_cached(self) -> int:
        """Pages that the tree's nodes own."""
        return self.tree_stats().get("tree_tokens", 0) // self.page_tokens

    def stats(self) -> dict[str, Any]:
        """What `sglang-vtensor stats` shows: the memory's statistics, the tree's, and the running requests."""
        tree = self.tree_stats()
        stats: dict[str, Any] = self.memory.stats()
        stats.update(tree)
        stats.update(self.elastic_stats())
        stats.update(NO_SHARING if self.sharing is None else self.sharing.stats())
        stats["kernels_uncompiled"] = sum(compiling.left for compiling in self.compiling)
        stats["kernels_failed"] = sum(compiling.failed for compiling in self.compiling)
        stats["requests"] = len(self.requests)
        stats["awaited_prefixes"] = self.awaited_prefixes
        stats["generated_tokens"] = self.generated_tokens
        stats["pages_cached"] = self.pages_cached()
        stats["pages_live"] = stats["pages_owned"] - stats["pages_cached"]
        stats.update(self._bytes_by_state(stats))
        return stats

    def _bytes_by_state(self, stats: dict[str, Any]) -> dict[str, int]:
        """What the pages of each state take, on all sides: on the side of windows only some of a frame's owners need
        one. States of requests are live, and those of nodes are cached."""
        memory, states = self.memory, ("live", "cached", "kept")
        taken = {state: stats[f"pages_{state}"] * memory.layout.page_bytes for state in states}
        if self.window is not None:
            records, kept = self.requests.values(), stats["pages_kept"]
            live = sum(len(record.frames) - max(record.behind, record.protected) for record in records)
            cached = memory.backings[SIDE].used - live - kept
            for state, pages in zip(states, (live, cached, kept), strict=True):
                taken[state] += pages * memory.sides[SIDE].page_bytes
        if self.states is not None:
            cached = self.states.cached_bytes
            taken["cached"] += cached
            taken["live"] += stats["states_owned_bytes"] - cached
        return {f"{state}_bytes": nbytes for state, nbytes in taken.items()}

    def check_integrity(self) -> None:
        """Every owned frame has one owner among requests and nodes, as far as this side can see."""
        self.memory.check_integrity()
        own = [frame for record in self.requests.values() for frame in record.frames[record.protected :]]
        assert len(own) == len(set(own)), "two requests own one frame"

    def check_batch(self, slots: Sequence[int], contexts: Sequence[int], table: torch.Tensor | None) -> None:
        """Raises `AssertionError` where a request of the batch that is about to be launched (`contexts` tokens each)
        reads what is not its own by SGLang's `table` of slots (if that is given) or by its runs, or what has no
        memory (invariant 2); or where the batch begins with a copy of what need not have memory by then."""
        tokens = self.page_tokens
        for source, target, _, sides in self.copies:
            for backing in (self.memory.backings[side] for side in sides):
                for frame in (source, target):
                    there = backing.stays_until(frame, self.memory.next_epoch)
                    assert there, f"frame {frame} may be given back before the copy {source} -> {target}"
        for slot, context in zip(slots, contexts, strict=True):
            frames = self.requests[slot].frames[: self.memory.layout.pages_for(context)]
            assert len(frames) * tokens >= context, f"slot {slot}: {len(frames)} frames for {context} tokens"
            own = slots_of(frames, tokens)[:context].tolist()
            if table is not None:
                assert table[slot, :context].tolist() == own, f"slot {slot}: not its frames in the table"
            runs = [first + n for first, count in self.runs(slot, context) for n in range(count)]
            assert runs == own, f"slot {slot}: not its frames in its runs"
            assert all(map(self.memory.backing.uses, frames)), f"slot {slot}: frames without memory"
            if self.states is not None:
                assert self.states.has_memory(self.requests[slot]), f"slot {slot}: states without memory"
            if self.window is not None:
                behind = self.requests[slot].behind
                assert behind <= self.window.first(context - 1), f"slot {slot}: {behind} frames are behind its window"
                assert all(map(self.window.there, frames[behind:])), f"slot {slot}: no memory within its window"
