"""Which requests of each decode batch share what, followed on the host, and whether reading that once pays."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from sglang_vtensor.kernels.configs import shared_decode_pays
from sglang_vtensor.sharing import Sharing

if TYPE_CHECKING:
    from sglang_vtensor.srt.runtime import Runtime


class BatchSharing:
    """Keeps a `Sharing` to the decode batch that is launched next.

    `group` query heads of `head_dim` share a KV head; a token takes `token_bytes` of `kv_dtype` in one layer;
    `capability` is the GPU's.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        requests: int,
        group: int,
        token_bytes: int,
        capability: int = 0,
        kv_dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 128,
    ) -> None:
        self.runtime = runtime
        self.group, self.token_bytes = group, token_bytes
        self.capability, self.kv_dtype, self.head_dim = capability, kv_dtype, head_dim
        self.sharing = Sharing(slots=runtime.request_slots, requests=requests, page_tokens=runtime.page_tokens)
        #: Whether the next batch is to read what it shares once.
        self.pays = False
        #: Decode batches that were announced.
        self.batches = 0
        self.steps_shared = 0
        self.steps_plain = 0
        self.saved_tokens = 0
        self.seconds = 0.0
        self._batch: list[int] = []
        self._changed: set[int] = set()

    def begin(self, slots: list[int], tokens: int, longest: int) -> None:
        """The next batch is a decode step of the requests in these slots, with so many tokens in all, and in the
        longest context."""
        start = time.perf_counter()
        self.batches += 1
        with self.runtime.memory.clock:
            if len(slots) > self.sharing.requests:
                self.clear()
            elif slots != self._batch or self._changed:
                self._follow(slots)
            sharing = self.sharing
            self.pays = shared_decode_pays(
                len(slots),
                tokens,
                sharing.shared_tokens,
                sharing.saved_tokens,
                self.group,
                self.token_bytes,
                self.capability,
                self.kv_dtype,
                self.head_dim,
                longest,
            )
        self.seconds += time.perf_counter() - start

    def _follow(self, slots: list[int]) -> None:
        sharing, runtime = self.sharing, self.runtime
        # First who leaves: frames that a request has no more may be another's already.
        now = set(slots)
        for slot in (sharing.slots() - now) | (self._changed & sharing.slots()):
            sharing.leave(slot)
        for slot in now - sharing.slots():
            record = runtime.requests[slot]
            sharing.join(slot, record.frames[: record.protected])
        self._batch = list(slots)
        self._changed.clear()

    def changed(self, slot: int) -> None:
        """The frames that a request shares are others now."""
        self._changed.add(slot)

    def left(self, slot: int) -> None:
        """A request is over."""
        if slot in self.sharing:
            self.sharing.leave(slot)
            self._changed.add(slot)

    def clear(self) -> None:
        self.sharing.clear()
        self._batch = []
        self._changed.clear()

    def count(self, shared: bool) -> None:
        """A batch was launched, and what it shares read once, or not."""
        if shared:
            self.steps_shared += 1
            self.saved_tokens += self.sharing.saved_tokens
        else:
            self.steps_plain += 1

    def stats(self) -> dict[str, float]:
        return {
            "decode_steps_shared": self.steps_shared,
            "decode_steps_plain": self.steps_plain,
            "shared_bytes_saved": self.saved_tokens * self.runtime.memory.layout.kv_bytes,
            "grouping_seconds": self.seconds,
        }
