"""States: memory that a request or a cached prefix has once, however long it is.

Layers with linear attention or Mamba keep one state of a sequence instead of keys and values of its tokens. A state has
a slot of its own, numbered apart from frames, and its page is all of it. Its bytes come out of the same budget as those
of tokens:

    slots     0         1         2         3    ...       frames   0  1  2  3  ...
              padding   request   cached    free                    padding, and pages of tokens
              |<------------- one budget, and the page that was free the longest goes ------------->|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_vtensor.backing import Backing
from sglang_vtensor.placement import Placement

if TYPE_CHECKING:
    from sglang_vtensor.memory import KVMemory


@dataclass(frozen=True)
class StateLayout:
    """What one state is: of each of `layers` layers a recurrent state of the shape `temporal`, and the latest inputs of
    its convolutions, of the shapes `conv`. Its bytes are `[temporal][layer]` and then `[conv][layer]` of each shape."""

    layers: int
    temporal: tuple[int, ...]
    temporal_dtype: torch.dtype
    conv: tuple[tuple[int, ...], ...]
    conv_dtype: torch.dtype
    granularity: int

    @property
    def state_bytes(self) -> int:
        """Bytes of a state, without padding."""
        conv = sum(map(math.prod, self.conv)) * self.conv_dtype.itemsize
        return self.layers * (math.prod(self.temporal) * self.temporal_dtype.itemsize + conv)

    @property
    def page_bytes(self) -> int:
        """The same in whole granules."""
        return -(-self.state_bytes // self.granularity) * self.granularity

    def views(self, region: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The convolutions' inputs and the recurrent states over `region`, uint8 of shape `(slots, page_bytes)`. Each
        view is `(layers, slots, *shape)`; a layer's elements of one slot are contiguous, and nothing is copied."""
        at = 0

        def view(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            nonlocal at
            flat, size = region.view(-1).view(dtype), math.prod(shape)
            inner = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
            strides = (size, self.page_bytes // dtype.itemsize, *inner)
            first = flat.storage_offset() + at // dtype.itemsize
            at += self.layers * size * dtype.itemsize
            return flat.as_strided((self.layers, region.shape[0], *shape), strides, first)

        temporal = view(self.temporal, self.temporal_dtype)
        return [view(shape, self.conv_dtype) for shape in self.conv], temporal


class States:
    """`slots` slots of `page_bytes` bytes, beside the padding slot 0, in the budget of `memory`. A slot has memory
    while somebody owns it, and until its page is given back for something else."""

    def __init__(self, memory: KVMemory, page_bytes: int, slots: int) -> None:
        self.memory = memory
        self.page_bytes = page_bytes
        # Lanes of one slot: which slots are neighbours matters to nobody.
        self.placement = Placement(slots + 1, 1)
        self.backing = Backing(memory.vmm, self.placement, page_bytes, memory.budget)

    @property
    def owned(self) -> int:
        """Slots that requests and nodes own."""
        return self.placement.owned

    @property
    def left(self) -> int:
        """How many slots nobody owns."""
        return self.placement.num_frames - 1 - self.owned

    def room(self, *, ahead: bool = False) -> int:
        """How many more may be owned, with what is kept of unfinished pages given up for them. `ahead`: for the
        worker."""
        return min(self.memory.room_bytes(ahead=ahead) // self.page_bytes, self.left)

    def take(self, count: int) -> list[int] | None:
        """So many slots with memory, or None where the limit or the device has no room for all of them. What was in
        them is still there."""
        if not count:
            return []
        with self.memory.held_still():
            if count > self.room():
                return None
            self.memory.tails.forget_for(count * self.page_bytes)
            return self.memory.until_nothing_is_in_hand(lambda: self._attempt(count))

    def _attempt(self, count: int) -> list[int] | None:
        slots = self.backing.newest_vacant(count)
        self.placement.take(slots)
        others = self.placement.place(None, count - len(slots))
        if others is not None and self.memory.supply.take([self.backing], slots + others):
            return slots + others
        self.placement.free(slots + (others or []))
        return None

    def give(self, slots: Sequence[int], epoch: int | None = None) -> None:
        """Take slots back. Batches up to `epoch` may still read them, as of `KVMemory.free`."""
        if not slots:
            return
        with self.memory.held_still():
            self.placement.free(slots)
            self.memory.give_pages(self.backing, slots, epoch)

    def region(self) -> torch.Tensor:
        """All bytes by slot, uint8 of shape `(slots + 1, page_bytes)`; those of slots without memory fault."""
        flat = self.memory.vmm.tensor(self.backing.base, self.backing.nbytes)
        return flat.view(self.placement.num_frames, self.page_bytes)

    def check_integrity(self) -> None:
        """As of `KVMemory.check_integrity`."""
        self.placement.check_integrity()
        self.backing.check_integrity(set(self.placement.owned_frames()))
