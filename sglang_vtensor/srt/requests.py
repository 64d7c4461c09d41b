"""What differs between versions of SGLang in how they keep requests, as the rest of `srt` sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey


class Requests(Protocol):
    """One for each version, in `patches`; `Runtime.sglang` is that of the running server. Lengths are tokens."""

    def slot(self, req: Req) -> int:
        """The row of the request in SGLang's table of slots; meaningful only from its first extend to its release."""

    def begun(self, req: Req) -> bool:
        """Whether it has such a row."""

    def prefix(self, req: Req) -> int:
        """How many tokens stand before those that it computes next: the match, or all of its earlier chunks."""

    def allocated(self, req: Req) -> int:
        """How many of its tokens have slots."""

    def committed(self, req: Req) -> int:
        """How many of its tokens have K and V once the batch in flight is done."""

    def own(self, req: Req) -> int:
        """How many of its slots belong to no node of the tree."""

    def extended(self, req: Req, tokens: int) -> None:
        """It got slots for an extend, to `tokens` in all."""

    def decoded(self, req: Req) -> None:
        """It got the slot of one token more."""

    def nothing_new(self, req: Req) -> None:
        """Of a request between two chunks: no tokens were computed since the last one."""

    def release_match(self, tree: Any, req: Req) -> None:
        """Of a request that was to begin, and waits again: the tree may evict what it matched."""

    def retract(self, scheduler: Any, reqs: list[Req]) -> None:
        """They give up all that they hold, and are computed anew."""

    def key(self, req: Req, tokens: Sequence[int]) -> RadixKey:
        """The key of `tokens` for this request: whoever shares them is in its namespace."""

    def like(self, key: RadixKey, tokens: Sequence[int]) -> RadixKey:
        """The key of `tokens` in the namespace of `key`."""

    def namespace(self, owner: Req | RadixKey) -> str:
        """Who may share with whom: equal only for equal keys that a user, an adapter or a salt made; to be compared and
        sorted, not read."""

    def idle(self, scheduler: Any) -> bool:
        """Whether SGLang lets go of memory now: nothing runs, and no batch is in flight."""

    def ranks(self, scheduler: Any) -> tuple[int, int]:
        """The tensor-parallel and the data-parallel rank of a scheduler."""


class StateFields(Protocol):
    """Where a version of SGLang that serves models with states keeps those of a request. Slots are tensors on the
    device, `()` or `(1,)`, int64."""

    def begin(self, req: Req, own: torch.Tensor, tracks: Sequence[torch.Tensor], source: torch.Tensor | None) -> None:
        """It begins with a state of its own, which the batch copies from slot `source`, or clears."""

    def tracked(self, req: Req, most: int, *, over: bool) -> tuple[int, int]:
        """The most tokens, up to `most`, that a track of the request is the state of, and which track; 0: of none."""

    def replace(self, req: Req, track: int, slot: torch.Tensor) -> None:
        """From now on it has this slot as that track."""

    def nothing_tracked(self, req: Req) -> None:
        """Its tracks are the state of nothing yet."""

    def over(self, req: Req) -> None:
        """It has no slots any more."""
