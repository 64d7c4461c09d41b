"""The interface of virtual memory, and its errors."""

from __future__ import annotations

import abc
from typing import NewType

import torch

Handle = NewType("Handle", int)
"""Names one physical page, from `create` to `release`. Opaque; 0 is never a handle."""


class VMMError(RuntimeError):
    """A call of the driver failed. `call` is the call's own name, `error` the driver's own name of the error."""

    def __init__(self, call: str, detail: str, error: str = "") -> None:
        self.call = call
        self.error = error
        super().__init__(f"{call} failed{f' with {error}' if error else ''}: {detail}")


class OutOfMemory(VMMError):
    """The device (or the bound set on it) has no room for another page. Nothing was changed."""


class Unsupported(VMMError):
    """This machine, driver or device cannot do virtual memory management; the message says what would."""


class VirtualMemory(abc.ABC):
    """Addresses on one side, physical pages on the other, and the mappings between them.

    A page may be mapped at any number of addresses at once, always whole (the CUDA driver maps no part of a handle).
    Sizes and addresses are in bytes and multiples of `granularity`. No method waits for running kernels: the caller
    keeps a mapping until nothing in flight reads it (invariant 3).
    """

    device: torch.device
    #: The device's name in every process alike; None where no other process can be on it.
    identity: str | None
    granularity: int
    #: Kernels of this device load K and V in whole tiles of this many tokens, counted from a context's start: they
    #: touch what lies between the last token and the end of its tile, so that must be mapped too (invariant 5).
    tile_tokens: int = 1
    #: What `create` leaves free on the device for whatever else this process needs there, such as activations; and what
    #: other processes need so.
    headroom_bytes: int = 0
    others_headroom_bytes: int = 0

    @abc.abstractmethod
    def reserve(self, nbytes: int) -> int:
        """Reserve `nbytes` of addresses and return the first. No memory is behind them: touching one is a fault."""

    @abc.abstractmethod
    def free(self, address: int, nbytes: int) -> None:
        """Give a whole reservation back. Everything in it must have been unmapped."""

    @abc.abstractmethod
    def create(self, nbytes: int) -> Handle:
        """Create one physical page. Raises `OutOfMemory`, also where it would eat into the headroom."""

    @abc.abstractmethod
    def release(self, handle: Handle) -> None:
        """Give a page back. Its memory is free again once no mapping refers to it (invariant 4)."""

    @abc.abstractmethod
    def map(self, address: int, nbytes: int, handle: Handle) -> None:
        """Map the whole page at `address`, readable and writable. On failure the address is unmapped as before."""

    @abc.abstractmethod
    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap the one mapping at `address`."""

    @abc.abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Begin to fill mapped memory with zeros; it is not to be used, or unmapped, before `wait_cleared`.

        A kernel that over-reads multiplies what it finds there by zero, and zero times a stale NaN is a NaN.
        """

    @abc.abstractmethod
    def wait_cleared(self) -> None:
        """Wait for what was begun to be cleared, by this thread and maybe by others."""

    @abc.abstractmethod
    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor over `[address, address + nbytes)`. Does not touch it and does not own it."""

    @abc.abstractmethod
    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""

    @property
    def kept_free(self) -> int:
        """The headroom of all."""
        return self.headroom_bytes + self.others_headroom_bytes

    def left(self) -> int:
        """Bytes that the device has free beyond the headroom."""
        return max(0, self.memory()[0] - self.kept_free)

    def low(self) -> bool:
        """Whether less than the headroom is free: somebody else, who may not know of us, took it."""
        return self.memory()[0] < self.kept_free

    def attach_thread(self) -> None:  # noqa: B027
        """Make this thread able to call the driver. To be called once in each thread that does."""

    def check_sizes(self, call: str, *, address: int = 0, nbytes: int) -> None:
        """Raise `ValueError` unless both are multiples of the granularity and the size is positive."""
        if nbytes <= 0 or nbytes % self.granularity or address % self.granularity:
            raise ValueError(
                f"{call}: address {address:#x} and size {nbytes} must be multiples of {self.granularity} bytes, "
                "and the size positive"
            )
