"""Shared decode: one new token of each request attends to its context, and a run of tokens that several requests share
is read once for all of them.

    decoder = SharedDecoder(max_requests=256, q_heads=32, kv_heads=8, head_dim=128, device="cuda")
    decoder.plan([Shared([0, 1, 2], 0, 2048), Shared([0, 1], 2048, 4096)], [5000, 4100, 2100])     when requests change
    decoder(q, k, v, first, contexts, scale=scale)                                                 once a layer

A shared run is one tile of queries, those of all its requests with all their grouped heads, against its keys; what is a
request's own is a tile of its own heads. Long runs are divided along their keys. Every piece leaves a partial result
with its log-sum-exp, and a merge puts together the pieces on the path of each request.

What requests share is a forest: two runs have all requests of one in the other, or none. In the order of a walk through
it the requests of a run stand beside each other (`order`), so a tile is a start and a count.

Safe in a CUDA graph: grids and buffers are fixed, lengths are read on the device, so the same plan serves many steps
while contexts grow; a new one is one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.attend import _dot, _scores
from sglang_vtensor.kernels.launch import check, workspace
from sglang_vtensor.kernels.plan import PART_COST, SMALLEST_PART, Config

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
#: A work item: where its requests begin in `order`, how many they are, the request whose context is read, which
#: BLOCK_M rows, the first key and one past the last (or past the context's end), and where the result goes.
ITEM_FIELDS = 7
#: A piece of a request: the part that its row 0 is in, and its row counted from there.
PIECE_FIELDS = 2
#: Pieces that a merge loads at a time.
PIECES = 8


@triton.jit
def _pieces(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    part_out_ptr,
    part_lse_ptr,
    order_ptr,
    items_ptr,
    lists_ptr,
    schedule_ptr,
    first_ptr,
    contexts_ptr,
    scale,
    cap,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program's list of items: one tile of rows against one run of keys, all of which every row sees."""
    for j in range(tl.load(lists_ptr + tl.program_id(0)), tl.load(lists_ptr + tl.program_id(0) + 1)):
        at = tl.load(schedule_ptr + j)
        item = items_ptr + (at // KV_HEADS) * 7
        head = at % KV_HEADS
        start = tl.load(item)
        count = tl.load(item + 1)
        request = tl.load(item + 2)
        tile = tl.load(item + 3)
        low = tl.load(item + 4)
        high = tl.minimum(tl.load(item + 5), tl.load(contexts_ptr + request).to(tl.int32))
        part = tl.load(item + 6)
        first = tl.load(first_ptr + request)

        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = rows // GROUP < count
        member = tl.load(order_ptr + start + rows // GROUP, mask=valid, other=0).to(tl.int64)
        dims = tl.arange(0, DIM_PADDED)
        q_rows = q_ptr + member * stride_q_token + (head * GROUP + rows % GROUP) * stride_q_head
        q_mask = valid[:, None]
        if DIM != DIM_PADDED:
            q_mask = q_mask & (dims < DIM)[None, :]
        q = tl.load(q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)

        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
        k_head = k_ptr + first * stride_k_token + head * stride_k_head
        v_head = v_ptr + first * stride_v_token + head * stride_v_head
        whole = low + tl.maximum(high - low, 0) // BLOCK_N * BLOCK_N
        for n in range(low, whole, BLOCK_N):
            if TMA:
                at_tile = (first + n).to(tl.int32)
                k = k_tiles.load([at_tile, head, 0]).reshape(BLOCK_N, DIM_PADDED)
            else:
                at_key = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
                k_at = k_head + at_key[:, None] * stride_k_token + dims[None, :]
                k = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(k_at)
            scores = _scores(q, k, scale, cap, CAP, WIDE)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
            decay = tl.exp2(highest - new_highest)
            total = total * decay + tl.sum(weights, 1)
            acc = acc * decay[:, None]
            highest = new_highest
            if TMA:
                v = v_tiles.load([at_tile, head, 0]).reshape(BLOCK_N, DIM_PADDED)
            else:
                v_at = v_head + at_key[:, None] * stride_v_token + dims[None, :]
                v = tl.load(v_at, mask=(dims < DIM)[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(v_at)
            acc = _dot(weights.to(v.dtype), v, acc, WIDE)
        # What lies behind the run is neither loaded nor mapped.
        for n in tl.range(whole, high, BLOCK_N, num_stages=1):
            keys = n + tl.arange(0, BLOCK_N)
            mask = (keys < high)[:, None]
            if DIM != DIM_PADDED:
                mask = mask & (dims < DIM)[None, :]
            at_last = keys.to(tl.int64)
            k = tl.load(k_head + at_last[:, None] * stride_k_token + dims[None, :], mask=mask, other=0.0)
            v = tl.load(v_head + at_last[:, None] * stride_v_token + dims[None, :], mask=mask, other=0.0)
            scores = tl.where((keys < high)[None, :], _scores(q, k, scale, cap, CAP, WIDE), float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
            decay = tl.exp2(highest - new_highest)
            total = total * decay + tl.sum(weights, 1)
            acc = _dot(weights.to(v.dtype), v, acc * decay[:, None], WIDE)
            highest = new_highest

        at_row = (part.to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(part_out_ptr + at_row[:, None] * DIM_PADDED + dims[None, :], out, mask=q_mask)
        tl.store(part_lse_ptr + at_row, highest + tl.log2(total), mask=valid)


@triton.jit
def _together(
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    sink_ptr,
    starts_ptr,
    pieces_ptr,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PIECES: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):
    """The pieces of one request, for the query heads of one KV head."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    if begin >= end:
        return
    in_group = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    q_head = head * GROUP + in_group
    valid = in_group < GROUP
    highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    if SINKS:
        highest = tl.load(sink_ptr + q_head, mask=valid, other=float("-inf")).to(tl.float32) * _LOG2E
        total += 1.0
    several = tl.arange(0, PIECES)
    for i in range(begin, end, PIECES):
        there = i + several < end
        part = tl.load(pieces_ptr + (i + several) * 2, mask=there, other=0)
        row = tl.load(pieces_ptr + (i + several) * 2 + 1, mask=there, other=0)[:, None] + in_group[None, :]
        # A request's heads may go on in the next tile, whose part is the next one.
        at_part = (part[:, None] + row // BLOCK_M).to(tl.int64)
        at_row = (at_part * KV_HEADS + head) * BLOCK_M + row % BLOCK_M
        mask = there[:, None] & valid[None, :]
        lse = tl.load(part_lse_ptr + at_row, mask=mask, other=float("-inf"))
        out = tl.load(
            part_out_ptr + at_row[:, :, None] * DIM_PADDED + dims[None, None, :],
            mask=mask[:, :, None] & (dims < DIM)[None, None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        decay = tl.exp2(highest - finite)
        weights = tl.exp2(lse - finite[None, :])
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * out, 0)
        highest = new_highest
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = out_ptr + request.to(tl.int64) * stride_out_token + q_head * stride_out_head
    mask = valid[:, None] & (dims < DIM)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if LSE:
        lse = (highest + tl.log2(total)) * _LN2
        tl.store(lse_ptr + request.to(tl.int64) * stride_lse_token + q_head, lse, mask=valid)


@dataclass(frozen=True)
class Shared:
    """Tokens `low` to `high` of each of `members` (request indices, at least two) are the same memory."""

    members: Sequence[int]
    low: int
    high: int


@dataclass(frozen=True)
class SharedPlan:
    """The arrays of a plan, on the host, int32. `parts` is how many partial results there are. Program `p` does
    `schedule[lists[p]:lists[p + 1]]`, each a work item times KV heads plus a head."""

    order: np.ndarray
    items: np.ndarray
    lists: np.ndarray
    schedule: np.ndarray
    starts: np.ndarray
    pieces: np.ndarray
    parts: int


def plan_shared(
    shared: Sequence[Shared], contexts: Sequence[int], *, group: int, kv_heads: int, config: Config, slots: int
) -> SharedPlan:
    """Divide a step's work over `slots` programs (at least one a KV head).

    `contexts[i]` is the length of request `i`; 0 is no request. Its shared runs must follow one another from its first
    token on. Raises `ValueError` for runs that are no forest, or leave a gap. No loop is over requests: this is done at
    every change of a batch.
    """
    lengths = np.asarray(contexts, dtype=np.int64)
    sizes = np.array([len(run.members) for run in shared], dtype=np.int64)
    run_low = np.array([run.low for run in shared], dtype=np.int64)
    run_high = np.array([run.high for run in shared], dtype=np.int64)
    # Who is in what, run by run: a membership is a request and a run.
    member = np.concatenate([np.zeros(0, np.int64), *(np.asarray(run.members, dtype=np.int64) for run in shared)])
    of_run = np.repeat(np.arange(len(shared)), sizes)
    own, order = _paths(member, of_run, run_low, run_high, lengths)
    position = np.empty_like(order)
    position[order] = np.arange(len(lengths))
    start = np.zeros(0, np.int64)
    if len(shared):
        offsets = np.cumsum(sizes) - sizes
        if sizes.min() < 2:
            raise ValueError(f"runs of {sizes.tolist()} requests: at least two wanted, what one has is its own")
        start = np.minimum.reduceat(position[member], offsets)
        apart = np.maximum.reduceat(position[member], offsets) - start + 1 != sizes
        if apart.any():
            run = shared[int(np.argmax(apart))]
            raise ValueError(
                f"requests {list(run.members)} share tokens {run.low} to {run.high}, but not what is before: the runs "
                "are to be a forest"
            )

    # A unit is a run, or what a request has for itself; it is `rows` tiles of rows by `parts` cuts of its keys.
    alone = np.flatnonzero(lengths > own)
    low, high = np.concatenate([run_low, own[alone]]), np.concatenate([run_high, lengths[alone]])
    rows = np.concatenate([-(-sizes * group // config.block_m), np.ones_like(alone)])
    first = np.concatenate([start, position[alone]])
    count = np.concatenate([sizes, np.ones_like(alone)])
    base = np.concatenate([member[np.cumsum(sizes) - sizes], alone])
    if not len(base):
        none = np.zeros((0, ITEM_FIELDS), np.int32)
        return SharedPlan(_int32(order), none, _int32([0]), none[:, 0], _int32([0] * (len(order) + 1)), none[:, :2], 0)
    costs = -(-(high - low) // config.block_n)
    teams = max(1, slots // kv_heads)
    parts = _cuts(costs, rows, teams)
    items_of = parts * rows
    unit = np.repeat(np.arange(len(base)), items_of)
    first_part = np.cumsum(items_of) - items_of
    # The tiles of one cut follow one another, as a request's heads may lie in two of them.
    cut, tile = np.divmod(np.arange(len(unit)) - first_part[unit], rows[unit])
    cut_low = low[unit] + costs[unit] * cut // parts[unit] * config.block_n
    cut_high = np.minimum(low[unit] + costs[unit] * (cut + 1) // parts[unit] * config.block_n, high[unit])
    length = cut_high - cut_low
    # What is a request's own ends where its context does, also when that has grown.
    cut_high[(unit >= len(shared)) & (cut == parts[unit] - 1)] = np.iinfo(np.int32).max
    fields = [first[unit], count[unit], base[unit], tile, cut_low, cut_high, np.arange(len(unit))]
    longest_first = np.lexsort((cut_low, base[unit], -length))
    lists, listed = _deal(len(unit), kv_heads, teams)

    # Each membership, and each request's own, is a piece for every cut.
    entry_unit = np.concatenate([of_run, len(shared) + np.arange(len(alone))])
    entry_request = np.concatenate([member, alone])
    entry_row = np.concatenate([(position[member] - start[of_run]) * group, np.zeros_like(alone)])
    entry = np.repeat(np.arange(len(entry_unit)), parts[entry_unit])
    cut = np.arange(len(entry)) - np.repeat(np.cumsum(parts[entry_unit]) - parts[entry_unit], parts[entry_unit])
    piece = np.stack([first_part[entry_unit[entry]] + cut * rows[entry_unit[entry]], entry_row[entry]], axis=1)
    ends = np.concatenate([[0], np.cumsum(np.bincount(entry_request[entry], minlength=len(lengths)))])
    return SharedPlan(
        _int32(order),
        _int32(np.stack(fields, axis=1)[longest_first]),
        _int32(lists),
        _int32(listed),
        _int32(ends),
        _int32(piece[np.argsort(entry_request[entry], kind="stable")]),
        len(unit),
    )


def _paths(
    member: np.ndarray, of_run: np.ndarray, low: np.ndarray, high: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where what is each request's own begins, and the requests in the order of a walk through the forest."""
    own = np.zeros(len(lengths), dtype=np.int64)
    if not len(member):
        return own, np.arange(len(lengths))
    by_request = np.lexsort((low[of_run], member))
    who, run = member[by_request], of_run[by_request]
    begins = np.concatenate([[True], who[1:] != who[:-1]])
    before = np.where(begins, 0, np.concatenate([[0], high[run][:-1]]))
    inside = (who >= 0) & (who < len(lengths))
    has = np.where(inside, lengths[np.where(inside, who, 0)], 0)
    wrong = ~inside | (low[run] != before) | (high[run] <= low[run]) | (high[run] > has)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"tokens {low[run[at]]} to {high[run[at]]} of request {who[at]}, of {len(lengths)}, cannot be a shared run:"
            f" it has runs up to {before[at]} and {has[at]} tokens"
        )
    own[who] = high[run]  # the last one counts
    index = np.arange(len(who))
    depth = index - np.maximum.accumulate(np.where(begins, index, 0))
    path = np.full((int(depth.max()) + 1, len(lengths)), -1, dtype=np.int64)
    path[depth, who] = run
    return own, np.lexsort(path[::-1])


def _cuts(costs: np.ndarray, rows: np.ndarray, teams: int) -> np.ndarray:
    """Into how many cuts each unit's keys are divided: parts as long as some share of what each team would do if all
    did the same, whichever share ends first."""
    even = float((costs * rows).sum()) / teams
    best, best_time = np.ones_like(costs), float("inf")
    for share in (1.0, 0.5, 0.34, 0.25):
        parts = -(-costs // max(SMALLEST_PART, int(np.ceil(even * share))))
        lengths = np.repeat(costs / parts + PART_COST, parts * rows)
        lengths[::-1].sort()
        time = float(np.bincount(_teams(len(lengths), teams), weights=lengths).max())
        if time < best_time * 0.98:
            best, best_time = parts, time
    return best


def _teams(count: int, teams: int) -> np.ndarray:
    """Which team gets each of `count` items, the longest first: forth and back."""
    rounds, at = np.divmod(np.arange(count), teams)
    return np.where(rounds % 2, teams - 1 - at, at)


def _deal(count: int, kv_heads: int, teams: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists of programs, as of `plan.schedule`: a team has one a KV head, which all do the same items."""
    team = _teams(count, teams)
    by_team = np.argsort(team, kind="stable")
    size = np.bincount(team, minlength=teams)
    sizes, starts = np.repeat(size, kv_heads), np.repeat(np.cumsum(size) - size, kv_heads)
    program = np.repeat(np.arange(teams * kv_heads), sizes)
    lists = np.concatenate([[0], np.cumsum(sizes)])
    inner = np.arange(len(program)) - lists[program]
    return lists, by_team[starts[program] + inner] * kv_heads + program % kv_heads


def _int32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


class SharedDecoder:
    """Decode over what requests share, for up to `max_requests` requests of one token each, on static buffers.

    A plan has up to `max_items` work items and `max_pieces` pieces. One decoder serves all layers of a
    geometry; two streams must not share one.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        config: Config | None = None,
    ) -> None:
        if max_requests < 1 or q_heads % kv_heads:
            raise ValueError(
                f"{max_requests} requests, {q_heads} query heads over {kv_heads} KV heads: at least 1, and a multiple, "
                "wanted"
            )
        self.max_requests, self.kv_heads, self.group = max_requests, kv_heads, q_heads // kv_heads
        self.config = config or configs.shared_decode(head_dim, configs.capability(device))
        self.slots = max(kv_heads, configs.multiprocessors(device) * self.config.occupancy)
        # A plan divides into a few times what runs at once, beside one item a request and run.
        self.max_items = 4 * max_requests + 4 * self.slots // kv_heads
        self.max_pieces = 4 * self.max_items
        arrays = {
            "order": max_requests,
            "items": self.max_items * ITEM_FIELDS,
            "lists": self.slots + 1,
            "schedule": self.max_items * kv_heads,
            "starts": max_requests + 1,
            "pieces": self.max_pieces * PIECE_FIELDS,
        }
        self.buffer = torch.zeros(sum(arrays.values()), dtype=torch.int32, device=device)
        self.arrays = dict(zip(arrays, self.buffer.split(list(arrays.values())), strict=True))
        self.partial = workspace(self.max_items, kv_heads, self.config, head_dim, self.buffer.device)
        self.requests = 0

    def plan(self, shared: Sequence[Shared], contexts: Sequence[int]) -> SharedPlan:
        """Plan for these requests, from now on: they may grow, but neither come nor go. One copy, on the current
        stream. Raises `ValueError` for what is no forest, or is more than the buffers hold."""
        if len(contexts) > self.max_requests:
            raise ValueError(f"{len(contexts)} requests: up to {self.max_requests} wanted")
        plan = plan_shared(
            shared, contexts, group=self.group, kv_heads=self.kv_heads, config=self.config, slots=self.slots
        )
        if len(plan.items) > self.max_items or len(plan.pieces) > self.max_pieces or plan.parts > self.max_items:
            raise ValueError(
                f"{len(plan.items)} work items and {len(plan.pieces)} pieces: up to {self.max_items} and "
                f"{self.max_pieces} wanted"
            )
        self.requests = len(contexts)
        made = np.zeros(self.buffer.shape[0], dtype=np.int32)
        at = 0
        for name, array in self.arrays.items():
            values = getattr(plan, name).reshape(-1)
            made[at : at + len(values)] = values
            if name in ("lists", "starts"):  # who is not there has an empty list
                made[at + len(values) : at + array.shape[0]] = values[-1]
            at += array.shape[0]
        on_host = torch.from_numpy(made)
        if self.buffer.is_cuda:
            on_host = on_host.pin_memory()
        self.buffer.copy_(on_host, non_blocking=True)
        return plan

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: torch.Tensor,
        contexts: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the planned requests. Shapes and errors as of `prefix_prefill`; `q` has a row a request, and
        `contexts` is `(requests,)`, int32 or int64, at least what was planned with."""
        out = torch.empty_like(q) if out is None else out
        check(q, k, v, first, out, lse, sinks, self.requests, self.requests)
        if contexts.shape != (self.requests,) or contexts.dtype.is_floating_point or contexts.device != q.device:
            raise ValueError(
                f"contexts are {tuple(contexts.shape)} {contexts.dtype} on {contexts.device}: ({self.requests},) "
                f"integers on {q.device} wanted"
            )
        if not self.requests:
            return out
        config, dim = self.config, q.shape[2]
        part_out, part_lse = self.partial
        padded = triton.next_power_of_2(dim)
        cap = soft_cap > 0
        tiles = (k, v)
        if config.tma:
            box = [config.block_n, 1, padded]
            tiles = tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (k, v))
        shape = {"KV_HEADS": self.kv_heads, "GROUP": self.group, "DIM": dim, "DIM_PADDED": padded}
        arrays = self.arrays
        _pieces[(self.slots,)](
            q,
            k,
            v,
            *tiles,
            part_out,
            part_lse,
            arrays["order"],
            arrays["items"],
            arrays["lists"],
            arrays["schedule"],
            first,
            contexts,
            scale if cap else scale * 1.4426950408889634,
            soft_cap,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            CAP=cap,
            TMA=config.tma,
            WIDE=q.device.type == "cpu" and q.dtype is torch.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shape,
        )
        _together[(self.requests, self.kv_heads)](
            out,
            part_lse if lse is None else lse,
            part_out,
            part_lse,
            part_lse if sinks is None else sinks,
            arrays["starts"],
            arrays["pieces"],
            out.stride(0),
            out.stride(1),
            0 if lse is None else lse.stride(0),
            GROUP_PADDED=triton.next_power_of_2(self.group),
            BLOCK_M=config.block_m,
            PIECES=PIECES,
            SINKS=sinks is not None,
            LSE=lse is not None,
            num_warps=4,
            **shape,
        )
        return out
