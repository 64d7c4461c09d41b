"""The driver's virtual memory, and the pools over it."""

from __future__ import annotations

import time

import pytest
import torch

from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
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


def test_slots_and_segments_show_the_same_tokens(vmm):
    memory = KVMemory(
        vmm, layout(vmm), capacity_pages=32, max_tokens=2048, max_running=4, idle_seconds=0.1, worker=True
    )
    pages = memory.allocate(6)
    order = pages[::-1]
    segment = memory.lease(None, order)
    for layer in range(4):
        k, v = memory.identity_views(layer)
        ks, vs = memory.segment_views(layer)
        tokens = torch.cat([torch.arange(p * 128, p * 128 + 128) for p in order]).cuda()
        k[tokens] = torch.randn(len(tokens), 8, 128, device="cuda", dtype=torch.bfloat16)
        v[tokens] = torch.randn(len(tokens), 8, 128, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(ks[segment.index, : len(tokens)], k[tokens])
        assert torch.equal(vs[segment.index, : len(tokens)], v[tokens])
    torch.cuda.synchronize()
    memory.complete(memory.launch())
    memory.release(segment)
    memory.free(pages)
    memory.complete(memory.launch())
    memory.check_integrity()
    wait_for(lambda: memory.stats().pages_backed == 1)
    assert memory.stats().segment_mappings == 0
    memory.close()


def test_mapping_goes_on_beside_running_kernels(vmm):
    """The worker backs and trims while kernels run: nothing waits for the device, and the kernels' result is right."""
    memory = KVMemory(
        vmm, layout(vmm), capacity_pages=200, max_tokens=2048, max_running=4, reserve_pages=0, idle_seconds=1e9
    )
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    expected = a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    results = [a @ a for _ in range(40)]  # some 60 ms of work
    queued = time.perf_counter() - start
    pages = memory.allocate(20)
    segment = memory.lease(None, pages[:16])
    busy = not torch.cuda.current_stream().query()
    mapped = time.perf_counter() - start
    torch.cuda.synchronize()
    assert busy, f"mapping waited for the kernels: queued after {queued:.4f} s, mapped after {mapped:.4f} s"
    assert all(torch.equal(result, expected) for result in results)
    memory.release(segment)
    memory.free(pages)
    memory.close()


def test_running_out_is_an_answer(vmm):
    free, _ = vmm.memory()
    shape = layout(vmm, layers=32)
    hog = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    try:
        memory = KVMemory(vmm, shape, capacity_pages=500, max_tokens=2048, max_running=4, worker=False)
        assert memory.allocate(400) is None
        assert memory.pages.owned == 0
        pages = memory.allocate(8)
        assert pages is not None
        memory.check_integrity()
        memory.free(pages)
        memory.close()
    finally:
        del hog
        torch.cuda.empty_cache()
