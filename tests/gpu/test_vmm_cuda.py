"""The driver's virtual memory, and the pools over it."""

from __future__ import annotations

import time

import pytest
import torch

from sglang_vtensor.handout import Ask
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.vmm import OutOfMemory, VMMError, open_vmm
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def vmm():
    return open_vmm("cuda:0")


def layout(vmm, layers=4):
    return KVLayout.choose(
        layers=layers,
        kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        granularity=vmm.granularity,
        tile_tokens=vmm.tile_tokens,
    )


def test_one_page_at_two_addresses_is_one_memory(vmm):
    size = vmm.granularity
    base = vmm.reserve(3 * size)
    page = vmm.create(size)
    vmm.map(base + size, size, page)  # the first page of the reservation stays unmapped
    vmm.map(base + 2 * size, size, page)
    vmm.clear(base + size, size)
    vmm.wait_cleared()
    region = vmm.tensor(base, 3 * size)
    region[size : 2 * size] = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    assert torch.equal(region[size : 2 * size], region[2 * size :])
    torch.cuda.synchronize()
    for address in (base + size, base + 2 * size):
        vmm.unmap(address, size)
    vmm.release(page)
    vmm.free(base, 3 * size)


def test_memory_goes_back_to_the_driver(vmm):
    size = 64 << 20
    before, _ = vmm.memory()
    pages = [vmm.create(size) for _ in range(8)]
    assert before - vmm.memory()[0] >= 8 * size
    for page in pages:
        vmm.release(page)
    assert abs(before - vmm.memory()[0]) < size


def test_errors_name_the_call_and_the_drivers_error(vmm):
    _, total = vmm.memory()
    huge = total // vmm.granularity * vmm.granularity * 2
    with pytest.raises(OutOfMemory, match=r"cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY: \d+ bytes \(\d+ of \d+"):
        vmm.create(huge)
    base = vmm.reserve(vmm.granularity)
    page = vmm.create(vmm.granularity)
    vmm.map(base, vmm.granularity, page)
    with pytest.raises(VMMError, match="cuMemMap failed with CUDA_ERROR"):
        vmm.map(base, vmm.granularity, page)
    vmm.unmap(base, vmm.granularity)
    vmm.release(page)
    vmm.free(base, vmm.granularity)


def test_every_layer_by_slot_is_memory_of_its_own(vmm):
    memory = KVMemory(vmm, layout(vmm), capacity_pages=32, max_tokens=2048, idle_seconds=0.1, worker=True)
    ((one, two, three),) = memory.allocate([Ask(None, 3)])
    slots = torch.cat([torch.arange(f * 128, f * 128 + 128) for f in (three, one, two)]).cuda()
    written = {}
    for layer in range(4):
        for x in memory.layer_views(layer):
            written[x.data_ptr()] = torch.randn(len(slots), 8, 128, device="cuda", dtype=torch.bfloat16)
            x[slots] = written[x.data_ptr()]
    assert all(torch.equal(x[slots], written[x.data_ptr()]) for layer in range(4) for x in memory.layer_views(layer))
    torch.cuda.synchronize()
    memory.free([one, two, three])
    memory.complete(memory.launch())
    wait_for(lambda: memory.backed == 1)
    memory.check_integrity()
    memory.close()


def test_mapping_goes_on_beside_running_kernels(vmm):
    """The worker backs and trims while kernels run: nothing waits for the device, and the kernels' result is right."""
    memory = KVMemory(vmm, layout(vmm), capacity_pages=200, max_tokens=2048, reserve_pages=0, idle_seconds=1e9)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    expected = a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    results = [a @ a for _ in range(40)]  # some 60 ms of work
    queued = time.perf_counter() - start
    ((*frames,),) = memory.allocate([Ask(None, 16)])
    busy = not torch.cuda.current_stream().query()
    mapped = time.perf_counter() - start
    torch.cuda.synchronize()
    assert busy, f"mapping waited for the kernels: queued after {queued:.4f} s, mapped after {mapped:.4f} s"
    assert all(torch.equal(result, expected) for result in results)
    memory.free(frames)
    memory.close()


def test_running_out_is_an_answer(vmm):
    free, _ = vmm.memory()
    shape = layout(vmm, layers=32)
    hog = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    try:
        memory = KVMemory(vmm, shape, capacity_pages=500, max_tokens=2048, worker=False)
        assert memory.allocate([Ask(None, 16)] * 25) is None
        assert memory.owned == 0
        placed = memory.allocate([Ask(None, 8)])
        assert placed is not None
        memory.check_integrity()
        memory.free(placed[0])
        memory.close()
    finally:
        del hog
        torch.cuda.empty_cache()
