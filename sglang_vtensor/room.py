"""How much memory there is, and how much more may be had. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_vtensor.backing import Backing
from sglang_vtensor.budget import Budget
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.placement import Placement
from sglang_vtensor.tails import Tails


class Room:
    """The numbers of a `KVMemory`, which has and changes what they are counted from."""

    sides: Sequence[KVLayout]
    placement: Placement
    budget: Budget
    #: One for each side; the first one is that of all tokens.
    backings: Sequence[Backing]
    backing: Backing
    #: Everything that has pages in the budget.
    stores: Sequence[Backing]
    tails: Tails
    #: Frames that may be owned.
    limit: int
    #: The bytes of so many pages of each side may hold memory beside the padding pages: the capacity, or less
    #: (`KVMemory.allow`).
    allowance: int
    #: Who begins now may take all of the capacity. It is for the thread that hands frames out: what the worker makes
    #: ahead stays within the allowance.
    beyond: bool = False
    #: Whoever begins now asks the driver itself: that it refused when it was last asked keeps nobody out.
    asks: bool = False

    @property
    def owned(self) -> int:
        """Frames that requests and nodes own."""
        return self.placement.owned

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of each side: what a frame takes at most."""
        return sum(side.page_bytes for side in self.sides)

    @property
    def padding_bytes(self) -> int:
        """Bytes of the padding pages, which are always there."""
        return sum(backing.page_bytes for backing in self.stores)

    @property
    def backed_bytes(self) -> int:
        """Bytes of all pages, the padding pages included."""
        return sum(backing.pages * backing.page_bytes for backing in self.stores)

    @property
    def backed(self) -> int:
        """Pages that hold memory, the padding page included."""
        return self.backing.pages

    @property
    def ready(self) -> int:
        """Free pages that hold nothing anybody wants."""
        return self.backing.free

    @property
    def free_backed(self) -> int:
        return self.backing.free + len(self.tails)

    def available_pages(self) -> int:
        """How many frames may be handed out before the limit is reached."""
        return max(0, self.limit - self.owned)

    @property
    def needed_bytes(self) -> int:
        """Bytes of the pages that owners need; of the others, kept ones are forgotten where that makes room."""
        return self.budget.used - len(self.tails) * self.page_bytes

    @property
    def allowance_bytes(self) -> int:
        """Bytes that pages may take, beside the padding pages."""
        return self.allowance * self.page_bytes

    @property
    def allowed_bytes(self) -> int:
        """The same for who begins now."""
        return self.budget.nbytes if self.beyond else self.allowance_bytes

    def room_bytes(self, *, growing: bool = False, ahead: bool = False) -> int:
        """Bytes that owners may take beyond what they have; below 0 where the allowance was lowered meanwhile. `ahead`:
        for the worker."""
        allowed = self.budget.nbytes if growing else self.allowance_bytes if ahead else self.allowed_bytes
        return allowed - self.needed_bytes

    def room(self, *, growing: bool = False, ahead: bool = False) -> int:
        """How many frames may be owned beyond those that are, with memory on all sides; below 0 where the allowance was
        lowered meanwhile. `ahead`: for the worker."""
        rooms = [self.room_bytes(growing=growing, ahead=ahead) // self.page_bytes, self.limit - self.owned]
        rooms += [side.most - side.used + len(self.tails) for side in self.backings if side.most is not None]
        return max(0, min(rooms)) if growing else min(rooms)

    @property
    def short(self) -> bool:
        """The driver refused when it was last asked: until it gives again, what is backed is all there is."""
        return any(backing.refusal is not None for backing in self.stores)

    def missing_bytes(self) -> int:
        """How much of the budget is not to be had now: beyond the allowance, or refused by the driver. Where that gives
        nothing, a side may have what another one gives back."""
        if self.short and not self.asks:
            refused = self.budget.nbytes - self.budget.used - self.budget.free
        else:
            refused = sum(backing.stuck * backing.page_bytes for backing in self.stores)
        return max(self.budget.nbytes - self.allowed_bytes, refused)

    def in_pages(self, nbytes: int) -> int:
        """So many bytes, in pages of each side, rounded up."""
        return -(-nbytes // self.page_bytes)

    def owes(self) -> int:
        """Free pages beyond the allowance, which the worker is to give back; in bytes of pages of each side."""
        free = self.budget.free + len(self.tails) * self.page_bytes
        return self.in_pages(min(self.over_bytes(), free))

    def over_bytes(self) -> int:
        """Bytes of backed pages beyond what is allowed: while somebody begins with what is free, it stays."""
        backed = sum((backing.pages - 1) * backing.page_bytes for backing in self.stores)
        return max(0, backed - self.allowed_bytes)
