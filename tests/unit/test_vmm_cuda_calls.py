"""What the driver is asked, with a driver that is none."""

from types import SimpleNamespace

import pytest

from sglang_vtensor.vmm import Handle, VMMError
from sglang_vtensor.vmm.cuda import CudaVirtualMemory

CODES = SimpleNamespace(**dict.fromkeys(("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NO_DEVICE"), None))
CODES.CUDA_ERROR_INVALID_DEVICE = CODES.CUDA_ERROR_NOT_SUPPORTED = None
CODES.CUDA_SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")
REFUSED = SimpleNamespace(name="REFUSED")


class Driver:
    """Maps as CUDA does: an address once, and to be unmapped before the next time. `failing` names what is refused."""

    CUresult = CODES

    def __init__(self):
        self.mapped, self.failing = {}, set()

    def cuMemMap(self, address, nbytes, offset, handle, flags):
        if address in self.mapped:
            return (REFUSED,)
        self.mapped[address] = handle
        return (CODES.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, nbytes, access, count):
        return (REFUSED if "access" in self.failing else CODES.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, nbytes):
        if "unmap" in self.failing or address not in self.mapped:
            return (REFUSED,)
        del self.mapped[address]
        return (CODES.CUDA_SUCCESS,)


@pytest.fixture
def vmm():
    vmm = CudaVirtualMemory.__new__(CudaVirtualMemory)  # its constructor wants a GPU
    vmm._driver, vmm._access, vmm._half_mapped = Driver(), None, set()
    return vmm


@pytest.mark.parametrize("failing", [{"access"}, {"access", "unmap"}])
def test_an_address_is_as_before_where_access_is_refused(vmm, failing):
    vmm._driver.failing = failing
    with pytest.raises(VMMError, match="cuMemSetAccess"):
        vmm.map(4096, 4096, Handle(1))
    vmm._driver.failing = set()
    vmm.map(4096, 4096, Handle(2))
    assert vmm._driver.mapped == {4096: 2}
    vmm.unmap(4096, 4096)
    assert not vmm._driver.mapped


def test_what_cannot_be_unmapped_is_not_mapped_over(vmm):
    vmm._driver.failing = {"access", "unmap"}
    for handle in (1, 2):
        with pytest.raises(VMMError):
            vmm.map(4096, 4096, Handle(handle))
    vmm._driver.failing = {"unmap"}
    with pytest.raises(VMMError, match="cuMemUnmap"):
        vmm.map(4096, 4096, Handle(3))
    assert vmm._driver.mapped == {4096: 1}
