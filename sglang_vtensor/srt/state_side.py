"""Which requests and which nodes of the tree have which states.

A request has a state of its own, which each of its batches moves on, and slots that SGLang writes a copy of that state
to where a match may end later (`tracks`): at the last whole page of a prompt, and at some pages of an answer. Such a
copy goes to the node of the tree that ends there, and the request gets another slot for it:

    tree      root ---- node ---- node          a match ends at a node with a state, and what its tokens' keys and
                         (4)       (9)          values are there beyond it is computed anew
    request                          own (2), tracks (5, 7)

Where memory is short, what nobody used for the longest time goes first: leaves of the tree, or states of nodes that
stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_vtensor.srt.ends import Ends

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.requests import StateFields
    from sglang_vtensor.srt.runtime import RequestFrames, Runtime


class StateSide(Ends):
    """Of a runtime's memory. Each request has `tracks` slots beside its own. A match may end at multiples of `grid`
    tokens. `fields` is where SGLang keeps what a request has."""

    def __init__(self, runtime: Runtime, fields: StateFields, *, tracks: int, grid: int) -> None:
        states = runtime.memory.states
        assert states is not None
        super().__init__()  # of nodes that have a state (`node.state`)
        self.runtime = runtime
        self.states = states
        self.fields = fields
        self.tracks = tracks
        self.grid = grid
        #: Slot numbers on the device: a request's are views of it, so that none is ever read back.
        self.numbers = torch.arange(states.placement.num_frames, device=runtime.memory.vmm.device)

    # How much there is.

    @property
    def slots(self) -> int:
        """Slots of one request."""
        return 1 + self.tracks

    @property
    def request_bytes(self) -> int:
        """What one request takes at most, whatever its length: its slots, and the state that it goes on behind."""
        return (self.slots + 1) * self.states.page_bytes

    @property
    def cached_bytes(self) -> int:
        """What nodes have, which is given up where memory is short."""
        return len(self.nodes) * self.states.page_bytes

    def longest(self, node: Any) -> Any:
        """The last node on the way from the root to the end of `node` that has a state; the root, if none has."""
        while node.parent is not None and node.state is None:
            node = node.parent
        return node

    def tracked(self, tokens: int) -> int:
        """Of a prompt of so many tokens, how many a state is kept of as it is computed."""
        return tokens // self.grid * self.grid

    # A request.

    def begun(self) -> None:
        """The batch has its memory: what it begins with is read before anything that comes later writes to it."""
        self.reading.clear()

    def begin(self, tree: Any, reqs: Sequence[Req]) -> list[list[int]] | None:
        """Slots for requests that begin, each behind the state of the node that it matched. None if there is no memory
        for all of them, on any rank, or if such a state is gone."""
        self.reading = {req.last_node.id for req in reqs if req.last_node.parent is not None}
        there = all(req.last_node.state is not None for req in reqs if req.last_node.parent is not None)
        count = self.slots * len(reqs)
        taken = self._take(tree, count) if self.runtime.agree(there) else None
        if taken is None:
            return None
        slots = [taken[n * self.slots : (n + 1) * self.slots] for n in range(len(reqs))]
        for req, (own, *tracks) in zip(reqs, slots, strict=True):
            req.vtensor_anew = False  # should it be retracted, it may go on behind a state again
            node = req.last_node
            source = None if node.state is None else self.numbers[node.state : node.state + 1]
            self.fields.begin(req, self.numbers[own], [self.numbers[track] for track in tracks], source)
            if node.state is not None:
                node.state_epoch = self.runtime.memory.next_epoch
                self.touch(node)
        return slots

    def _take(self, tree: Any, count: int, *, tries: int = 2) -> list[int] | None:
        """So many slots on every rank, or on none. What is cached goes first, as much on each of them."""
        for _ in range(tries):
            if count > self.states.room():
                tree.reclaim_states(count)
            taken = self.states.take(count)
            if self.runtime.agree(taken is not None):
                return taken
            self.states.give(taken or [], self.runtime.last_reader)
            if tries > 1:
                tree.reclaim_states(self.states.room() + count)
        return None

    def keep(self, tree: Any, req: Req, record: RequestFrames, leaf: Any, *, over: bool) -> None:
        """What was tracked of a request goes to the node that ends there, of those that end with `leaf`, if that has no
        state yet. A request that is not `over` gets another slot for it; if there is none, nothing is kept."""
        tokens, track = self.fields.tracked(req, record.protected * self.runtime.page_tokens, over=over)
        # A chunk that ended inside a page leaves a state that no node can have.
        if tokens and not tokens % self.runtime.page_tokens:
            node = tree.ending_at(leaf, tokens)
            if node.state is not None:
                self.touch(node)
            elif over:
                self._put(node, record, track, None)
            elif (taken := self._take(tree, 1, tries=1)) is not None:
                self._put(node, record, track, taken[0])
                self.fields.replace(req, track, self.numbers[taken[0] : taken[0] + 1])
        if not over:
            self.fields.nothing_tracked(req)

    def over(self, req: Req, record: RequestFrames) -> None:
        """The request is over, or waits again: what it has is taken back."""
        self.states.give([slot for slot in record.states if slot is not None], self.runtime.last_reader)
        record.states = []
        self.fields.over(req)

    # Nodes.

    def _put(self, node: Any, record: RequestFrames, track: int, instead: int | None) -> None:
        """The slot of a track is the node's, and the request has another one, or none."""
        node.state, record.states[1 + track] = record.states[1 + track], instead
        assert node.state is not None
        node.state_epoch = self.runtime.memory.launched  # of the batch that wrote it, or a later one
        self.touch(node)

    def drop(self, node: Any) -> None:
        """The state of this node goes, if it has one."""
        if node.state is None:
            return
        del self.nodes[node.id]
        slot, node.state = node.state, None
        self.states.give([slot], node.state_epoch)

    def clear(self) -> None:
        """Every slot is taken back."""
        self.nodes.clear()
        self.reading.clear()

    def has_memory(self, record: RequestFrames) -> bool:
        """Whether every slot of a request has memory."""
        return all(self.states.backing.uses(slot) for slot in record.states if slot is not None)

    def check_integrity(self, records: Iterable[RequestFrames], nodes: Iterable[Any]) -> None:
        """Requests and nodes have all owned slots, each once."""
        nodes = list(nodes)
        assert {node.id for node in nodes if node.state is not None} == self.nodes.keys()
        owned = [node.state for node in nodes if node.state is not None]
        owned += [slot for record in records for slot in record.states if slot is not None]
        assert len(owned) == len(set(owned)) == self.states.owned, (owned, self.states.owned)
        assert all(node.depth % self.runtime.page_tokens == 0 for node in self.nodes.values())
