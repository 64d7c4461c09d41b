"""A virtual memory that fails when told to."""

from __future__ import annotations

from collections import Counter

from sglang_vtensor.vmm import Handle, OutOfMemory, VMMError
from sglang_vtensor.vmm.host import HostVirtualMemory


class FaultyVirtualMemory(HostVirtualMemory):
    """The host's, but the `fail_at`-th call from now on (counted over the named calls) raises, once."""

    CALLS = ("create", "map", "clear", "wait_cleared", "unmap", "release")

    def __init__(self, *, capacity_bytes: int | None = None) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.fail_at: int | None = None
        self.fail_calls: tuple[str, ...] = ("create", "map", "clear", "wait_cleared")
        self.seen: Counter[str] = Counter()

    def _step(self, call: str) -> None:
        self.seen[call] += 1
        if self.fail_at is None or call not in self.fail_calls:
            return
        self.fail_at -= 1
        if self.fail_at == 0:
            self.fail_at = None
            kind = OutOfMemory if call == "create" else VMMError
            raise kind(call, "injected", "INJECTED")

    def create(self, nbytes: int) -> Handle:
        self._step("create")
        return super().create(nbytes)

    def map(self, address: int, nbytes: int, handle: Handle) -> None:
        self._step("map")
        super().map(address, nbytes, handle)

    def clear(self, address: int, nbytes: int) -> None:
        self._step("clear")
        super().clear(address, nbytes)

    def wait_cleared(self) -> None:
        self._step("wait_cleared")
        super().wait_cleared()

    def unmap(self, address: int, nbytes: int) -> None:
        self._step("unmap")
        super().unmap(address, nbytes)

    def release(self, handle: Handle) -> None:
        self._step("release")
        super().release(handle)
