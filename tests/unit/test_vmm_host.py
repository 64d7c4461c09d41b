import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sglang_vtensor.vmm import OutOfMemory, Unsupported, VMMError, cuda, open_vmm
from sglang_vtensor.vmm.cuda import _from_dlpack, _Headroom
from sglang_vtensor.vmm.host import HostVirtualMemory


@pytest.fixture
def vmm():
    return HostVirtualMemory(capacity_bytes=8 * os.sysconf("SC_PAGE_SIZE"))


def resident(address, nbytes):
    """Does a read of that address fault? Asked of the kernel, not of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address and address + nbytes <= high:
            return line.split()[1].startswith("r")
    return False


def test_one_page_at_two_addresses_is_one_memory(vmm):
    size = vmm.granularity
    base = vmm.reserve(4 * size)
    page = vmm.create(size)
    vmm.map(base, size, page)
    vmm.map(base + 2 * size, size, page)
    region = vmm.tensor(base, 4 * size)
    region[:size] = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    assert torch.equal(region[:size], region[2 * size : 3 * size])
    region[2 * size] = 99
    assert region[0] == 99


def test_unmapped_addresses_are_unreadable_and_stay_reserved(vmm):
    size = vmm.granularity
    base = vmm.reserve(2 * size)
    assert not resident(base, size)
    page = vmm.create(size)
    vmm.map(base, size, page)
    assert resident(base, size)
    vmm.unmap(base, size)
    assert not resident(base, size)
    vmm.map(base, size, page)
    assert vmm.tensor(base, size)[0] == 0


def test_a_released_page_gives_its_memory_back_and_comes_back_clean(vmm):
    size = vmm.granularity
    base = vmm.reserve(size)
    page = vmm.create(size)
    vmm.map(base, size, page)
    vmm.tensor(base, size).fill_(7)
    blocks = os.fstat(vmm._fd).st_blocks
    vmm.unmap(base, size)
    vmm.release(page)
    assert os.fstat(vmm._fd).st_blocks < blocks
    assert vmm.memory()[0] == vmm.capacity_bytes
    page = vmm.create(size)
    vmm.map(base, size, page)
    assert not vmm.tensor(base, size).any()


def test_running_out_is_its_own_error_and_changes_nothing(vmm):
    pages = [vmm.create(vmm.granularity) for _ in range(8)]
    with pytest.raises(OutOfMemory, match=r"fallocate failed with ENOSPC: \d+ bytes on top of \d+ exceed"):
        vmm.create(vmm.granularity)
    vmm.release(pages.pop())
    vmm.create(vmm.granularity)


def test_errors_name_the_call_the_sizes_and_the_error(vmm):
    size = vmm.granularity
    with pytest.raises(ValueError, match=f"size {size + 1} must be multiples of {size}"):
        vmm.create(size + 1)
    with pytest.raises(VMMError, match=r"EINVAL.*handle 12345"):
        vmm.release(12345)
    with pytest.raises(OutOfMemory, match=r"mmap failed with ENOMEM: \d+ bytes.*max_map_count"):
        vmm.reserve(1 << 60)


def test_a_dlpack_tensor_lies_at_the_address(vmm):
    size = vmm.granularity
    base = vmm.reserve(2 * size)
    vmm.map(base + size, size, vmm.create(size))  # the first page is not mapped: nobody may touch it
    tensor = _from_dlpack(base, 2 * size, torch.device("cpu"))
    tensor[size] = 5
    assert tensor.data_ptr() == base
    assert vmm.tensor(base, 2 * size)[size] == 5


def test_reading_unmapped_memory_is_a_fault_not_garbage():
    code = (
        "from sglang_vtensor.vmm.host import HostVirtualMemory as H\n"
        "v = H(); print(v.tensor(v.reserve(v.granularity), v.granularity)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode < 0, done


def test_open_refuses_what_is_not_there():
    with pytest.raises(Unsupported, match="'tpu'"):
        open_vmm("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="no NVIDIA GPU"):
            open_vmm("cuda")


def test_the_headroom_is_never_taken():
    vmm = open_vmm("cpu", capacity_bytes=8 * 4096)
    vmm.headroom_bytes = 3 * 4096
    pages = [vmm.create(4096) for _ in range(5)]
    with pytest.raises(OutOfMemory, match="headroom of 12288"):
        vmm.create(4096)
    vmm.release(pages[0])
    vmm.create(4096)


def test_two_threads_never_get_the_same_page(vmm):
    """The scheduling thread and the worker create and release at the same time."""
    vmm.capacity_bytes = None
    got: list[set[int]] = [set(), set()]
    failures: list[Exception] = []
    start = threading.Barrier(2)

    def work(mine):
        start.wait()
        try:
            for number in range(600):
                mine.add(vmm.create(vmm.granularity))
                if number % 3 == 2:
                    vmm.release(mine.pop())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not got[0] & got[1]
    assert vmm.created_bytes == (len(got[0]) + len(got[1])) * vmm.granularity == 800 * vmm.granularity
    for handle in got[0] | got[1]:
        vmm.release(handle)
    assert vmm.created_bytes == 0
    assert os.fstat(vmm._fd).st_blocks == 0


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:0", 0), ("cuda:2", 2)])
def test_cuda_without_a_number_is_the_gpu_of_the_rank(monkeypatch, device, index):
    """SGLang names no number: each rank has made its GPU the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def stop(asked):
        raise Unsupported("cuDeviceGet", f"GPU {asked} was asked for")

    monkeypatch.setattr(cuda, "granularity_of", stop)
    with pytest.raises(Unsupported, match=f"GPU {index} was asked for"):
        open_vmm(device)


def test_two_threads_that_take_of_the_headroom_take_it_once():
    """The GPU's account of free memory: what one thread took, the other one finds gone, also between two questions."""
    asked = []

    def memory():
        asked.append(None)
        time.sleep(0.001)
        return 1000 - sum(taken), 1000

    headroom, taken = _Headroom(memory), []

    def take():
        for _ in range(300):
            if headroom.lacks(1, 200) is None:
                taken.append(1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 800 <= len(taken) <= 803, "each thread may have one in hand that the device does not know of yet"
    assert headroom.lacks(1, 200) == 1000 - len(taken)
    assert len(asked) < 500, "it is not asked for each"
