"""`python -m benchmarks.kernels prefill|shared-decode`: attention kernels beside each other, on a Hopper GPU.

Every contestant has its own layout of the same sizes: ours is token-major over all layers, as in the server, and each
context one run, or two; the others (`benchmarks.peers`) have a pool a layer, as SGLang allocates it, and pages in
random order. A CUDA graph calls a contestant once on each of several layers, together more than the L2 cache. Graphs
are replayed in rounds, in which they take turns at going first; the time of a call is the median of the rounds, and
rows have the least and the most too. The floor is the larger of operations over the matmul rate and bytes over the copy
bandwidth, both measured in the same run.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import grouping, results
from benchmarks.peers import (
    Call,
    fa3,
    fa3_on,
    flashinfer_cascade,
    flashinfer_decode,
    flashinfer_paged,
    flashinfer_ragged,
    sglang_triton,
)
from benchmarks.rounds import rotated, spread
from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.sharing import Sharing

console = Console(width=200)
FLASHINFER = find_spec("flashinfer") is not None
app = typer.Typer(add_completion=False)

PAGE = 128
#: Query heads, KV heads, head dimension, layers.
GEOMETRIES = {
    "Llama-3-8B": (32, 8, 128, 32),
    "Yi-6B": (32, 4, 128, 32),
    "Yi-34B": (56, 8, 128, 60),
    "Qwen3-32B": (64, 8, 128, 64),
    "Llama-2-7B": (32, 32, 128, 32),
    "Llama-3.2-1B": (32, 8, 64, 16),
}
#: What people serve in 2026, and the shard of one of 4 and of 8 ranks.
SERVED = {
    "Qwen3-8B": (32, 8, 128, 36),
    "Qwen3-30B-A3B": (32, 4, 128, 48),
    "GLM-4.5-Air": (96, 8, 128, 46),
    "MiniMax-M2": (48, 8, 128, 62),
    "Llama-3-70B, 1 of 4": (16, 2, 128, 80),
    "Llama-3-70B, 1 of 8": (8, 1, 128, 80),
}
#: Heads of other sizes than 128: what is chosen for them is measured too.
HEADS = {
    "gpt-oss-20b": (64, 8, 64, 24),
    "Phi-3-mini": (32, 32, 96, 32),
    "Nemotron-4-340B, 1 of 8": (12, 1, 192, 96),
    "Gemma-2-9B": (16, 8, 256, 42),
}
#: Requests, prefix, new tokens; ragged mixes are lists of (prefix, new).
PREFILL: list[list[tuple[int, int]]] = [
    [(0, 2048)],
    [(2048, 512)],
    [(8192, 16)],
    [(32768, 128)],
    [(32768, 2048)],
    [(65536, 512)],
    [(2048, 128)] * 8,
    [(8192, 512)] * 4,
    [(0, 512)] * 16,
    [(4096, 64)] * 16,
    [(1024, 16)] * 32,
    [(32768, 16), (0, 2048), (2048, 300), (700, 700), (12000, 33)],
]
#: What the plots are drawn from, for one geometry: (prefix, new) over the prefix, and over the new tokens.
SWEEPS: dict[str, list[tuple[int, int]]] = {
    "prefix": [(prefix, 512) for prefix in (0, 1024, 2048, 4096, 8192, 16384, 32768, 65536)],
    "new": [(8192, new) for new in (16, 32, 64, 128, 256, 512, 1024, 2048)],
}
SWEPT, SWEEP_REQUESTS = "Llama-3-8B", 4
#: Contexts of a decode batch.
DECODE: list[list[int]] = [
    [512],
    [32768],
    [131072],
    [4096] * 8,
    [1024] * 32,
    [4096] * 64,
    [512] * 256,
    [2048] * 128,
    [32768, 20000, 9000, 4000, 4000, 1000, 1000, 600] + [512] * 24,
]
#: Bytes that one contestant's layers may take, and that a rotation must exceed.
POOL_BYTES, ROTATION_BYTES = 12 << 30, 160 << 20
TOKENS_IN_ALL = 300_000


@dataclass
class Case:
    """A batch of one geometry. Random K and V, of `kv_dtype`; `first` is where each context begins in our pool, at a
    page's bound."""

    geometry: str
    shape: list[tuple[int, int]]
    kv_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.q_heads, self.kv_heads, self.dim, layers = (GEOMETRIES | SERVED | HEADS)[self.geometry]
        self.new = [new for _, new in self.shape]
        self.contexts = [prefix + new for prefix, new in self.shape]
        self.scale = self.dim**-0.5
        self.tokens = sum(self.contexts)
        token = 2 * self.kv_heads * self.dim * self.kv_dtype.itemsize
        self.layers = max(2, min(layers, POOL_BYTES // (self.tokens * token)))
        self.rotation = min(self.layers, max(2, -(-ROTATION_BYTES // (self.tokens * token))))
        self.q = torch.randn(sum(self.new), self.q_heads, self.dim, device="cuda", dtype=torch.bfloat16)
        starts = [0]
        for context in self.contexts:
            starts.append(starts[-1] + -(-context // PAGE) * PAGE)
        self.pool = random_pool((starts[-1], self.layers, 2, self.kv_heads, self.dim), self.kv_dtype)
        self.first = torch.tensor(starts[:-1], dtype=torch.int64, device="cuda")
        self.context_lens = torch.tensor(self.contexts, dtype=torch.int32, device="cuda")
        self.starts = torch.tensor([0, *torch.tensor(self.new).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        self._paged: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def ours(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool[:, layer, 0], self.pool[:, layer, 1]

    def paged(self, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K and V `(rotation, pages, page, kv_heads, dim)`, and the page table: the same tokens in random pages."""
        if page not in self._paged:
            self._paged.clear()
            counts = [-(-context // page) for context in self.contexts]
            order = torch.randperm(sum(counts), device="cuda", dtype=torch.int32)
            table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cuda")
            at = 0
            shape = (self.rotation, sum(counts) * page, self.kv_heads, self.dim)
            k, v = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16).to(self.kv_dtype) for _ in range(2))
            for i, (count, context) in enumerate(zip(counts, self.contexts, strict=True)):
                table[i, :count] = order[at : at + count]
                slots = (table[i, :count, None].long() * page + torch.arange(page, device="cuda")).view(-1)[:context]
                first = int(self.first[i])
                for mine, part in ((k, 0), (v, 1)):
                    tokens = self.pool[first : first + context, : self.rotation, part].transpose(0, 1)
                    as_bytes(mine)[:, slots] = as_bytes(tokens)
                at += count
            paged = (self.rotation, sum(counts), page, self.kv_heads, self.dim)
            self._paged[page] = (k.view(paged), v.view(paged), table)
        return self._paged[page]

    def pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K and V `(layers, pages, PAGE, kv_heads, dim)` where they lie in our pool, at a stride, and the page table:
        what the server has FlashAttention-3 read."""
        k, v = (self.pool[:, :, part].transpose(0, 1).unflatten(1, (-1, PAGE)) for part in (0, 1))
        pages = -(-max(self.contexts) // PAGE)
        table = self.first[:, None] // PAGE + torch.arange(pages, device=self.first.device)
        return k, v, table.clamp(max=k.shape[1] - 1).to(torch.int32)  # behind a context nothing is read

    def operations(self) -> float:
        """Floating-point operations of causal attention."""
        pairs = sum(new * context - new * (new - 1) / 2 for new, context in zip(self.new, self.contexts, strict=True))
        return 4.0 * pairs * self.q_heads * self.dim

    def bytes(self) -> float:
        return self.tokens * 2.0 * self.kv_heads * self.dim * self.kv_dtype.itemsize + 4.0 * self.q.numel()

    def label(self) -> str:
        if len(set(self.shape)) > 1:
            return f"ragged, {len(self.shape)} requests"
        prefix, new = self.shape[0]
        return f"{len(self.shape)} x ({prefix} + {new})"


def random_pool(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of normal numbers; the largest dimension, the first one, in parts, as they are drawn in bfloat16."""
    pool = torch.empty(shape, device="cuda", dtype=dtype)
    for part in pool.split(4096):
        part.copy_(torch.empty(part.shape, device="cuda", dtype=torch.bfloat16).normal_())
    return pool


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Of an 8-bit type, in which torch does not index; else `x`."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


Row = dict[str, Any]


def ours(case: Case, *, runs: int = 1, **options: Any) -> Call:
    """Our kernel, `layer -> out`. Each context is so many runs, of about equal length; they lie one behind the other,
    which the kernel does not know."""
    from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefix_prefill

    divided = []
    for first, context in zip(case.first.tolist(), case.contexts, strict=True):
        cuts = sorted({*(context * n // runs // PAGE * PAGE for n in range(runs)), context})
        divided.append([(first + low, high - low) for low, high in itertools.pairwise(cuts)])
    plan = plan_prefill(
        case.new,
        divided,
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.dim,
        device=case.q.device,
        page_tokens=PAGE,
        kv_dtype=case.kv_dtype,
        **options,
    )
    return lambda layer: prefix_prefill(case.q, *case.ours(layer), plan, scale=case.scale)


@dataclass
class Graph:
    """One call on each layer of the rotation. The call owns the buffers that the graph reads."""

    captured: torch.cuda.CUDAGraph
    call: Call


def graph(call: Call, rotation: int) -> Graph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(min(2, rotation)):
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for layer in range(rotation):
            call(layer)
    return Graph(captured, call)


def rounds(graphs: dict[str, Graph], rotation: int, replays: int = 7) -> dict[str, list[float]]:
    """Microseconds a call, of each round: a replay of each contestant, who take turns at going first. One more round
    before them does not count."""
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(replays + 1):
        for name in rotated(list(graphs), replay):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].captured.replay()
            end.record()
            end.synchronize()
            if replay:
                seen[name].append(start.elapsed_time(end) * 1000 / rotation)
    return seen


def times(graphs: dict[str, Graph], rotation: int, replays: int = 7) -> dict[str, float]:
    """Median microseconds a call."""
    return {name: statistics.median(values) for name, values in rounds(graphs, rotation, replays).items()}


def told(seen: dict[str, list[float]]) -> Row:
    """What stands in a row of each contestant's rounds: the median, by its name, the least and the most."""
    row: Row = {"rounds": min(map(len, seen.values()))}
    for name, values in seen.items():
        _, middle, least, most = spread(values)
        row |= {name: round(middle, 2), f"{name}_least": round(least, 2), f"{name}_most": round(most, 2)}
    return row


def rates() -> tuple[float, float]:
    """Matmul operations a second (bfloat16, 8192 cubed) and bytes a second of a copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.zeros(1 << 29, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = times({"m": graph(lambda _: torch.mm(a, b), 4)}, 4)["m"]
    copy = times({"c": graph(lambda _: torch.neg(x, out=y), 4)}, 4)["c"]
    return 2 * 8192**3 / matmul * 1e6, 2 * x.nbytes / copy * 1e6


def agree(what: str, calls: dict[str, Call]) -> None:
    """Raise `AssertionError` if the contestants do not compute the same thing as the first of them."""
    outs = {name: call(0).float() for name, call in calls.items()}
    base = next(iter(outs.values()))
    for name, out in outs.items():
        error = float((out.view_as(base) - base).norm() / base.norm())
        assert error < 2e-2, f"{what}: {name} differs by {error:.3g}"


def measure(geometry: str, shapes: list[list[tuple[int, int]]], rate: tuple[float, float]) -> list[Row]:
    """Every contestant on every shape of a geometry: a row each. `rate` is of `rates`."""
    matmul, copy = rate
    rows = []
    for shape in shapes:
        if sum(a + b for a, b in shape) > TOKENS_IN_ALL:
            continue
        case = Case(geometry, shape)
        floor = max(case.operations() / matmul, case.bytes() / copy) * 1e6
        row: Row = {"geometry": geometry, "shape": case.label(), "floor_us": round(floor, 1)}
        first: dict[str, Call] = {"ours": ours(case), "ours_two_runs": ours(case, runs=2)}
        first["fa3_in_ours"] = fa3_on(case, *case.pages())
        what = f"{geometry} {case.label()}"
        agree(what, first)
        graphs = {name: graph(call, case.rotation) for name, call in first.items()}
        for page in (1, 64, 128):
            paged = {f"fa3_page{page}": fa3(case, page)}
            if page in (1, 64):
                paged[f"triton_page{page}"] = sglang_triton(case, False, page)
            if page == 1 and FLASHINFER:
                paged |= {"flashinfer_paged": flashinfer_paged(case), "flashinfer_ragged": flashinfer_ragged(case)}
            agree(what, {"ours": first["ours"]} | paged)
            graphs |= {name: graph(call, case.rotation) for name, call in paged.items()}
        row |= told(rounds(graphs, case.rotation))
        row["triton"] = min(row["triton_page1"], row["triton_page64"])
        ours_first = configs.ours_before_fa3(case.new, case.contexts, case.q_heads, case.kv_heads, case.dim, "cuda")
        row["auto"] = row["ours"] if ours_first else row["fa3_in_ours"]
        row["tflops"] = round(case.operations() / row["ours"] / 1e6, 1)
        row["operations"] = case.operations()
        row["gbytes"] = round(case.bytes() / row["ours"] / 1e3, 1)
        rows.append(row)
        console.print(row)
        del graphs, first, paged, case
        torch.cuda.empty_cache()
    return rows


def over(rows: list[dict[str, Any]], theirs: str, mine: str = "ours") -> list[float]:
    return [row[theirs] / row[mine] for row in rows]


def against(rows: list[dict[str, Any]], theirs: str) -> float:
    """Geometric mean where they ran; 0.0 where they ran nowhere."""
    return statistics.geometric_mean(over(ran, theirs)) if (ran := [row for row in rows if theirs in row]) else 0.0


Geometries = Annotated[str, typer.Option(help="With semicolons.")]
ALL, ALL_HEADS = ";".join(GEOMETRIES), ";".join([*GEOMETRIES, *HEADS])


@app.command()
def warm(geometries: Geometries = ALL) -> None:
    """Compile what the other two commands run. Several of these may run at once, one a geometry."""
    from sglang_vtensor.kernels.compiling import Compiling, launches
    from sglang_vtensor.kernels.prefix_prefill import prefill_calls

    for geometry in geometries.split(";"):
        case = Case(geometry, [(7000, 256), (1000, 200)])
        keys, values = case.ours(0)
        shapes = {"q_heads": case.q_heads, "max_tokens": 7256, "page_tokens": PAGE}
        calls = prefill_calls(keys, values, q_dtype=case.q.dtype, **shapes)
        Compiling(geometry, {key: launches(some) for key, some in calls.items()}, device=keys.device).wait()
        for page in (1, 64):
            sglang_triton(case, False, page)(0)
        if FLASHINFER:
            flashinfer_ragged(case)(0)
        case = Case(geometry, [(7000, 1), (1000, 1)])
        sglang_triton(case, True, 1)(0)
        if FLASHINFER:
            flashinfer_decode(case)(0)
            shared = SharedCase("two_level", geometry)
            console.print(cascades(shared, fa3(shared, 1))[1])
        torch.cuda.synchronize()


@app.command()
def prefill(geometries: Geometries = ALL) -> None:
    """New tokens over a prefix. Writes prefill.json, after each geometry."""
    rate, rows, swept = rates(), [], []
    for geometry in geometries.split(";"):
        rows += measure(geometry, PREFILL, rate)
        if geometry == SWEPT:
            for sweep, shapes in SWEEPS.items():
                several = measure(geometry, [[shape] * SWEEP_REQUESTS for shape in shapes], rate)
                for row, (prefix, new) in zip(several, shapes, strict=True):
                    swept.append(row | {"sweep": sweep, "x": prefix if sweep == "prefix" else new})
        triton = over(rows, "triton")
        summary = {
            "vs_triton_geomean": statistics.geometric_mean(triton),
            "vs_triton_max": max(triton),
            "vs_triton_min": min(triton),
            "best_vs_fa3_page1_geomean": statistics.geometric_mean(over(rows, "fa3_page1", "auto")),
            "best_vs_fa3_page128_geomean": statistics.geometric_mean(over(rows, "fa3_page128", "auto")),
            "best_vs_fa3_page128_min": min(over(rows, "fa3_page128", "auto")),
            "two_runs_vs_one_geomean": statistics.geometric_mean(over(rows, "ours", "ours_two_runs")),
            "own_vs_fa3_page1_geomean": statistics.geometric_mean(over(rows, "fa3_page1")),
            "own_vs_fa3_page128_geomean": statistics.geometric_mean(over(rows, "fa3_page128")),
            "own_vs_flashinfer_geomean": against(rows, "flashinfer_paged"),
            "tflops_32k_2k": max(
                (row["tflops"] * row["ours"] / row["auto"] for row in rows if row["shape"] == "1 x (32768 + 2048)"),
                default=0.0,
            ),
            "matmul_tflops": rate[0] / 1e12,
            "copy_gbytes": rate[1] / 1e9,
        }
        results.write("prefill", summary, rows + swept)
    console.print(summary)


#: Layers that a graph of these cases goes through at least, as a model has many: starting it belongs to no call.
SHARED_LAYERS = 8
#: Batches that share: requests, tokens of all, requests a group, tokens of a group, tokens of a request.
SHARED = {
    "shared_8k_x64": (64, 8192, 64, 0, 512),
    "groups_16k_x256": (256, 0, 32, 16384, 256),
    "two_level": (64, 2048, 8, 4096, 512),
    "no_sharing": (64, 0, 1, 0, 4096),
}


#: Of batches that share nothing there are a few more, small ones.
PLAIN = [*DECODE, [300] * 8, [300] * 32, [1024] * 16]


class Paged:
    """One new token of each of some requests, over pages of 128 tokens anywhere in our pool, with random K and V."""

    def __init__(
        self,
        geometry: str,
        contexts: list[int],
        slots: torch.Tensor,
        tokens: int,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`slots`: `(requests, longest context)`, int32, where each token would be if pages were in order; there are
        `tokens` of them, whole pages."""
        self.q_heads, self.kv_heads, self.dim, _ = (GEOMETRIES | SERVED | HEADS)[geometry]
        self.requests, self.context, self.tokens = len(contexts), max(contexts), tokens
        self.kv_dtype = kv_dtype
        self.token_bytes = 2 * self.kv_heads * self.dim * kv_dtype.itemsize
        self.rotation = max(SHARED_LAYERS, -(-ROTATION_BYTES // (tokens * self.token_bytes)))
        shape = (tokens, self.rotation, 2, self.kv_heads, self.dim)
        self.pool = random_pool(shape, kv_dtype)
        self.q = torch.randn(self.requests, self.q_heads, self.dim, device="cuda", dtype=torch.bfloat16)
        self.scale = self.dim**-0.5
        self.new = [1] * self.requests
        self.context_lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(self.requests + 1, dtype=torch.int32, device="cuda")
        self.each = torch.arange(self.requests, device="cuda")
        order = torch.randperm(tokens // PAGE, device="cuda", dtype=torch.int32)
        self.table = order[slots // PAGE] * PAGE + slots % PAGE
        self.sharing = Sharing(slots=self.requests, requests=256, page_tokens=PAGE)

    def decoder(self, config: Config | None = None) -> SharedDecoder:
        """Ours, with the step planned."""
        decoder = SharedDecoder(
            max_requests=256,
            slots=self.requests,
            page_tokens=PAGE,
            max_tokens=self.context,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            device="cuda",
            kv_dtype=self.kv_dtype,
            config=config,
        )
        decoder.update(self.sharing.tables)
        decoder.find_pages(self.table, self.each, self.context_lens)
        decoder.plan(self.each, self.context_lens)
        return decoder

    def ours(self, decoder: SharedDecoder) -> Call:
        def call(layer: int) -> torch.Tensor:
            return decoder(self.q, self.pool[:, layer, 0], self.pool[:, layer, 1], scale=self.scale)

        return call

    @cached_property
    def pools(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(rotation, tokens, kv_heads, dim)` with a pool for each layer."""
        k, v, _ = self.slots()
        return k.squeeze(2).contiguous(), v.squeeze(2).contiguous()

    def paged(self, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `Case`: the pages are in random order already."""
        k, v = (x.unflatten(1, (-1, page)) for x in self.pools)
        return k, v, self.table[:, ::page] // page

    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same where it lies in our pool, at a stride: what SGLang's backend decodes there."""
        k, v = (self.pool[:, :, part].transpose(0, 1).unsqueeze(2) for part in (0, 1))
        return k, v, self.table


def levels(requests: int, of_all: int, group: int, of_group: int, own: int) -> list[tuple[int, int, int]]:
    """Of one of `SHARED`: how many requests share, and from which token to which of their contexts. What nobody has is
    left out."""
    shared = of_all + of_group
    each = [(requests, 0, of_all), (group, of_all, shared), (1, shared, shared + own)]
    return [(count, first, end) for count, first, end in each if first < end]


class SharedCase(Paged):
    """One of `SHARED`, of one geometry: who shares what."""

    def __init__(self, name: str, geometry: str, kv_dtype: torch.dtype = torch.bfloat16) -> None:
        requests, of_all, group, of_group, own = SHARED[name]
        shared, groups = of_all + of_group, requests // group
        context = shared + own
        # What all share, what each group shares, and what each request has: one behind the other, each token once.
        each = torch.arange(requests, device="cuda")
        slots = torch.empty(requests, context, dtype=torch.int32, device="cuda")
        slots[:, :of_all] = torch.arange(of_all, device="cuda")
        slots[:, of_all:shared] = (each // group * of_group + of_all)[:, None] + torch.arange(of_group, device="cuda")
        private = each * own + of_all + groups * of_group
        slots[:, shared:] = private[:, None] + torch.arange(own, device="cuda")
        super().__init__(geometry, [context] * requests, slots, of_all + groups * of_group + requests * own, kv_dtype)
        self.levels = levels(requests, of_all, group, of_group, own)
        for request in range(requests):
            document = 10_000 * (1 + request // group)
            path = [*range(of_all // PAGE), *range(document, document + of_group // PAGE)]
            self.sharing.join(request, path)


class PlainCase(Paged):
    """Contexts of which no two share anything."""

    def __init__(self, contexts: list[int], geometry: str, kv_dtype: torch.dtype = torch.bfloat16) -> None:
        starts = [0]
        for context in contexts:
            starts.append(starts[-1] + -(-context // PAGE) * PAGE)
        slots = torch.zeros(len(contexts), max(contexts), dtype=torch.int32, device="cuda")
        for request, (start, context) in enumerate(zip(starts[:-1], contexts, strict=True)):
            slots[request, :context] = torch.arange(start, start + context, device="cuda")
        super().__init__(geometry, contexts, slots, starts[-1], kv_dtype)
        for request in range(self.requests):
            self.sharing.join(request, [])


def summarize_plain(rows: list[Row]) -> dict[str, float]:
    """Over FlashAttention-3's times, where our kernel is taken, and where it is left."""
    summary: dict[str, float] = {}
    for name, taken in (("taken", True), ("left", False)):
        for other in ("fa3_slots", "fa3_page1"):
            ratios = over([row for row in rows if row["taken"] is taken], other)
            if ratios:
                summary[f"{name}_vs_{other}_geomean"] = statistics.geometric_mean(ratios)
                summary[f"{name}_vs_{other}_min"] = min(ratios)
                summary[f"{name}_vs_{other}_max"] = max(ratios)
    return summary


def measure_plain(contexts: list[int], geometry: str, copy: float) -> Row:
    """A batch that shares nothing: a row. `copy` is the rate of a copy, in bytes a second."""
    case = PlainCase(contexts, geometry)
    calls = {"fa3_page1": fa3(case, 1), "fa3_slots": fa3_on(case, *case.slots()), "ours": case.ours(case.decoder())}
    agree(f"{geometry}, {len(contexts)} requests", calls)
    seen = rounds({name: graph(call, case.rotation) for name, call in calls.items()}, case.rotation)
    read = sum(contexts) * case.token_bytes
    shape = f"{len(contexts)} x {contexts[0]}" if len(set(contexts)) == 1 else f"ragged, {len(contexts)} requests"
    row: Row = {"geometry": geometry, "shape": shape, "bytes": read, "floor_us": round(read / copy * 1e6, 1)}
    numbers = len(contexts), sum(contexts), 0, 0, case.q_heads // case.kv_heads, case.token_bytes
    row["taken"] = configs.shared_decode_pays(*numbers, configs.capability("cuda"), head_dim=case.dim)
    return row | told(seen)


#: FlashInfer's: the size of their pages, and who computes a level.
CASCADES = {
    "cascade_page1": (1, "auto"),
    "cascade_page128": (128, "auto"),
    "cascade_fa2_page1": (1, "fa2"),
    "cascade_fa2_page128": (128, "fa2"),
}


def cascades(case: SharedCase, base: Call) -> tuple[dict[str, Graph], dict[str, str]]:
    """Those that run and say what `base` does, and why the others do not: FlashInfer compiles each at its first call,
    and no failure of that ends what the other contestants do."""
    graphs, failed = {}, {}
    for name, (page, backend) in CASCADES.items():
        try:
            call = flashinfer_cascade(case, page, backend)
            agree("a cascade", {"the base": base, name: call})
            graphs[name] = graph(call, case.rotation)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return graphs, failed


def measure_shared(name: str, geometry: str, copy: float) -> Row:
    """One of `SHARED`: a row, with ours beside FlashAttention-3 over pages of 1, 64 and 128 tokens, which reads what is
    shared once for each request, and beside FlashInfer's cascades, which read it once, as ours does. `copy` is the rate
    of a copy, in bytes a second. `<other>_ratio` is the other's time over ours, round by round; `failed` has the
    cascades that did not run, and why."""
    case = SharedCase(name, geometry)
    decoder = case.decoder()

    def plan(_: int) -> torch.Tensor:
        decoder.find_pages(case.table, case.each, case.context_lens)
        decoder.plan(case.each, case.context_lens)
        return case.q

    calls: dict[str, Call] = {f"fa3_page{page}": fa3(case, page) for page in (1, 64, 128)}
    calls["ours"] = case.ours(decoder)
    agree(name, calls)
    graphs, failed = cascades(case, calls["fa3_page1"])
    graphs |= {contestant: graph(call, case.rotation) for contestant, call in calls.items()}
    seen = rounds(graphs, case.rotation)
    planning = times({"plan": graph(plan, case.rotation)}, case.rotation)["plan"]
    row: Row = {"case": name, "requests": case.requests, "context": case.context, "plan_us": round(planning, 2)}
    row["floor_us"] = round(case.tokens * case.token_bytes / copy * 1e6, 1)
    return row | told(seen) | against_each(seen) | ({"failed": failed} if failed else {})


def against_each(seen: dict[str, list[float]]) -> Row:
    """The strongest contestant beside ours, by its median, and each other's time over ours: median, least and most of
    the rounds."""
    others = [name for name in seen if name != "ours"]
    row: Row = {"strongest": min(others, key=lambda name: statistics.median(seen[name]))}
    for name in others:
        ratio = spread([theirs / mine for theirs, mine in zip(seen[name], seen["ours"], strict=True)])
        row |= {f"{name}_ratio": round(ratio.median, 4), f"{name}_ratio_least": round(ratio.least, 4)}
        row[f"{name}_ratio_most"] = round(ratio.most, 4)
    return row


@app.command()
def shared_decode(geometry: Annotated[str, typer.Option()] = "Llama-3-8B") -> None:
    """One new token of each of many requests that share runs of tokens. Writes shared_decode.json, after each case."""
    rate, rows = rates(), []
    grouped = {"grouping_us_256": grouping.step_us(256)}
    for name in SHARED:
        rows.append(measure_shared(name, geometry, rate[1]))
        console.print(rows[-1])
        results.write("shared_decode", summarize_shared(rows) | grouped, rows)
        torch.cuda.empty_cache()
    console.print(summarize_shared(rows) | grouped)


def summarize_shared(rows: list[Row]) -> dict[str, float]:
    """Over ours, of each case: FlashAttention-3's time over pages of 1, the strongest contestant's, and that of the
    strongest cascade, if one ran."""
    summary = {row["case"]: row["fa3_page1_ratio"] for row in rows}
    summary |= {f"{row['case']}_vs_best": row[f"{row['strongest']}_ratio"] for row in rows}
    for row in rows:
        if ran := [name for name in CASCADES if name in row]:
            summary[f"{row['case']}_vs_cascade"] = row[f"{min(ran, key=row.__getitem__)}_ratio"]
    return summary


@app.command()
def plain_decode(geometries: Geometries = ALL_HEADS) -> None:
    """One new token each, nothing shared: where the kernel of shared decode is taken nevertheless. Writes
    plain_decode.json."""
    rate, rows = rates(), []
    for geometry in geometries.split(";"):
        for contexts in PLAIN:
            if sum(contexts) > TOKENS_IN_ALL:
                continue
            rows.append(measure_plain(contexts, geometry, rate[1]))
            console.print(rows[-1])
            torch.cuda.empty_cache()
    summary = summarize_plain(rows)
    results.write("plain_decode", summary, rows)
    console.print(summary)


if __name__ == "__main__":
    app()
