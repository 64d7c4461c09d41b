"""Decode: one new token of each request (or a few, to be verified) attends to its context, read straight from its
segment and divided along it. Safe in a CUDA graph: grid and buffers are fixed, lengths are read on the device.

    decoder = Decoder(max_requests=256, q_heads=32, kv_heads=8, head_dim=128, device="cuda")
    decoder.plan(contexts)                                once a step: one small kernel
    decoder(q, k, v, first, scale=scale)                  once a layer
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.attend import MERGE_FIELDS, WORK_FIELDS
from sglang_vtensor.kernels.launch import check, check_first, launch, workspace
from sglang_vtensor.kernels.plan import Config


@triton.jit(do_not_specialize=["requests", "new", "window", "room"])
def _plan(
    contexts_ptr,
    work_ptr,
    merge_ptr,
    count_ptr,
    requests,
    new,
    window,
    room,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALLEST: tl.constexpr,
    REQUESTS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Every program knows all lengths, and writes the work of one request: the parts and the merge."""
    request = tl.program_id(0)
    lanes = tl.arange(0, REQUESTS)
    context = tl.load(contexts_ptr + lanes, mask=lanes < requests, other=0).to(tl.int32)
    low = tl.zeros_like(context)
    if WINDOW:
        low = tl.maximum(context - new - window, 0)
    tiles = (context - low + BLOCK_N - 1) // BLOCK_N
    # Parts of one length fill the GPU about once. There is room for `room` parts beyond one a request.
    longest = tl.maximum(tl.cdiv(tl.sum(tiles) * KV_HEADS, SLOTS), SMALLEST)
    longest = tl.maximum(longest, tl.cdiv(tl.sum(tiles), tl.maximum(room, 1)))
    parts = (tiles + longest - 1) // longest
    mine = lanes == request
    before = tl.sum(tl.where(lanes < request, parts, 0))
    my_parts = tl.sum(tl.where(mine, parts, 0))
    my_tiles = tl.sum(tl.where(mine, tiles, 0))
    my_low = tl.sum(tl.where(mine, low, 0))
    my_context = tl.sum(tl.where(mine, context, 0))
    for i in range(my_parts):
        item = work_ptr + (before + i) * 8
        tl.store(item, request * new)
        tl.store(item + 1, new)
        tl.store(item + 2, my_context)
        tl.store(item + 3, request)
        tl.store(item + 4, 0)
        tl.store(item + 5, my_low + my_tiles * i // my_parts * BLOCK_N)
        tl.store(item + 6, tl.minimum(my_low + my_tiles * (i + 1) // my_parts * BLOCK_N, my_context))
        tl.store(item + 7, tl.where(my_parts > 1, before + i, -1))
    merge = merge_ptr + request * 5
    tl.store(merge, request * new)
    tl.store(merge + 1, new)
    tl.store(merge + 2, 0)
    tl.store(merge + 3, before)
    tl.store(merge + 4, my_parts)
    if request == requests - 1:
        # What the last plan left behind this one is no work.
        for i in range(before + my_parts, tl.load(count_ptr)):
            tl.store(work_ptr + i * 8 + 5, 0)
            tl.store(work_ptr + i * 8 + 6, 0)
        tl.store(count_ptr, before + my_parts)


class Decoder:
    """Decode attention for up to `max_requests` requests of `new` tokens each, on static buffers.

    `q_heads`, `kv_heads`, `head_dim` are those of one rank; `window` as in `plan_prefill`. One decoder serves all
    layers of a geometry; two streams must not share one.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        new: int = 1,
        window: int = -1,
        config: Config | None = None,
    ) -> None:
        if max_requests < 1 or new < 1 or q_heads % kv_heads:
            raise ValueError(
                f"{max_requests} requests of {new} tokens, {q_heads} query heads over {kv_heads} KV heads: at least 1, "
                "at least 1, and a multiple wanted"
            )
        rows = new * (q_heads // kv_heads)
        self.max_requests, self.new, self.window = max_requests, new, window
        self.kv_heads = kv_heads
        self.config = config or configs.decode(rows, head_dim, configs.capability(device))
        if rows > self.config.block_m:
            raise ValueError(
                f"{new} tokens of {q_heads // kv_heads} heads are {rows} rows, more than a tile of "
                f"{self.config.block_m}: use prefix_prefill"
            )
        self.slots = configs.multiprocessors(device) * self.config.occupancy
        self.room = max(1, -(-self.slots // kv_heads))
        size = max_requests + self.room
        self.work = torch.zeros((size, WORK_FIELDS), dtype=torch.int32, device=device)
        self.merges = torch.zeros((max_requests, MERGE_FIELDS), dtype=torch.int32, device=device)
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        self.partial = workspace(size, kv_heads, self.config, head_dim, self.work.device)
        self.requests = 0

    def plan(self, contexts: torch.Tensor) -> None:
        """Divide a step's work. `contexts`: `(requests,)` int32 or int64 on the device, tokens with the new ones; 0 is
        no work, and the row of that request is not written. In a graph, this belongs to what is captured."""
        requests = contexts.shape[0]
        if contexts.ndim != 1 or not 0 <= requests <= self.max_requests or contexts.dtype.is_floating_point:
            raise ValueError(
                f"contexts are {tuple(contexts.shape)} {contexts.dtype}: up to ({self.max_requests},) integers wanted"
            )
        self.requests = requests
        if not requests:
            return
        _plan[(requests,)](
            contexts,
            self.work,
            self.merges,
            self.count,
            requests,
            self.new,
            self.window,
            self.room,
            KV_HEADS=self.kv_heads,
            SLOTS=self.slots,
            BLOCK_N=self.config.block_n,
            SMALLEST=4,
            REQUESTS=triton.next_power_of_2(self.max_requests),
            WINDOW=self.window >= 0,
            num_warps=4,
        )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the planned step. Shapes and errors as of `prefix_prefill`; `q` has `requests * new` rows."""
        out = torch.empty_like(q) if out is None else out
        check(q, k, v, out, lse, sinks, self.requests * self.new)
        check_first(first, self.requests, q)
        if not self.requests:
            return out
        launch(
            q,
            k,
            v,
            first,
            out,
            lse,
            sinks,
            work=self.work[: self.requests + self.room],
            merges=self.merges[: self.requests],
            partial=self.partial,
            config=self.config,
            scale=scale,
            soft_cap=soft_cap,
            window=self.window,
        )
        return out
