"""Virtual memory of an NVIDIA GPU, by the driver's virtual memory management.

Source: CUDA Driver API, "Virtual Memory Management" (cuMemAddressReserve, cuMemCreate, cuMemMap, cuMemSetAccess).
One handle is mapped whole or not at all, and every call costs the same whatever the handle's size (9 us to create,
1.4 to map, 21 to 24 to set access, 14 to 16 to unmap; H200, driver 580): larger pages are cheaper per byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from sglang_vtensor.vmm.base import Handle, OutOfMemory, Unsupported, VirtualMemory, VMMError

#: FlashAttention-3's causal forward and our own kernels load tiles of at most 128 tokens.
TILE_TOKENS = 128
#: How long what the driver said of the device's free memory is believed, less what was created since.
FREE_SECONDS = 1.0


def granularity_of(index: int) -> int:
    """The page granularity of a GPU in bytes. Makes no CUDA context: a process that only asks holds no device memory.

    Raises `Unsupported` if the driver is missing, or the GPU has no virtual memory management.
    """
    driver = _driver()
    _call(driver, "cuInit", "the driver", 0)
    device = _call(driver, "cuDeviceGet", f"GPU {index}", index)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    if not _call(driver, "cuDeviceGetAttribute", "virtual memory management", attribute, device):
        name = _call(driver, "cuDeviceGetName", f"GPU {index}", 100, device).split(b"\0")[0].decode()
        raise Unsupported(
            "cuDeviceGetAttribute",
            f"GPU {index} ({name}) has no virtual memory management (a pre-Volta GPU, WSL1 or a driver older than "
            "418); run without --kv-backend vtensor",
        )
    option = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    return int(
        _call(driver, "cuMemGetAllocationGranularity", "recommended granularity", _properties(driver, index), option)
    )


class _Headroom:
    """What is left on a device beyond the headroom: as `memory` said (free and total bytes), less what was taken since.

    The scheduling thread and the mapping worker both create pages: one of them at a time looks here and takes.
    """

    def __init__(self, memory: Callable[[], tuple[int, int]]) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._free = 0
        self._asked_at = -FREE_SECONDS

    def lacks(self, nbytes: int, headroom: int) -> int | None:
        """None, and `nbytes` are taken; or how many bytes are free, if less than the headroom would be left of them."""
        with self._lock:
            now = time.monotonic()
            if now - self._asked_at > FREE_SECONDS or self._free - nbytes < headroom:
                self._free, _ = self._memory()
                self._asked_at = now
            if self._free - nbytes < headroom:
                return self._free
            self._free -= nbytes
            return None


def identity_of(driver: Any, index: int) -> str:
    """A name of a GPU, or of the MIG slice that stands for one: slices of one GPU have memories of their own.

    Source: CUDA Driver API, cuDeviceGetUuid, which answers for a device in MIG mode with the slice's UUID. The device
    properties of CUDA's runtime may name the GPU instead.
    """
    device = _call(driver, "cuDeviceGet", f"GPU {index}", index)
    return f"cuda-{uuid.UUID(bytes=bytes(_call(driver, 'cuDeviceGetUuid', f'GPU {index}', device).bytes))}"


def identity_here(index: int) -> str:
    """`identity_of` without a context."""
    return identity_of(_driver(), index)


def free_here(index: int) -> int:
    """Bytes that are free on a GPU, or in the MIG slice that stands for one, by NVML: CUDA asks for a context first.
    Raises `Unsupported` where NVML does not say it."""
    name = identity_here(index).removeprefix("cuda-")
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{name}")
        except pynvml.NVMLError_NotFound:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{name}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError as error:
        raise Unsupported(
            "nvmlDeviceGetMemoryInfo", f"NVML does not say what is free on GPU {name}: {error}"
        ) from error


class CudaVirtualMemory(VirtualMemory):
    """Pages of one GPU (None: torch's current one), local to this process."""

    tile_tokens = TILE_TOKENS

    def __init__(self, index: int | None) -> None:
        if not torch.cuda.is_available():
            raise Unsupported("cuInit", "no NVIDIA GPU is visible to PyTorch; the host backend runs without one")
        if index is None:
            index = torch.cuda.current_device()
        self.granularity = granularity_of(index)
        self._driver = driver = _driver()
        self.device = torch.device("cuda", index)
        self.identity = identity_of(driver, index)
        with torch.cuda.device(self.device):
            torch.cuda.current_stream()  # makes the primary context, which every call below runs in
            torch.empty(1, device=self.device)
        self._prop = _properties(driver, index)
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._prop.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._headroom = _Headroom(self.memory)
        #: Addresses that are mapped and must not be used, as neither access nor unmapping succeeded there.
        self._half_mapped: set[int] = set()
        #: Clears run here, apart from the server's streams, so that waiting for one waits for nothing else; and before
        #: what these have queued, or it would wait for a matrix product of several milliseconds.
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def attach_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def reserve(self, nbytes: int) -> int:
        self.check_sizes("cuMemAddressReserve", nbytes=nbytes)
        return int(self._call("cuMemAddressReserve", f"{nbytes} bytes", nbytes, self.granularity, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", f"{nbytes} bytes at {address:#x}", address, nbytes)

    def create(self, nbytes: int) -> Handle:
        self.check_sizes("cuMemCreate", nbytes=nbytes)
        if self.kept_free and (free := self._headroom.lacks(nbytes, self.kept_free)) is not None:
            raise OutOfMemory(
                "cuMemCreate",
                f"{nbytes} bytes would leave less than the {self.kept_free} bytes of headroom "
                f"({free} bytes are free on {self.device})",
                "HEADROOM",
            )
        return Handle(int(self._call("cuMemCreate", f"{nbytes} bytes", nbytes, self._prop, 0)))

    def release(self, handle: Handle) -> None:
        self._call("cuMemRelease", f"handle {handle:#x}", handle)

    def map(self, address: int, nbytes: int, handle: Handle) -> None:
        if address in self._half_mapped:
            self.unmap(address, nbytes)
            self._half_mapped.discard(address)
        self._call("cuMemMap", f"{nbytes} bytes at {address:#x}", address, nbytes, 0, handle, 0)
        try:
            self._call("cuMemSetAccess", f"{nbytes} bytes at {address:#x}", address, nbytes, [self._access], 1)
        except VMMError:
            # For the caller it is not mapped. The driver keeps the memory until it is unmapped, released or not.
            self._half_mapped.add(address)
            with contextlib.suppress(VMMError):
                self.unmap(address, nbytes)
                self._half_mapped.discard(address)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", f"{nbytes} bytes at {address:#x}", address, nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        self._call("cuMemsetD8Async", f"{nbytes} bytes at {address:#x}", address, 0, nbytes, self._stream.cuda_stream)

    def wait_cleared(self) -> None:
        self._call("cuStreamSynchronize", "the clearing stream", self._stream.cuda_stream)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return _from_dlpack(address, nbytes, self.device)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo", "free memory")
        return int(free), int(total)

    def _call(self, name: str, detail: str, *args: Any) -> Any:
        return _call(self._driver, name, detail, *args)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise Unsupported("cuda.bindings", f"{error}; install cuda-python 13") from error
    return driver


def _properties(driver: Any, index: int) -> Any:
    """What a page is to be: pinned memory of this GPU."""
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = index
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location = location
    return prop


def _call(driver: Any, name: str, detail: str, *args: Any) -> Any:
    """One driver call. Returns its values, raises what its error code means."""
    error, *values = getattr(driver, name)(*args)
    codes = driver.CUresult
    if error == codes.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else values
    if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
        error_, free, total = driver.cuMemGetInfo()
        if error_ == codes.CUDA_SUCCESS:
            detail += f" ({free} of {total} bytes are free on the device)"
        raise OutOfMemory(name, detail, error.name)
    if error in (codes.CUDA_ERROR_NO_DEVICE, codes.CUDA_ERROR_INVALID_DEVICE, codes.CUDA_ERROR_NOT_SUPPORTED):
        raise Unsupported(name, f"{detail}: this machine has no such GPU, or its driver does not do this", error.name)
    raise VMMError(name, detail, error.name)


# DLPack (github.com/dmlc/dlpack) hands torch an address without asking the driver about it: the first page of a
# reservation need not be mapped, which __cuda_array_interface__ would insist on.


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("dl_tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # none: the reservation outlives every tensor over it
    ]


_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype = ctypes.py_object
_capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_KEEP: list[Any] = []  # torch reads the structure when a tensor dies; a server makes two of them, once


def _from_dlpack(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    shape = (ctypes.c_int64 * 1)(nbytes)
    strides = (ctypes.c_int64 * 1)(1)
    kind = {"cpu": 1, "cuda": 2}[device.type]
    tensor = _DLTensor(address, kind, device.index or 0, 1, _DLDataType(1, 8, 1), shape, strides, 0)
    managed = _DLManagedTensor(tensor, None, None)
    _KEEP.append((managed, shape, strides))
    return torch.from_dlpack(_capsule_new(ctypes.addressof(managed), b"dltensor", None))
