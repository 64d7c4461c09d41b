"""Virtual memory of the host: one sparse memfd, mapped at fixed addresses.

A page is a range of the memfd, so that it can be mapped at several addresses at once (mmap(2), MAP_SHARED) and given
back by punching a hole (fallocate(2)). Pages that lie one behind the other in the file and in a mapping share one
kernel map entry, so `create` hands ranges out from the lowest offset up.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import mmap
import os
import threading
import weakref
from pathlib import Path

import torch

from sglang_vtensor.vmm.base import Handle, OutOfMemory, VirtualMemory, VMMError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_FALLOC_KEEP_SIZE = 0x1
_FALLOC_PUNCH_HOLE = 0x2


class HostVirtualMemory(VirtualMemory):
    """Pages of host memory. `capacity_bytes` bounds the sum of all pages, as a device's size would. Processes with the
    same `VTENSOR_HOST_DEVICE` in their environment are on one device, by name only: nothing bounds their sum."""

    def __init__(self, *, capacity_bytes: int | None = None) -> None:
        self.device = torch.device("cpu")
        # Every process has host memory to itself, unless it is told that some share a device.
        self.identity = os.environ.get("VTENSOR_HOST_DEVICE")
        self.granularity = mmap.PAGESIZE
        self.capacity_bytes = capacity_bytes
        self.created_bytes = 0
        self._fd = os.memfd_create("vtensor", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()  # of what is below: calls come from the scheduling thread and from the worker
        self._file_bytes = 0
        self._sizes: dict[Handle, int] = {}
        self._holes: dict[int, list[int]] = {}  # page size -> heap of file offsets punched out before

    def reserve(self, nbytes: int) -> int:
        self.check_sizes("mmap", nbytes=nbytes)
        return self._mmap(None, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)

    def free(self, address: int, nbytes: int) -> None:
        self.check_sizes("munmap", address=address, nbytes=nbytes)
        if _libc.munmap(address, nbytes) != 0:
            raise self._error("munmap", f"{nbytes} bytes at {address:#x}")

    def create(self, nbytes: int) -> Handle:
        self.check_sizes("fallocate", nbytes=nbytes)
        with self._lock:
            bound = self.capacity_bytes
            if bound is not None and self.created_bytes + nbytes > bound - self.kept_free:
                raise OutOfMemory(
                    "fallocate",
                    f"{nbytes} bytes on top of {self.created_bytes} exceed the capacity of {bound} less the headroom "
                    f"of {self.kept_free}",
                    "ENOSPC",
                )
            holes = self._holes.setdefault(nbytes, [])
            if not holes:
                holes.append(self._file_bytes)
                self._file_bytes += nbytes
            offset = heapq.heappop(holes)
            self.created_bytes += nbytes
        if _libc.fallocate(self._fd, 0, offset, nbytes) != 0:
            error = self._error("fallocate", f"{nbytes} bytes on top of {self.created_bytes - nbytes}")
            self._take_back(offset, nbytes)
            raise error
        handle = Handle(offset + 1)  # 0 is no handle
        self._sizes[handle] = nbytes
        return handle

    def release(self, handle: Handle) -> None:
        nbytes = self._sizes.pop(handle, 0)
        if not nbytes:
            raise VMMError("fallocate", f"handle {handle} is not one that create returned", "EINVAL")
        if _libc.fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, handle - 1, nbytes) != 0:
            error = self._error("fallocate", f"punching out {nbytes} bytes")
            self._sizes[handle] = nbytes
            raise error
        self._take_back(handle - 1, nbytes)

    def _take_back(self, offset: int, nbytes: int) -> None:
        with self._lock:
            self.created_bytes -= nbytes
            heapq.heappush(self._holes[nbytes], offset)

    def map(self, address: int, nbytes: int, handle: Handle) -> None:
        self.check_sizes("mmap", address=address, nbytes=nbytes)
        if self._sizes.get(handle) != nbytes:
            raise VMMError("mmap", f"handle {handle} holds {self._sizes.get(handle)} bytes, {nbytes} given", "EINVAL")
        self._mmap(
            address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, self._fd, handle - 1
        )

    def unmap(self, address: int, nbytes: int) -> None:
        # Mapping nothing over it keeps the addresses reserved; munmap would let others take them.
        self.check_sizes("mmap", address=address, nbytes=nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._mmap(address, nbytes, _PROT_NONE, flags, -1, 0)

    def clear(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def wait_cleared(self) -> None:
        """Nothing is left to be done."""

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    def memory(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        if self.capacity_bytes is not None:
            free, total = min(free, self.capacity_bytes - self.created_bytes), min(total, self.capacity_bytes)
        return free, total

    def low(self) -> bool:
        return self.capacity_bytes is not None and super().low()  # the host's own free memory says little

    def _mmap(self, address: int | None, nbytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
        got = _libc.mmap(address, nbytes, prot, flags, fd, offset)
        if got is None or got == _MAP_FAILED:
            where = f"{nbytes} bytes{f' at {address:#x}' if address else ''}"
            raise self._error("mmap", where)
        return int(got)

    def _error(self, call: str, detail: str) -> VMMError:
        code = ctypes.get_errno()
        name = errno.errorcode.get(code, str(code))
        if code == errno.ENOMEM and call == "mmap":
            limit = Path("/proc/sys/vm/max_map_count").read_text().strip()
            detail += f" (the process may hold {limit} mappings: vm.max_map_count; larger pages need fewer)"
        kind = OutOfMemory if code in (errno.ENOMEM, errno.ENOSPC) else VMMError
        return kind(call, f"{detail}: {os.strerror(code)}", name)
