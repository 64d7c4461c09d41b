"""`python -m benchmarks.spike`: what it costs to place pages freely in a region of addresses that is far larger than
the memory behind it. On a Hopper GPU, with Llama-3-8B's geometry: a page is 128 tokens, 16 MiB, one handle.

Parts, each of which runs in a process of its own, as a fault ends a process:

    decode     attention by page table, with pages dense, shuffled, in lanes 16 GiB apart, and each page 16 GiB from the
               next; and the memory that the driver's page tables take for each placement
    moves      what mapping a page at another place and unmapping it costs beside running kernels; whether these calls
               wait for kernels; and whether kernels queued behind a move read the right values
    prefill    attention over runs against attention by page table
    tables     page tables that name frames without memory, behind a context and behind a window

A frame is a place for one page in a region. A lane is a part of a region, as long as the longest context. Rows are
written to `--rows` as they come, and merged into spike.json at the end. Ratios above 1 say that a contestant is faster
than what it is compared with.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.rounds import Row, rotated, spread
from benchmarks.serving import parts_of
from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefix_prefill
from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.sharing import Sharing
from sglang_vtensor.vmm import Handle, VirtualMemory, VMMError, open_vmm

console = Console(width=200)
LAYERS, Q_HEADS, KV_HEADS, DIM, PAGE = 32, 32, 8, 128, 128
SCALE = DIM**-0.5
#: A lane takes a context of 131,072 tokens: 16 GiB of addresses.
LANE_PAGES = 1024
LANE_TOKENS = LANE_PAGES * PAGE
ROUNDS = 9
#: Requests and the tokens of each. 4,096 pages are 64 GiB.
DECODE = [(256, 2048), (64, 8192), (256, 512), (64, 2048)]
#: Requests, new tokens of each, and the tokens before them.
PREFILL = [(8, 512, 4096), (1, 4096, 16384), (32, 64, 8192), (4, 128, 32768), (1, 512, 65536), (16, 512, 0)]
#: Memory that pages leave to everything else.
SPARED_BYTES = 8 << 30
#: The exit status of a part that met a fault and is to be started again, for what is left of it.
FAULTED = 3


Call = Callable[[int], torch.Tensor]


class Notes:
    """Rows in a JSON file, written as they come."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self) -> list[Row]:
        return json.loads(self.file.read_text()) if self.file.exists() else []

    def add(self, part: str, **values: Any) -> None:
        row = {"part": part} | {
            key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()
        }
        self.file.write_text(json.dumps([*self.rows(), row], indent=1))
        console.print(row)


class Region:
    """Addresses for so many frames, without memory behind them at first."""

    def __init__(self, vmm: VirtualMemory, layout: KVLayout, frames: int) -> None:
        self.vmm, self.layout, self.frames = vmm, layout, frames
        self.address = vmm.reserve(frames * layout.page_bytes)
        self.bytes = vmm.tensor(self.address, frames * layout.page_bytes)

    def at(self, frame: int) -> int:
        """The address of a frame."""
        return self.address + frame * self.layout.page_bytes

    def page(self, frame: int) -> torch.Tensor:
        """The bytes of a frame, as int32."""
        size = self.layout.page_bytes
        return self.bytes[frame * size : (frame + 1) * size].view(torch.int32)

    def tokens(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, `(tokens, kv_heads, dim)` each."""
        return self.layout.layer_views(self.bytes, layer)

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, `(frames, PAGE, kv_heads, dim)` each."""
        k, v = self.tokens(layer)
        return k.unflatten(0, (-1, PAGE)), v.unflatten(0, (-1, PAGE))


class Pages:
    """Pages with random K and V, and the regions that show them."""

    def __init__(self, vmm: VirtualMemory, layout: KVLayout, count: int) -> None:
        self.vmm, self.layout = vmm, layout
        self.handles: list[Handle] = [vmm.create(layout.page_bytes) for _ in range(count)]
        self.regions: list[tuple[Region, list[int]]] = []

    def show(self, region: Region, where: list[int]) -> None:
        """Map page `i` in frame `where[i]` of the region."""
        for handle, frame in zip(self.handles, where, strict=True):
            self.vmm.map(region.at(frame), self.layout.page_bytes, handle)
        self.regions.append((region, where))

    def fill(self) -> None:
        """Random values, by the first region."""
        region, frames = self.regions[0]
        for frame in frames:
            region.page(frame).view(torch.bfloat16).normal_()
        torch.cuda.synchronize()

    def close(self) -> None:
        torch.cuda.synchronize()
        for region, frames in self.regions:
            for frame in frames:
                self.vmm.unmap(region.at(frame), self.layout.page_bytes)
            self.vmm.free(region.address, region.frames * self.layout.page_bytes)
        for handle in self.handles:
            self.vmm.release(handle)


class Batch:
    """Requests with new tokens at the ends of their contexts, and random queries."""

    def __init__(self, new: Sequence[int], contexts: Sequence[int]) -> None:
        self.new, self.contexts = list(new), list(contexts)
        self.q = torch.randn(sum(new), Q_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.context_lens = torch.tensor(self.contexts, dtype=torch.int32, device="cuda")
        starts = [0]
        for count in new:
            starts.append(starts[-1] + count)
        self.starts = torch.tensor(starts, dtype=torch.int32, device="cuda")

    def pages(self) -> list[int]:
        """The number of pages of each request."""
        return [-(-context // PAGE) for context in self.contexts]

    def table(self, where: Sequence[int], columns: int = 0) -> torch.Tensor:
        """As `host_table`, on the device."""
        return self.host_table(where, columns).cuda()

    def host_table(self, where: Sequence[int], columns: int = 0) -> torch.Tensor:
        """A page table: `where` has the frames of all requests, one behind the other. Frame 0 stands behind them."""
        counts = self.pages()
        table = torch.zeros(len(counts), max(columns, *counts, 1), dtype=torch.int32)
        frames = iter(where)
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.tensor([next(frames) for _ in range(count)], dtype=torch.int32)
        return table


def opened() -> tuple[VirtualMemory, KVLayout]:
    vmm = open_vmm("cuda")
    layout = KVLayout.choose(
        layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.bfloat16,
        granularity=vmm.granularity,
        tile_tokens=vmm.tile_tokens,
        page_tokens=PAGE,
    )
    torch.manual_seed(0)
    return vmm, layout


def fa3(batch: Batch, region: Region, **options: Any) -> Call:
    """FlashAttention-3, by `page_table`, or over rows of a whole lane, by `cache_batch_idx`."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    if "page_table" in options:
        views = [region.paged(layer) for layer in range(LAYERS)]
    else:
        longest = -(-max(batch.contexts) // PAGE) * PAGE
        rows = [tuple(x.unflatten(0, (-1, LANE_TOKENS)) for x in region.tokens(layer)) for layer in range(LAYERS)]
        views = [(k[:, :longest], v[:, :longest]) for k, v in rows]
    most = max(batch.new)

    def call(layer: int) -> torch.Tensor:
        k, v = views[layer]
        out: torch.Tensor = flash_attn_with_kvcache(
            q=batch.q,
            k_cache=k,
            v_cache=v,
            cache_seqlens=batch.context_lens,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=most,
            softmax_scale=SCALE,
            causal=True,
            **options,
        )
        return out

    return call


def shared_decode(batch: Batch, region: Region, table: torch.Tensor) -> Call:
    """Our kernel of shared decode, for requests that share nothing."""
    requests = len(batch.contexts)
    sharing = Sharing(slots=requests, requests=256, page_tokens=PAGE)
    for request in range(requests):
        sharing.join(request, [])
    decoder = SharedDecoder(
        max_requests=256,
        slots=requests,
        page_tokens=PAGE,
        max_tokens=max(batch.contexts),
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device="cuda",
    )
    each = torch.arange(requests, device="cuda")
    slots = (table[:, :, None] * PAGE + torch.arange(PAGE, dtype=torch.int32, device="cuda")).flatten(1)
    decoder.update(sharing.tables)
    decoder.find_pages(slots, each, batch.context_lens)
    decoder.plan(each, batch.context_lens)
    views = [region.tokens(layer) for layer in range(LAYERS)]
    return lambda layer: decoder(batch.q, *views[layer], scale=SCALE)


def runs(batch: Batch, region: Region) -> Call:
    """Our prefill kernel, over contexts that begin at the starts of lanes."""
    plan = plan_prefill(
        batch.new,
        [[(lane * LANE_TOKENS, context)] for lane, context in enumerate(batch.contexts)],
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device=batch.q.device,
        page_tokens=PAGE,
    )
    views = [region.tokens(layer) for layer in range(LAYERS)]
    return lambda layer: prefix_prefill(batch.q, *views[layer], plan, scale=SCALE)


def graph(call: Call) -> torch.cuda.CUDAGraph:
    """One call on each layer. The call must live as long as the graph, which reads its buffers."""
    for layer in range(2):
        call(layer)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for layer in range(LAYERS):
            call(layer)
    return captured


def turns(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds a call, of each round. The contestants take turns; a first round, which warms up, is left out."""
    graphs = {name: graph(call) for name, call in calls.items()}
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(ROUNDS + 1):
        for name in rotated(list(graphs), number):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if number:
                seen[name].append(start.elapsed_time(end) * 1000 / LAYERS)
    return seen


def compared(mine: Sequence[float], base: Sequence[float]) -> Row:
    """The median time with its spread, and how many times as fast it is as `base` in the same rounds."""
    own, ratio = spread(mine), spread([b / m for m, b in zip(mine, base, strict=True)])
    return {"us": own.median, "us_least": own.least, "us_most": own.most} | {
        "ratio": ratio.median,
        "ratio_least": ratio.least,
        "ratio_most": ratio.most,
        "rounds": own.rounds,
    }


# Decode, with pages in various places.


def most_reservable(vmm: VirtualMemory) -> int:
    """The largest power of two of bytes that can be reserved at once."""
    for power in range(56, 30, -1):
        try:
            address = vmm.reserve(1 << power)
        except VMMError:
            continue
        vmm.free(address, 1 << power)
        return 1 << power
    return 0


def apart(vmm: VirtualMemory, layout: KVLayout, count: int) -> tuple[Region, list[int], int]:
    """A region in which `count` pages are a lane apart; or a part of a lane, if there are too few addresses for that.
    Returns it with the frames, and how many frames apart they are."""
    lanes = count
    while True:
        try:
            region = Region(vmm, layout, lanes * LANE_PAGES)
            break
        except VMMError:
            lanes //= 2
            if not lanes:
                raise
    step = LANE_PAGES * lanes // count
    return region, [i * step for i in range(count)], step


def decode(notes: Notes) -> None:
    vmm, layout = opened()
    most = most_reservable(vmm)
    notes.add("decode", what="addresses", reservable_bytes=most, lanes=most // (LANE_PAGES * layout.page_bytes))
    for requests, context in DECODE:
        needed = requests * context * layout.stride_bytes
        if needed + SPARED_BYTES > vmm.memory()[0]:
            notes.add("decode", what="left out", requests=requests, context=context, bytes=needed)
            continue
        placements(notes, vmm, layout, requests, context)
        torch.cuda.empty_cache()


def placements(notes: Notes, vmm: VirtualMemory, layout: KVLayout, requests: int, context: int) -> None:
    """One batch, whose pages are shown in several regions at once: in each at other places."""
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    each = context // PAGE
    count = requests * each
    pages = Pages(vmm, layout, count)
    batch = Batch([1] * requests, [context] * requests)
    in_order = list(range(count))
    far, far_frames, step = apart(vmm, layout, count)
    places: dict[str, tuple[Region, list[int]]] = {
        "dense": (Region(vmm, layout, count), in_order),
        "shuffled": (Region(vmm, layout, count), random.Random(0).sample(in_order, count)),
        "lanes": (
            Region(vmm, layout, requests * LANE_PAGES),
            [i // each * LANE_PAGES + i % each for i in range(count)],
        ),
        "apart": (far, far_frames),
    }
    about: dict[str, Row] = {}
    for name, (region, frames) in places.items():
        torch.cuda.synchronize()
        free, used = vmm.memory()[0], pynvml.nvmlDeviceGetMemoryInfo(gpu).used
        start = time.perf_counter()
        pages.show(region, frames)
        seconds = time.perf_counter() - start
        about[name] = {
            "tables_bytes": free - vmm.memory()[0],
            "tables_bytes_nvml": int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used - used),
            "map_us": seconds / count * 1e6,
            "region_bytes": region.frames * layout.page_bytes,
        }
    about["apart"]["apart_bytes"] = step * layout.page_bytes
    pages.fill()
    calls: dict[str, Call] = {}
    for name, (region, frames) in places.items():
        table = batch.table(frames)
        calls[f"fa3 {name}"] = fa3(batch, region, page_table=table)
        calls[f"shared {name}"] = shared_decode(batch, region, table)
    outs = {name: call(LAYERS - 1).float() for name, call in calls.items()}
    measured = turns(calls)
    read = count * layout.page_bytes / LAYERS
    for name in calls:
        kernel, place = name.split()
        row: Row = {"kernel": kernel, "requests": requests, "context": context, "pages": count, "placement": place}
        row |= about[place] | compared(measured[name], measured[f"{kernel} dense"])
        row["gbytes_per_second"] = read / row["us"] / 1e3
        row["same_as_dense"] = torch.equal(outs[name], outs[f"{kernel} dense"])
        base = outs["fa3 dense"]
        row["error"] = float((outs[name] - base).norm() / base.norm())
        notes.add("decode", **row)
    pages.close()


# Moves.

MOVED, TOGETHER = 256, 8
#: For so long each mover moves pages in each round, and so much work is queued where a call may wait for it.
MOVE_SECONDS, QUEUED_SECONDS = 0.2, 0.05
MOVE_ROUNDS = 5
Times = dict[str, list[tuple[float, float]]]


class Driver:
    """The calls that `CudaVirtualMemory` makes, one by one. Each notes its microseconds, and those of them in which its
    thread had a processor, in `times`."""

    def __init__(self, vmm: VirtualMemory, page_bytes: int) -> None:
        from cuda.bindings import driver

        self.driver, self.page_bytes = driver, page_bytes
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = vmm.device.index
        self.prop = driver.CUmemAllocationProp()
        self.prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.prop.location = location
        self.access = driver.CUmemAccessDesc()
        self.access.location = location
        self.access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.times: Times = {}

    def map(self, address: int, handle: Handle) -> None:
        self._call("cuMemMap", address, self.page_bytes, 0, handle, 0)

    def set_access(self, address: int, pages: int = 1) -> None:
        self._call("cuMemSetAccess", address, pages * self.page_bytes, [self.access], 1)

    def unmap(self, address: int, pages: int = 1) -> None:
        self._call("cuMemUnmap", address, pages * self.page_bytes)

    def create(self) -> Handle:
        return Handle(int(self._call("cuMemCreate", self.page_bytes, self.prop, 0)))

    def release(self, handle: Handle) -> None:
        self._call("cuMemRelease", handle)

    def _call(self, name: str, *args: Any) -> Any:
        call = getattr(self.driver, name)
        cpu, start = time.thread_time(), time.perf_counter()
        error, *values = call(*args)
        wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
        assert error == self.driver.CUresult.CUDA_SUCCESS, f"{name}: {error}"
        self.times.setdefault(name, []).append((wall * 1e6, cpu * 1e6))
        return values[0] if values else None


class Load:
    """Keeps the GPU busy: what was launched is waited for, but never the last `ahead` launches."""

    def __init__(self, launch: Callable[[], object] | None, ahead: int) -> None:
        self.launch, self.ahead = launch, ahead

    def run(self, done: threading.Event) -> list[float]:
        """Until `done`. Returns the milliseconds that each launch took on the GPU, with what it waited for."""
        if self.launch is None:
            done.wait()
            return []
        waiting: deque[torch.cuda.Event] = deque()
        took: list[float] = []
        last = None
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set():
                self.launch()
                event = torch.cuda.Event(enable_timing=True, blocking=True)
                event.record()
                waiting.append(event)
                if len(waiting) > self.ahead:
                    first = waiting.popleft()
                    first.synchronize()
                    if last is not None:
                        took.append(last.elapsed_time(first))
                    last = first
        torch.cuda.synchronize()
        return took


def beside(vmm: VirtualMemory, load: Load, caller: str, work: Callable[[], None]) -> list[float]:
    """Call `work` in this thread or in another one, while the other one of them runs the load."""
    done = threading.Event()

    def attached(call: Callable[[], Any]) -> Any:
        vmm.attach_thread()
        return call()

    def timed() -> None:
        try:
            time.sleep(0.02)  # the load is under way
            work()
        finally:
            done.set()

    with ThreadPoolExecutor(1) as pool:
        if caller == "worker":
            future = pool.submit(attached, timed)
            took = load.run(done)
            future.result()
        else:
            future = pool.submit(attached, lambda: load.run(done))
            timed()
            took = future.result()
    return took


class Mover:
    """Pages that go to and fro between two places each, in a region that attention reads elsewhere."""

    def __init__(self, driver: Driver, region: Region, handles: Sequence[Handle]) -> None:
        self.driver, self.region, self.handles = driver, region, handles
        self.here = [i // TOGETHER * LANE_PAGES + 512 + i % TOGETHER for i in range(len(handles))]
        self.there = [frame + 256 for frame in self.here]
        self.spare = [frame + 128 for frame in self.here]
        self.pages, self.seconds = 0, 0.0
        for handle, frame in zip(handles, self.here, strict=True):
            driver.map(region.at(frame), handle)
            driver.set_access(region.at(frame))

    def keep_on(self, name: str) -> None:
        """Move for some time, as one of `MOVERS` does, and count from the beginning."""
        self.driver.times, self.pages = {}, 0
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < MOVE_SECONDS:
            getattr(self, name)()
        self.seconds = seconds

    def nothing(self) -> None:
        time.sleep(0.01)

    def one_by_one(self) -> None:
        for i in range(len(self.handles)):
            self._move(i)

    def _move(self, i: int) -> None:
        old, new = self.region.at(self.here[i]), self.region.at(self.there[i])
        self.driver.map(new, self.handles[i])
        self.driver.set_access(new)
        self.driver.unmap(old)
        self.here[i], self.there[i] = self.there[i], self.here[i]
        self.pages += 1

    def now_and_then(self) -> None:
        """A page every 2 ms, as a server's worker moves them, and not one right behind the other."""
        for _ in range(TOGETHER):
            time.sleep(0.002)
            self._move(self.pages % len(self.handles))

    def eight_together(self) -> None:
        at = self.region.at
        for i in range(0, len(self.handles), TOGETHER):
            for k in range(i, i + TOGETHER):
                self.driver.map(at(self.there[k]), self.handles[k])
            self.driver.set_access(at(self.there[i]), TOGETHER)
            self.driver.unmap(at(self.here[i]), TOGETHER)
        self.here, self.there = self.there, self.here
        self.pages += len(self.handles)

    def created(self) -> None:
        """Pages that are new, and given back."""
        for frame in self.spare[:64]:
            handle = self.driver.create()
            self.driver.map(self.region.at(frame), handle)
            self.driver.set_access(self.region.at(frame))
            self.driver.unmap(self.region.at(frame))
            self.driver.release(handle)
        self.pages += 64


#: Per page: how many pages one call of each kind stands for.
MOVERS: dict[str, dict[str, int]] = {
    "nothing": {},
    "one_by_one": {"cuMemMap": 1, "cuMemSetAccess": 1, "cuMemUnmap": 1},
    "now_and_then": {"cuMemMap": 1, "cuMemSetAccess": 1, "cuMemUnmap": 1},
    "eight_together": {"cuMemMap": 1, "cuMemSetAccess": TOGETHER, "cuMemUnmap": TOGETHER},
    "created": {"cuMemCreate": 1, "cuMemMap": 1, "cuMemSetAccess": 1, "cuMemUnmap": 1, "cuMemRelease": 1},
}


def moves(notes: Notes) -> None:
    vmm, layout = opened()
    torch.cuda.set_stream(torch.cuda.Stream())  # as a server does
    driver = Driver(vmm, layout.page_bytes)
    requests, each = 64, 16
    region = Region(vmm, layout, requests * LANE_PAGES)
    read = Pages(vmm, layout, requests * each)
    frames = [i // each * LANE_PAGES + i % each for i in range(requests * each)]
    read.show(region, frames)
    read.fill()
    batch = Batch([1] * requests, [each * PAGE] * requests)
    attend = fa3(batch, region, page_table=batch.table(frames))
    replayed = graph(attend)
    few = Batch([1] * 8, [512] * 8)
    small = fa3(few, region, page_table=few.table([lane * LANE_PAGES + i for lane in range(8) for i in range(4)]))

    def with_python() -> None:
        """A replay, and about a millisecond in which the interpreter is busy."""
        replayed.replay()
        sum(i & 1 for i in range(20_000))

    loads = {
        "idle": Load(None, 0),
        "graphs": Load(replayed.replay, 2),
        "eager": Load(lambda: [small(layer) for layer in range(LAYERS)], 4),
        "python": Load(with_python, 2),
    }
    mover = Mover(driver, region, [vmm.create(layout.page_bytes) for _ in range(MOVED)])
    for check in (
        lambda: times_of_moves(notes, vmm, loads, mover),
        lambda: waits(notes, replayed, mover),
        lambda: roaming(notes, vmm, layout),
        lambda: written(notes, vmm, layout),
    ):
        try:
            check()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            notes.add("moves", what="failed", error=repr(error))


def times_of_moves(notes: Notes, vmm: VirtualMemory, loads: dict[str, Load], mover: Mover) -> None:
    """Every mover beside every load, in both threads, in turns."""
    kinds = [
        (load, caller, name)
        for load in loads
        for caller in ("main", "worker")
        for name in MOVERS
        if name != "nothing" or load != "idle"
    ]
    seen: dict[tuple[str, str, str], list[Times]] = {kind: [] for kind in kinds}
    speed: dict[tuple[str, str, str], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(MOVE_ROUNDS + 1):
        for kind in kinds:
            load, caller, name = kind
            took = beside(vmm, loads[load], caller, functools.partial(mover.keep_on, name))
            seen[kind].append(mover.driver.times)
            speed[kind].append((mover.pages / mover.seconds, statistics.median(took) if took else 0.0))
    for kind in kinds:
        load, caller, name = kind
        of_rounds, speeds = seen[kind][1:], speed[kind][1:]
        row: Row = {"what": "times", "load": load, "caller": caller, "mover": name, "rounds": MOVE_ROUNDS}
        totals = [0.0] * MOVE_ROUNDS
        for call, pages in MOVERS[name].items():
            medians = [statistics.median(wall for wall, _ in times[call]) / pages for times in of_rounds]
            totals = [total + median for total, median in zip(totals, medians, strict=True)]
            every = sorted(wall / pages for times in of_rounds for wall, _ in times[call])
            cpu = statistics.median(cpu for times in of_rounds for _, cpu in times[call]) / pages
            row[call] = {
                "us": round(statistics.median(medians), 2),
                "us_least": round(min(medians), 2),
                "us_most": round(max(medians), 2),
                "us_p99": round(every[int(0.99 * (len(every) - 1))], 2),
                "processor_us": round(cpu, 2),
            }
        total = spread(totals)
        row |= {"page_us": total.median, "page_us_least": total.least, "page_us_most": total.most}
        row["pages_per_second"] = statistics.median(pages for pages, _ in speeds)
        replay = spread([milliseconds for _, milliseconds in speeds])
        row |= {"launch_ms": replay.median, "launch_ms_least": replay.least, "launch_ms_most": replay.most}
        notes.add("moves", **row)


class Steps:
    """Calls while work is on the GPU, until `end`: the microseconds of each, and whether the work was always still
    running behind it."""

    def __init__(self) -> None:
        self.end = torch.cuda.Event()
        self.times: dict[str, list[float]] = {}
        self.running: dict[str, bool] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        value = call(*args)
        self.times.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        self.running[name] = self.running.get(name, True) and not self.end.query()
        return value


def waits(notes: Notes, replayed: torch.cuda.CUDAGraph, mover: Mover) -> None:
    """The calls while work of 50 ms is on the GPU: how long they take, and whether the work is done behind them."""
    driver, at = mover.driver, mover.region.at
    replayed.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    replayed.replay()
    torch.cuda.synchronize()
    replays = math.ceil(QUEUED_SECONDS / (time.perf_counter() - start))

    def many_kernels() -> None:
        for _ in range(replays):
            replayed.replay()

    works: dict[str, Callable[[], None]] = {
        "one kernel": lambda: torch.cuda._sleep(int(QUEUED_SECONDS * 1.8e9)),
        "decode": many_kernels,
    }
    handle, spare = mover.handles[0], mover.spare[0]
    for name, work in works.items():
        step = Steps()
        left: list[float] = []
        for _ in range(2 * MOVE_ROUNDS):
            old, new = mover.here[0], mover.there[0]
            mover.here[0], mover.there[0] = new, old
            step.end = torch.cuda.Event()
            work()
            step.end.record()
            time.sleep(0.005)  # the work has begun
            step("map", driver.map, at(new), handle)
            step("set_access", driver.set_access, at(new))
            step("unmap", driver.unmap, at(old))
            made = step("create", driver.create)
            step("map_created", driver.map, at(spare), made)
            step("set_access_created", driver.set_access, at(spare))
            step("unmap_created", driver.unmap, at(spare))
            step("release", driver.release, made)
            start = time.perf_counter()
            step.end.synchronize()
            left.append((time.perf_counter() - start) * 1e3)
        for call, values in step.times.items():
            took = spread(values)
            notes.add(
                "moves",
                what="waits",
                work=name,
                call=call,
                us=took.median,
                us_least=took.least,
                us_most=took.most,
                rounds=took.rounds,
                kernels_still_ran=step.running[call],
                left_ms=statistics.median(left),
            )
    torch.cuda.synchronize()


def roaming(notes: Notes, vmm: VirtualMemory, layout: KVLayout) -> None:
    """Attention over pages that are all moved again and again. Each move maps the pages at new places while kernels
    read them at the old ones, queues the new page table, and takes the old mappings away as soon as the last kernel
    that read them has ended, while kernels that read the new ones run."""
    requests, each, cycles, replays = 16, 4, 60, 12
    count = requests * each
    region = Region(vmm, layout, 64 * LANE_PAGES)
    pages = Pages(vmm, layout, count)
    where = random.Random(1).sample(range(1, region.frames), count)
    pages.show(region, where)
    pages.fill()
    batch = Batch([1] * requests, [each * PAGE - request for request in range(requests)])
    table = batch.table(where)
    call = fa3(batch, region, page_table=table)
    expected = [call(layer).clone() for layer in range(LAYERS)]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def checked(layer: int) -> torch.Tensor:
        out = call(layer)
        wrong.add_((out != expected[layer]).sum())
        return out

    captured = graph(checked)
    wrong.zero_()
    torch.cuda.synchronize()
    choose = random.Random(2)
    last = torch.cuda.Event()
    captured.replay()
    last.record()
    overlapped = 0
    for _ in range(cycles):
        taken = set(where)
        fresh = [frame for frame in choose.sample(range(1, region.frames), 2 * count) if frame not in taken][:count]
        for handle, frame in zip(pages.handles, fresh, strict=True):
            vmm.map(region.at(frame), layout.page_bytes, handle)
        table.copy_(batch.host_table(fresh).pin_memory(), non_blocking=True)
        for _ in range(replays):
            captured.replay()
        event = torch.cuda.Event()
        event.record()
        last.synchronize()
        overlapped += not event.query()
        for frame in where:
            vmm.unmap(region.at(frame), layout.page_bytes)
        overlapped += not event.query()
        where, last = fresh, event
    torch.cuda.synchronize()
    notes.add(
        "moves",
        what="roaming",
        cycles=cycles,
        pages_a_cycle=count,
        wrong_values=int(wrong),
        unmaps_beside_kernels=overlapped / (2 * cycles),
    )
    pages.regions = [(region, where)]
    pages.close()


def written(notes: Notes, vmm: VirtualMemory, layout: KVLayout) -> None:
    """What is written by the first mapping, by kernels in flight, is read by the second one; and a frame that another
    page is mapped in shows that page."""
    count, rounds = 32, 10
    region = Region(vmm, layout, 64 * LANE_PAGES)
    pages, others = Pages(vmm, layout, count), [vmm.create(layout.page_bytes) for _ in range(count)]
    old = [lane * LANE_PAGES for lane in range(count)]
    new = [lane * LANE_PAGES + 512 for lane in range(count)]
    pages.show(region, old)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    overlapped = 0

    def check(frames: list[int], first: int) -> None:
        for i, frame in enumerate(frames):
            wrong.add_((region.page(frame) != first + i).sum())

    size = layout.page_bytes
    for number in range(rounds):
        value = 1000 * number
        torch.cuda._sleep(20_000_000)
        for i, frame in enumerate(old):
            region.page(frame).fill_(value + i)
        ended = torch.cuda.Event()
        ended.record()
        for handle, frame in zip(pages.handles, new, strict=True):  # the writes have not begun
            vmm.map(region.at(frame), size, handle)
        overlapped += not ended.query()
        check(new, value)
        torch.cuda._sleep(40_000_000)
        check(new, value)
        last = torch.cuda.Event()
        last.record()
        ended.synchronize()
        for handle, frame in zip(others, old, strict=True):  # the checks are under way
            vmm.unmap(region.at(frame), size)
            vmm.map(region.at(frame), size, handle)
        overlapped += not last.query()
        for i, frame in enumerate(old):
            region.page(frame).fill_(-1 - i)
        check(new, value)
        for i, frame in enumerate(old):
            wrong.add_((region.page(frame) != -1 - i).sum())
        torch.cuda.synchronize()
        for frame in new:
            vmm.unmap(region.at(frame), size)
        for handle, frame in zip(pages.handles, old, strict=True):
            vmm.unmap(region.at(frame), size)
            vmm.map(region.at(frame), size, handle)
    notes.add(
        "moves",
        what="written",
        rounds=rounds,
        pages=count,
        wrong_values=int(wrong),
        calls_beside_kernels=overlapped / (2 * rounds),
    )
    pages.close()
    for handle in others:
        vmm.release(handle)


# Prefill, over runs and by page table.


def prefill(notes: Notes) -> None:
    vmm, layout = opened()
    for requests, new, before in PREFILL:
        context = before + new
        each = -(-context // PAGE)
        count = requests * each
        pages = Pages(vmm, layout, count)
        lanes = Region(vmm, layout, requests * LANE_PAGES)
        in_lanes = [i // each * LANE_PAGES + i % each for i in range(count)]
        shuffled, mixed = Region(vmm, layout, count), random.Random(0).sample(range(count), count)
        pages.show(lanes, in_lanes)
        pages.show(shuffled, mixed)
        pages.fill()
        batch = Batch([new] * requests, [context] * requests)
        rows = torch.arange(requests, dtype=torch.int32, device="cuda")
        calls = {
            "fa3 runs": fa3(batch, lanes, cache_batch_idx=rows),
            "fa3 pages": fa3(batch, lanes, page_table=batch.table(in_lanes)),
            "fa3 shuffled": fa3(batch, shuffled, page_table=batch.table(mixed)),
            "ours runs": runs(batch, lanes),
        }
        outs = {name: call(LAYERS - 1).float() for name, call in calls.items()}
        measured = turns(calls)
        base = outs["fa3 pages"]
        for name in calls:
            kernel, layout_of = name.split()
            row: Row = {"kernel": kernel, "by": layout_of, "requests": requests, "new": new, "before": before}
            row |= compared(measured[name], measured["fa3 pages"])
            pairs = requests * (new * context - new * (new - 1) / 2)
            row["tflops"] = 4 * pairs * Q_HEADS * DIM / row["us"] / 1e6
            row["error"] = float((outs[name] - base).norm() / base.norm())
            notes.add("prefill", **row)
        pages.close()
        del calls, outs, base
        torch.cuda.empty_cache()


# Page tables that name frames without memory.

COLUMNS = 1024
WINDOW = 512
SHORT = [1, 127, 128, 129, 640, 1000, 2048, 300]
LONG = [4096, 2000, 513, 1537, 700, 3000, 640, 5000]
#: Name, new tokens of each request, contexts, window, pages kept behind it, and options.
Group = tuple[str, list[int], list[int], int, int, dict[str, Any]]
GROUPS: list[Group] = [
    ("decode, 8 requests", [1] * 8, SHORT, -1, 0, {}),
    ("decode, 64 requests", [1] * 64, SHORT * 8, -1, 0, {}),
    ("decode, 16 splits", [1] * 8, SHORT, -1, 0, {"num_splits": 16}),
    ("decode, empty contexts among them", [1] * 8, [0, 127, 0, 129, 640, 0, 2048, 0], -1, 0, {}),
    ("prefill, few new", [1, 8, 5, 8, 7, 3, 8, 1], SHORT, -1, 0, {}),
    ("prefill, many new", [1, 100, 128, 64, 300, 257, 512, 300], SHORT, -1, 0, {}),
    ("window, decode", [1] * 8, LONG, WINDOW, 0, {}),
    ("window, prefill, few new", [1, 8, 5, 8, 7, 3, 8, 1], LONG, WINDOW, 0, {}),
    ("window, prefill, many new", [512, 100, 128, 64, 300, 257, 512, 300], LONG, WINDOW, 0, {}),
    ("window, decode, a page kept", [1] * 8, LONG, WINDOW, 1, {}),
    ("window, prefill, few new, a page kept", [1, 8, 5, 8, 7, 3, 8, 1], LONG, WINDOW, 1, {}),
    ("window, prefill, many new, a page kept", [512, 100, 128, 64, 300, 257, 512, 300], LONG, WINDOW, 1, {}),
]
MODES = ("eager", "eager, wide", "graph, wide")


def tables(notes: Notes) -> None:
    """Each group with good numbers first, whose result is then expected. A fault ends the process; the next one goes on
    with what has no row yet, but not with other numbers of the group and mode that had the fault."""
    vmm, layout = opened()
    region = Region(vmm, layout, 256 * LANE_PAGES)
    count = 1 + sum(-(-context // PAGE) for context in SHORT * 8)
    pages = Pages(vmm, layout, count)
    pages.show(region, list(range(count)))
    pages.fill()
    nowhere = {"unmapped": count + 10, "far": region.frames - 1}
    for group in GROUPS:
        for mode in MODES:
            more = {"minus one": -1, "beyond": 2**31 - 1} if group is GROUPS[0] and mode == MODES[0] else {}
            for name, frame in (nowhere | more).items():
                one_table(notes, region, count, group, mode, name, frame)
    shared_tables(notes, region, count, nowhere)


def one_table(notes: Notes, region: Region, count: int, group: Group, mode: str, name: str, frame: int) -> None:
    title, new, contexts, window, kept, options = group
    tried = [row for row in notes.rows() if (row["part"], row.get("group"), row.get("mode")) == ("tables", title, mode)]
    if any(row["nowhere"] == name or row["fault"] for row in tried):
        return
    batch = Batch(new, contexts)
    columns = COLUMNS if "wide" in mode else max(batch.pages()) + 4
    frames = [1 + i % (count - 1) for i in range(sum(batch.pages()))]
    good = batch.table(frames, columns)
    bad = good.clone()
    for i, (fresh, context, used) in enumerate(zip(new, contexts, batch.pages(), strict=True)):
        bad[i, used:] = frame
        if window >= 0:
            bad[i, : max(0, max(0, context - fresh - window) // PAGE - kept)] = frame
    changed = int((bad != good).sum())
    table = good.clone()
    call = fa3(batch, region, page_table=table, window_size=(window, 0 if window >= 0 else -1), **options)
    expected = [call(layer).clone() for layer in (0, LAYERS - 1)]
    outs: list[torch.Tensor] = []
    fault = ""
    try:
        if mode.startswith("graph"):
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                outs = [call(layer) for layer in (0, LAYERS - 1)]
            table.copy_(bad)
            captured.replay()
        else:
            table.copy_(bad)
            outs = [call(layer) for layer in (0, LAYERS - 1)]
        torch.cuda.synchronize()
    except RuntimeError as error:
        fault = str(error).splitlines()[0]
    right = not fault and all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    notes.add("tables", kernel="fa3", group=title, mode=mode, nowhere=name, entries=changed, right=right, fault=fault)
    if fault:
        os._exit(FAULTED)


def shared_tables(notes: Notes, region: Region, count: int, nowhere: dict[str, int]) -> None:
    """Our kernel of shared decode, with such frames behind the contexts in the table of slots."""
    title = "decode, ours"
    batch = Batch([1] * len(SHORT), SHORT)
    good = batch.table(list(range(1, 1 + sum(batch.pages()))), max(batch.pages()) + 4)
    for name, frame in nowhere.items():
        if any((row.get("group"), row.get("nowhere")) == (title, name) for row in notes.rows()):
            continue
        bad = good.clone()
        for i, used in enumerate(batch.pages()):
            bad[i, used:] = frame
        entries = int((bad != good).sum())
        expected = shared_decode(batch, region, good)(LAYERS - 1)
        fault, right = "", False
        try:
            out = shared_decode(batch, region, bad)(LAYERS - 1)
            torch.cuda.synchronize()
            right = torch.equal(out, expected)
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
        row: Row = {"kernel": "shared", "group": title, "mode": "eager", "nowhere": name, "entries": entries}
        notes.add("tables", **row, right=right, fault=fault)
        if fault:
            os._exit(FAULTED)


PARTS: dict[str, Callable[[Notes], None]] = {
    "decode": decode,
    "moves": moves,
    "tables": tables,
    "prefill": prefill,
}


def one_part(part: str, file: Path) -> None:
    """In a process of its own."""
    torch.cuda.init()
    PARTS[part](Notes(file))
    torch.cuda.synchronize()
    # Mappings end with the process; what torch does at its end may not like them.
    sys.stdout.flush()
    os._exit(0)


def summarize(rows: list[Row]) -> dict[str, float]:
    """The worst ratio of each placement to dense, what page tables take, what moves cost, and what went wrong."""
    summary: dict[str, float] = {}
    placed = [row for row in rows if row["part"] == "decode" and "placement" in row]
    for kernel in ("fa3", "shared"):
        for place in ("shuffled", "lanes", "apart"):
            ratios = [row["ratio"] for row in placed if (row["kernel"], row["placement"]) == (kernel, place)]
            if ratios:
                summary[f"decode_{kernel}_{place}_vs_dense_worst"] = min(ratios)
    for place in ("dense", "lanes", "apart"):
        taken = [row["tables_bytes"] / row["pages"] for row in placed if row["placement"] == place]
        if taken:
            summary[f"page_table_bytes_a_page_{place}"] = max(taken)
    for row in rows:
        if row["part"] == "moves" and row["what"] == "times" and row["mover"] != "nothing":
            summary[f"{row['mover']}_us_{row['load']}_{row['caller']}"] = row["page_us"]
    waited = [row for row in rows if row["part"] == "moves" and row["what"] == "waits"]
    if waited:
        summary["calls_that_waited"] = float(sum(not row["kernels_still_ran"] for row in waited))
    checked = [row["wrong_values"] for row in rows if row["part"] == "moves" and "wrong_values" in row]
    if checked:
        summary["wrong_values_after_moves"] = float(sum(checked))
    for name, kernel, by in (
        ("fa3_runs", "fa3", "runs"),
        ("fa3_shuffled", "fa3", "shuffled"),
        ("ours_runs", "ours", "runs"),
    ):
        faster = [
            row["ratio"] for row in rows if row["part"] == "prefill" and (row["kernel"], row["by"]) == (kernel, by)
        ]
        if faster:
            summary[f"prefill_{name}_vs_pages_geomean"] = statistics.geometric_mean(faster)
    tried = [row for row in rows if row["part"] == "tables"]
    for name, chosen in (
        ("behind_context", [row for row in tried if not row["group"].startswith("window")]),
        ("behind_window", [row for row in tried if row["group"].startswith("window")]),
    ):
        chosen = [row for row in chosen if row["nowhere"] in ("unmapped", "far")]
        if chosen:
            summary[f"tables_{name}_right_share"] = sum(row["right"] for row in chosen) / len(chosen)
    return summary


def main(
    parts: Annotated[str, typer.Option(help="With commas; all of them by default.")] = "",
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here too.")] = None,
) -> None:
    """Measure, print, and merge into spike.json."""
    chosen = parts_of(parts, PARTS)
    with tempfile.TemporaryDirectory() as folder:
        file = rows_file or Path(folder) / "rows.json"
        file.unlink(missing_ok=True)
        context = multiprocessing.get_context("spawn")
        for part in chosen:
            start = time.perf_counter()
            for _ in range(16):
                process = context.Process(target=one_part, args=(part, file))
                process.start()
                process.join(200)
                if process.is_alive():
                    process.kill()
                    process.join()
                if process.exitcode != FAULTED:
                    break
            if process.exitcode:
                console.print(f"{part} ended with {process.exitcode}")
            console.print(f"{part}: {time.perf_counter() - start:.0f} s")
        rows = Notes(file).rows()
    kept = results.read("spike")
    rows = [row for row in (kept["rows"] if kept else []) if row["part"] not in chosen] + rows
    console.print(f"written to {results.write('spike', summarize(rows), rows)}")
    console.print(summarize(rows))


if __name__ == "__main__":
    typer.run(main)
