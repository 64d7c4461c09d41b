"""How attention is divided over the GPU: tiles of packed query rows, and parts of long contexts, longest first.

A prefill batch is planned on the host, once for all layers, from lengths that the host knows. Where there are fewer
tiles than multiprocessors, a long context among short ones, or a last wave that would leave most of them idle, contexts
are divided. The programs of a grid start in the order of their index, so work in descending order balances a ragged
batch by itself; the kernel for Hopper has one program a slot, each with a list of what it does. Tiles that read the
same keys stand next to each other, so that they run at the same time and memory is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_vtensor.kernels.attend import ITEM_HIGH, ITEM_LOW, RUN_FIELDS

#: What a tile of rows costs beside its keys, and a part of one, and what the merge costs, in tiles of keys: estimates.
PROGRAM_COST = 1.5
PART_COST = 2.5
MERGE_COST = 3.0
#: A part is at least so many tiles of keys.
SMALLEST_PART = 2
#: Numbers of int32 in 16 bytes.
ALIGNED = 4


@dataclass(frozen=True)
class Config:
    """One way to compile the kernels. `block_m` packed query rows by `block_n` keys a tile; `occupancy` programs run on
    one multiprocessor at a time; `tma` loads tiles of keys by descriptor, where the GPU can; `hopper` is the kernel of
    `hopper.py`, whose tiles have 64 or 128 rows; `narrow` multiplies queries with keys of float8_e4m3fn in that type,
    as FlashAttention-3 does; `max_registers` are those that a thread may have, so that `occupancy` programs have room,
    where the compiler would take more."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    occupancy: int = 1
    hopper: bool = False
    narrow: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """How many parts the work items fill, the rows of q, and the window that it is for; and work items, merges and runs
    (see `attend`), int32 on the device. In the kernel for Hopper, program `p` does `schedule[lists[p]:lists[p + 1]]`,
    each a work item times KV heads plus a head."""

    config: Config
    parts: int
    rows: int
    window: int | None
    work: torch.Tensor
    merges: torch.Tensor
    runs: torch.Tensor
    lists: torch.Tensor
    schedule: torch.Tensor


def divide(costs: np.ndarray, programs_each: int, slots: int) -> np.ndarray:
    """Into how many parts each tile's keys are divided.

    `costs`: each tile's length in tiles of keys, int64, at least 1; each stands for `programs_each` programs (one for
    each KV head); `slots` programs run at a time. Tried are no division, parts no longer than some shares of what each
    slot would do if all did the same, and the most even parts that fill one, two and three waves; the one with the
    shortest estimated time is taken.
    """
    whole = np.ones_like(costs)
    even = (float(costs.sum()) + PROGRAM_COST * len(costs)) * programs_each / slots
    best, best_time = whole, _time(costs, whole, programs_each, slots)
    bounds = {max(SMALLEST_PART, int(even * share)) for share in (1.0, 0.75, 0.5, 0.34, 0.25, 0.17)}
    for waves in (1, 2, 3):
        room = slots * waves // programs_each
        if room >= len(costs):
            bounds.add(_bound(costs, room))
    for bound in sorted(bounds, reverse=True):
        if best_time <= 1.04 * even:
            break
        parts = -(-costs // bound)
        if parts.max() < 2:
            continue
        time = _time(costs, parts, programs_each, slots)
        if time < best_time * 0.98:
            best, best_time = parts, time
    return best


def _bound(costs: np.ndarray, room: int) -> int:
    """The shortest length of parts of which there are no more than `room`."""
    low, high = max(SMALLEST_PART, -(-int(costs.sum()) // room)), max(SMALLEST_PART, int(costs.max()))
    while low < high:
        middle = (low + high) // 2
        if int(np.sum(-(-costs // middle))) <= room:
            high = middle
        else:
            low = middle + 1
    return low


def _time(costs: np.ndarray, parts: np.ndarray, programs_each: int, slots: int) -> float:
    """How long it takes, estimated in tiles of keys."""
    lengths = np.repeat(costs / parts + np.where(parts > 1, PART_COST, PROGRAM_COST), parts * programs_each)
    lengths[::-1].sort()
    merging = MERGE_COST if parts.max() > 1 else 0.0
    return float(_assign(lengths, slots)[1].max()) + merging


def _assign(lengths: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Which slot takes each program, and what each slot then has to do. Of as many programs as there are slots the
    longest goes to the slot that has least to do, and so on with the next ones: programs that stand near each other
    run at about the same time."""
    load = np.zeros(min(slots, len(lengths)))
    owner = np.empty(len(lengths), dtype=np.int64)
    for start in range(0, len(lengths), len(load)):
        some = lengths[start : start + len(load)]
        free = np.argsort(load, kind="stable")[: len(some)]
        longest = np.argsort(-some, kind="stable")
        owner[start + longest] = free
        load[free] += some[longest]
    return owner, load


def plan_prefill(
    new: Sequence[int],
    runs: Sequence[Sequence[tuple[int, int]]],
    *,
    group: int,
    kv_heads: int,
    config: Config,
    slots: int,
    device: torch.device | str,
    window: int | None = None,
) -> Plan:
    """The plan for a ragged batch: request `i` has `new[i]` new tokens at the end of its context, of which they see all
    up to themselves, or with a `window` that many before each. Its context is `runs[i]`, each `(first slot, tokens)`. A
    request without new tokens has no work. `slots` programs run at a time on this GPU. Raises `ValueError` for lengths
    that cannot be.
    """
    new_tokens = np.asarray(new, dtype=np.int64)
    if new_tokens.ndim != 1 or len(runs) != len(new_tokens):
        raise ValueError(
            f"{new_tokens.shape} new lengths and runs of {len(runs)} contexts: one of each a request wanted"
        )
    context = np.array([sum(tokens for _, tokens in some) for some in runs], dtype=np.int64)
    if len(new_tokens) and (new_tokens.min() < 0 or (context < new_tokens).any()):
        bad = int(np.argmax((new_tokens < 0) | (context < new_tokens)))
        raise ValueError(f"request {bad} has {new_tokens[bad]} new tokens in a context of {context[bad]}")
    block_m, block_n = config.block_m, config.block_n
    starts = np.concatenate([[0], np.cumsum(new_tokens)])
    tiles = -(-new_tokens * group // block_m)
    request = np.repeat(np.arange(len(new_tokens)), tiles)
    tile = np.arange(len(request)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    prefix = context - new_tokens
    last = np.minimum((tile + 1) * block_m, new_tokens[request] * group) - 1
    high = prefix[request] + last // group + 1
    # The first tile of keys that the first row of a tile sees.
    low = np.zeros_like(high)
    if window is not None:
        low = np.maximum(prefix[request] + tile * block_m // group - window, 0) // block_n * block_n
    costs = -(-(high - low) // block_n)
    parts = divide(costs, kv_heads, slots) if len(costs) else costs

    # One work item a part; its keys are whole tiles, the last part has the rest.
    owner = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    part_low = low[owner] + costs[owner] * number // parts[owner] * block_n
    part_high = np.minimum(low[owner] + costs[owner] * (number + 1) // parts[owner] * block_n, high[owner])
    divided = parts > 1
    first_part = np.cumsum(np.where(divided, parts, 0)) - np.where(divided, parts, 0)
    of = request[owner]
    table, ends, before = _table(runs, context)
    work = np.stack(
        [
            starts[:-1][of],
            new_tokens[of],
            context[of],
            tile[owner],
            part_low,
            part_high,
            np.searchsorted(ends, before[of] + part_low, side="right"),
            np.searchsorted(ends, before[of] + part_high - 1, side="right"),
            np.where(divided[owner], first_part[owner] + number, -1),
        ],
        axis=1,
    )
    if len(work):
        work = work[_order(part_high - part_low, of, part_low)]
    merges = np.stack([starts[:-1][request], new_tokens[request], tile, first_part, parts], axis=1)[divided]
    lists = schedule = np.empty(0, dtype=np.int64)
    if config.hopper and len(work):
        keys = work[:, ITEM_HIGH.value] - work[:, ITEM_LOW.value]
        owner, load = _assign(np.repeat(keys / block_n + PROGRAM_COST, kv_heads), slots)
        lists = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(load)))])
        schedule = np.argsort(owner, kind="stable")
    arrays = _transfer([work, merges, table, lists, schedule], device)
    return Plan(config, int(parts[divided].sum()), int(starts[-1]), window, *arrays)


def _transfer(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
    """The arrays on the device, int32, by one copy that nothing waits for.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not, and that would be
    while serving, as lengths decide where an array behind another one begins.
    """
    padded = [np.pad(array.reshape(-1), (0, -array.size % ALIGNED)) for array in arrays]
    packed = torch.from_numpy(np.concatenate(padded).astype(np.int32))
    if torch.device(device).type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    places = packed.split([array.size for array in padded])
    return [place[: array.size].view(array.shape) for place, array in zip(places, arrays, strict=True)]


def _table(runs: Sequence[Sequence[tuple[int, int]]], context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of all runs, those of one request behind those of another, and one more that kernels may read; where
    each ends if all contexts lay one behind the other; and the tokens before each request's in that."""
    every = np.array([run for some in runs for run in some], dtype=np.int64).reshape(-1, 2)
    before = np.cumsum(context) - context
    ends = np.cumsum(every[:, 1])
    owner = np.repeat(np.arange(len(runs)), [len(some) for some in runs])
    end = ends - before[owner]
    start = end - every[:, 1]
    table = np.stack([start, end, every[:, 0] - start], axis=1)
    return np.concatenate([table, np.zeros((1, RUN_FIELDS.value), dtype=np.int64)]), ends, before


def _order(length: np.ndarray, request: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Longest first, but those of one request that begin at one key and are about equally long beside each other."""
    longest = np.zeros(int(request.max()) + 1)
    np.maximum.at(longest, request, length)
    quarters = np.ceil(4 * length / longest[request]) / 4
    return np.lexsort((-length, low, request, -quarters * longest[request]))
