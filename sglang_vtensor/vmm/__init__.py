"""Virtual memory: reserve addresses, create physical pages, map the ones onto the others.

One interface (`base.VirtualMemory`), two implementations: `cuda` (the driver's virtual memory management) and `host`
(a memfd mapped at fixed addresses: the same aliasing on any Linux machine).
"""

from sglang_vtensor.vmm.base import Handle, OutOfMemory, Unsupported, VirtualMemory, VMMError

__all__ = [
    "Handle",
    "OutOfMemory",
    "Unsupported",
    "VMMError",
    "VirtualMemory",
    "device_identity",
    "free_bytes",
    "open_vmm",
    "page_units",
]


def open_vmm(device: str, *, capacity_bytes: int | None = None) -> VirtualMemory:
    """The virtual memory of a torch device: `"cpu"`, `"cuda:N"`, or `"cuda"`, which is torch's current one in this
    thread: of several ranks each has its own.

    `capacity_bytes` bounds what `create` hands out on the host; on a GPU the device itself is the bound.
    Raises `Unsupported` where the device has no virtual memory management, or is of another kind.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        from sglang_vtensor.vmm.host import HostVirtualMemory

        return HostVirtualMemory(capacity_bytes=capacity_bytes)
    if kind == "cuda":
        from sglang_vtensor.vmm.cuda import CudaVirtualMemory

        return CudaVirtualMemory(int(index) if index else None)
    raise Unsupported("open_vmm", f"device {device!r} has no virtual memory here; use 'cuda', 'cuda:N' or 'cpu'")


def device_identity(device: str) -> str | None:
    """`VirtualMemory.identity` of a torch device, `"cuda:N"` or `"cpu"`. Opens nothing, as `page_units`."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        from sglang_vtensor.vmm.cuda import identity_here

        return identity_here(int(index or 0))
    return open_vmm(device).identity


def free_bytes(device: str) -> int:
    """Bytes that are free on a torch device, `"cuda:N"` or `"cpu"`. Opens nothing, as `page_units`: where a device is
    full there may be no memory for a context. Raises `Unsupported` where the driver does not say it without one."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        from sglang_vtensor.vmm.cuda import free_here

        return free_here(int(index or 0))
    return open_vmm(device).memory()[0]


def page_units(device: str) -> tuple[int, int]:
    """What pages on a torch device are multiples of: the granularity in bytes, and the kernels' tile in tokens.

    Opens nothing: on a GPU no context is made, so that a process may ask that is not to hold device memory. `"cuda"` is
    the first one here: the GPUs that serve one model are of one kind.
    Raises `Unsupported` as `open_vmm` does.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda":
        from sglang_vtensor.vmm.cuda import TILE_TOKENS, granularity_of

        return granularity_of(int(index or 0)), TILE_TOKENS
    vmm = open_vmm(device)
    return vmm.granularity, vmm.tile_tokens
