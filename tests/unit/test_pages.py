import pytest

from sglang_vtensor.pages import PagePool, PageState
from sglang_vtensor.vmm import OutOfMemory
from tests.unit.faults import FaultyVirtualMemory

SIZE = 4096


@pytest.fixture
def vmm():
    return FaultyVirtualMemory()


@pytest.fixture
def pool(vmm):
    return PagePool(vmm, SIZE, 9)


def test_the_padding_page_is_backed_and_never_handed_out(pool):
    assert pool.state(0) is PageState.OWNED
    pages = pool.allocate(8)
    assert 0 not in pages
    assert pool.allocate(1) is None
    pool.vmm.tensor(pool.address(0), SIZE).fill_(1)
    with pytest.raises(ValueError, match="page 0 is not owned"):
        pool.free([0])
    pool.check_integrity()


def test_nothing_is_backed_before_it_is_needed(pool):
    assert pool.backed == 1
    pages = pool.allocate(3)
    assert pool.backed == 4
    pool.free(pages)
    assert (pool.backed, pool.free_backed, pool.owned) == (4, 3, 0)
    assert set(pool.allocate(3)) == set(pages), "free pages go before new ones"
    assert pool.backed == 4


def test_double_free_is_refused(pool):
    (page,) = pool.allocate(1)
    pool.free([page])
    with pytest.raises(ValueError, match="freed before"):
        pool.free([page])


def test_the_limit_bounds_what_is_owned(pool):
    pool.limit = 4
    pages = pool.allocate(3)
    assert pool.available() == 1
    assert pool.allocate(2) is None
    pool.limit = 2
    assert pool.available() == 0
    pool.free(pages)
    assert pool.available() == 2


def test_trim_gives_back_the_longest_free_and_keeps_what_is_in_use(pool):
    pages = pool.allocate(6)
    pool.free(pages[:3], epoch=1)
    pool.free(pages[3:], epoch=2)
    assert pool.trim(keep=0, completed=0) == 0, "a batch may still read all of them"
    assert pool.trim(keep=4, completed=1) == 2
    pool.count_alias(pages[5], +1)
    assert pool.trim(keep=0, completed=2) == 3
    assert pool.free_backed == 1
    pool.count_alias(pages[5], -1)
    assert pool.trim(keep=0, completed=2) == 1
    assert pool.backed == 1
    assert pool.vmm.created_bytes == SIZE
    pool.check_integrity()


def test_trim_hands_pages_back_in_the_order_they_were_freed(pool):
    first = pool.allocate(4)
    for page in first:
        pool.free([page])
    pool.trim(keep=2, completed=0)
    assert [pool.state(page) for page in first] == [PageState.UNBACKED] * 2 + [PageState.FREE] * 2


@pytest.mark.parametrize("call", ["create", "map", "clear"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_while_backing_leaves_no_half_page(pool, vmm, call, at):
    vmm.fail_calls, vmm.fail_at = (call,), at
    assert pool.allocate(3) is None
    assert str(pool.refusal).startswith(f"{call} failed with INJECTED")
    assert pool.owned == 0
    assert pool.free_backed == at - 1
    assert vmm.created_bytes == pool.backed * SIZE, "a page was lost"
    pool.check_integrity()
    assert len(pool.allocate(3)) == 3
    assert pool.refusal is None
    pool.check_integrity()


def test_pages_that_cannot_be_cleared_are_none(pool, vmm):
    vmm.fail_calls, vmm.fail_at = ("wait_cleared",), 1
    assert pool.allocate(3) is None
    assert str(pool.refusal).startswith("wait_cleared failed with INJECTED")
    assert (pool.owned, pool.free_backed, vmm.created_bytes) == (0, 0, pool.backed * SIZE)
    pool.check_integrity()
    seen = vmm.seen["wait_cleared"]
    assert len(pool.allocate(3)) == 3
    assert vmm.seen["wait_cleared"] == seen + 1, "waited for all of them at once"
    pool.check_integrity()


def test_a_full_device_is_an_answer_not_a_crash():
    vmm = FaultyVirtualMemory(capacity_bytes=4 * SIZE)
    pool = PagePool(vmm, SIZE, 9)
    assert pool.allocate(5) is None
    assert pool.owned == 0
    pages = pool.allocate(3)
    with pytest.raises(OutOfMemory):
        pool.back(1)
    assert pool.allocate(1) is None
    pool.free(pages)
    assert len(pool.allocate(2)) == 2
    pool.check_integrity()


def test_close_returns_everything(pool, vmm):
    pool.allocate(5)
    pool.close()
    assert vmm.created_bytes == 0


def test_too_small_a_pool_is_refused(vmm):
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(vmm, SIZE, 1)
