"""How attention is divided over the GPU: tiles of packed query rows, and parts of long contexts, longest first.

A prefill batch is planned on the host, once for all layers, from lengths that the host knows. The programs of a grid
start in the order of their index, so work in descending order balances a ragged batch by itself; where there are fewer
tiles than multiprocessors, or a last wave that would leave most of them idle, contexts are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_vtensor.kernels.attend import MERGE_FIELDS, WORK_FIELDS

#: What a program costs beside its keys, and what a merge costs, in tiles of keys: estimates.
PROGRAM_COST = 1.5
MERGE_COST = 4.0
#: A part is at least so many tiles of keys.
SMALLEST_PART = 2


@dataclass(frozen=True)
class Config:
    """One way to compile the kernels. `block_m` packed query rows by `block_n` keys a tile; `occupancy` programs run on
    one multiprocessor at a time; `tma` loads tiles of keys by descriptor, where the GPU can; `hopper` is the kernel of
    `hopper.py`, whose tiles have 64 or 128 rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    occupancy: int = 1
    hopper: bool = False


@dataclass(frozen=True)
class Plan:
    """Work items and merge items (see `attend`) on the device, int32, and how many parts they fill."""

    config: Config
    work: torch.Tensor
    merges: torch.Tensor
    parts: int
    rows: int
    requests: int
    window: int


def divide(costs: np.ndarray, programs_each: int, slots: int) -> np.ndarray:
    """Into how many parts each tile's keys are divided.

    `costs`: each tile's length in tiles of keys, int64, at least 1; each stands for `programs_each` programs (one for
    each KV head); `slots` programs run at a time. Tried are no division, and the most even ones that fill one, two and
    three waves; the one with the shortest estimated time is taken.
    """
    longest = int(costs.max())
    best, best_time = np.ones_like(costs), _time(costs, np.ones_like(costs), programs_each, slots)
    for waves in (1, 2, 3):
        # The shortest bound whose parts fit into so many waves.
        room = slots * waves // programs_each
        if room < len(costs) or longest < 2 * SMALLEST_PART:
            continue
        low, high = max(SMALLEST_PART, -(-int(costs.sum()) // room)), longest
        while low < high:
            middle = (low + high) // 2
            if int(np.sum(-(-costs // middle))) <= room:
                high = middle
            else:
                low = middle + 1
        parts = -(-costs // low)
        time = _time(costs, parts, programs_each, slots)
        if time < best_time * 0.98:
            best, best_time = parts, time
    return best


def _time(costs: np.ndarray, parts: np.ndarray, programs_each: int, slots: int) -> float:
    """How long it takes, estimated in tiles of keys."""
    lengths = costs / parts + PROGRAM_COST
    count = int(parts.sum()) * programs_each
    mean = float((lengths * parts).sum()) * programs_each / count
    # A full wave takes what its mean program takes; one alone what its longest does.
    time = max(-(-count // slots) * mean, float(lengths.max()))
    return time + (MERGE_COST if parts.max() > 1 else 0.0)


def plan_prefill(
    new: Sequence[int],
    contexts: Sequence[int],
    *,
    group: int,
    kv_heads: int,
    config: Config,
    slots: int,
    device: torch.device | str,
    window: int = -1,
) -> Plan:
    """The plan for a ragged batch: request `i` has `new[i]` new tokens at the end of `contexts[i]`, of which they see
    all up to themselves; with a `window` of 0 or more, only so many before themselves. A request without new tokens has
    no work. `slots` programs run at a time on this GPU. Raises `ValueError` for lengths that cannot be.
    """
    new_tokens = np.asarray(new, dtype=np.int64)
    context = np.asarray(contexts, dtype=np.int64)
    if new_tokens.shape != context.shape or new_tokens.ndim != 1:
        raise ValueError(f"{new_tokens.shape} new lengths and {context.shape} contexts: one of each a request wanted")
    if len(new_tokens) and (new_tokens.min() < 0 or (context < new_tokens).any()):
        bad = int(np.argmax((new_tokens < 0) | (context < new_tokens)))
        raise ValueError(f"request {bad} has {new_tokens[bad]} new tokens in a context of {context[bad]}")
    block_m, block_n = config.block_m, config.block_n
    starts = np.concatenate([[0], np.cumsum(new_tokens)])
    tiles = -(-new_tokens * group // block_m)
    request = np.repeat(np.arange(len(new_tokens)), tiles)
    if not len(request):
        empty = torch.empty((0, WORK_FIELDS), dtype=torch.int32, device=device)
        return Plan(config, empty, empty[:, :MERGE_FIELDS], 0, int(starts[-1]), len(new_tokens), window)
    tile = np.arange(len(request)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    prefix = context - new_tokens
    last = np.minimum((tile + 1) * block_m, new_tokens[request] * group) - 1
    high = prefix[request] + last // group + 1
    low = np.zeros_like(high)
    if window >= 0:
        low = np.maximum(prefix[request] + tile * block_m // group - window, 0)
    costs = -(-(high - low) // block_n)
    parts = divide(costs, kv_heads, slots)

    # One work item a part; its keys are whole tiles, the last part has the rest.
    owner = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    part_low = low[owner] + costs[owner] * number // parts[owner] * block_n
    part_high = np.minimum(low[owner] + costs[owner] * (number + 1) // parts[owner] * block_n, high[owner])
    divided = parts > 1
    first_part = np.cumsum(np.where(divided, parts, 0)) - np.where(divided, parts, 0)
    of = request[owner]
    work = np.stack(
        [
            starts[:-1][of],
            new_tokens[of],
            context[of],
            of,
            tile[owner],
            part_low,
            part_high,
            np.where(divided[owner], first_part[owner] + number, -1),
        ],
        axis=1,
    )
    work = work[np.argsort(part_low - part_high, kind="stable")]
    merges = np.stack([starts[:-1][request], new_tokens[request], tile, first_part, parts], axis=1)[divided]
    both = torch.from_numpy(np.concatenate([work.reshape(-1), merges.reshape(-1)]).astype(np.int32))
    if torch.device(device).type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    return Plan(
        config,
        both[: work.size].view(-1, WORK_FIELDS),
        both[work.size :].view(-1, MERGE_FIELDS),
        int(parts[divided].sum()),
        int(starts[-1]),
        len(new_tokens),
        window,
    )
