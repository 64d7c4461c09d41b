"""The one table of configurations and kernels, chosen by shape: nothing is tuned while serving.

Found by `python -m benchmarks.tune`; `python -m benchmarks.kernels` says what they are worth.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_vtensor.kernels.plan import Config

#: What the kernel of `hopper.py` takes, and by how many tokens its largest tile may read past a context.
HOPPER_DIMS, HOPPER_TILE = (64, 128), 128
#: Contexts of fewer tokens are a few tiles, and small ones end with less of one unused.
SHORT_CONTEXT = 1500
#: A batch is uneven if its longest tile takes so many times what each multiprocessor would do if all did the same.
UNEVEN = 1.3
#: Over FP8 our kernel takes twice as long where all do the same. It is 1.09 times as fast at an unevenness of 3.2, 2.3
#: times at 7.5, 4.6 times at 15, and 0.81 times at 2.4; with heads of 64 and 96, 0.87 and 0.63 times at 1.9, and more
#: was not measured: it grows alike there.
UNEVEN_FP8, UNEVEN_FP8_DIMS = 3.0, (64, 96, 128)


@dataclass(frozen=True)
class DecodeCosts:
    """Of shared decode beside FlashAttention-3, as shares of what reading a key and a value from memory takes; measured
    on an H200. `again`: what FlashAttention-3 takes for a token of what is shared, for each request that reads it, as
    it comes from the cache in part. Ours: `compute`, a query head's work with one key of those; and what it loses with
    each token that a batch reads (`all`), with each that it reads once, shared ones too (`once`), and with each that is
    a request's own (`own`)."""

    again: float
    compute: float
    all: float
    own: float
    once: float = 0.0


WIDE_COSTS, FP8_COSTS = DecodeCosts(0.6, 0.01, 0.03, 0.0), DecodeCosts(1.25, 0.04, 0.03, 0.45)
#: With products in FP8.
NARROW_COSTS = DecodeCosts(1.0, 0.0225, 0.03, 0.02)
#: With heads of more than 128: over FP8 it takes 3 to 3.7 times as long as FlashAttention-3 where nothing is shared.
#: Over 16 bits it takes 1.5 to 2 times as long as its bytes do.
LARGE_COSTS, LARGE_FP8_COSTS = DecodeCosts(0.6, 0.03, 0.03, 0.0, 1.0), DecodeCosts(1.25, 0.15, 0.03, 0.0, 2.75)
#: Bytes that are read while its further kernels start.
SHARED_OVERHEAD_BYTES = 16 << 20
#: One program merges what many have read for a request and KV head: each part of a context beyond so many takes as long
#: as reading so many bytes. With one KV head, one request of 131,072 tokens has 396 parts, and takes 77 us for 29.
PARTS_MERGED, PART_BYTES = 16, 512 << 10
#: Of each head dimension: from so many requests and so many bytes a layer on (one pair or another) it is as fast as
#: FlashAttention-3 over the same layout even where nothing is shared. With keys and values of 16 bits: 0.99 to 1.26
#: times, over six geometries, and 1.1 to 1.5 times with heads of 96, which FlashAttention-3 pads. With products in FP8:
#: 1.00 to 1.20 times with heads of 64 and 128, and 1.3 to 1.4 with 96. What is not here, of a head dimension or below
#: these bytes, was not measured, or is slower, and is left to SGLang.
PLAIN = {64: [(8, 32 << 20)], 96: [(64, 768 << 20), (1, 1536 << 20)], 128: [(8, 128 << 20), (32, 32 << 20)]}
NARROW_PLAIN = {64: [(64, 32 << 20)], 96: [(64, 384 << 20), (1, 768 << 20)], 128: [(64, 512 << 20)]}
#: With products in FP8, also for so many requests or more, of up to so many tokens in the mean.
SHORT_REQUESTS, SHORT_TOKENS = 256, 512
#: Of the GPU on which all of this was measured.
MULTIPROCESSORS = 132


@functools.cache
def multiprocessors(device: torch.device | str) -> int:
    """How many programs of full size run at a time; on the host, where the kernels are interpreted, a few."""
    if torch.device(device).type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device | str) -> int:
    """Compute capability as 90 for 9.0; 0 on the host."""
    if torch.device(device).type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def prefill(rows: int, context: float, head_dim: int, capability: int, hopper: bool) -> Config:
    """For requests of up to `rows` packed query rows (new tokens times query heads per KV head) over contexts of about
    `context` tokens. `hopper` says that the kernel of `hopper.py` may be taken, if the GPU is one."""
    if capability == 0:
        return Config(16, 16, 4, 1)
    if hopper and capability == 90 and head_dim in HOPPER_DIMS:
        if rows <= 64:
            return Config(64, 64, 4, 3, True, 2, hopper=True)
        if context < SHORT_CONTEXT:
            return Config(128, 64, 4, 4, True, hopper=True)
        return Config(128, 128, 4, 2, True, hopper=True)
    tma = capability >= 90
    if head_dim > 128:  # on sm_86 and sm_89 a program has 99 KiB of shared memory
        return Config(128, 64, 8, 2, tma) if tma and rows > 64 else Config(64, 32, 4, 2)
    if not tma:
        return Config(64, 64, 4, 2) if rows <= 64 else Config(128, 64, 8, 2)
    if rows <= 64:
        return Config(64, 64, 4, 3, tma, 2)
    return Config(128, 128 if context >= 6000 else 64, 8, 3, tma)


def ours_before_fa3(
    new: Sequence[int],
    contexts: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    device: str,
    kv_dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
) -> bool:
    """Whether our kernel (over 16 bits that for Hopper) beats FlashAttention-3, over pages of 128 tokens, for such a
    prefill batch. Layers with a `window` are FlashAttention-3's: the kernel for Hopper has none.

    Over 16 bits it does with heads of 64 over prefixes; and, over FP8 too, where one request would keep a few
    multiprocessors busy for long after the others have ended, as FlashAttention-3 divides all contexts of a batch
    alike. Requests of one length are not such, however few tiles they have: 86 microseconds for 74, with 64 new tokens
    each over 8,192.
    """
    fp8 = kv_dtype.itemsize == 1
    if window is not None or head_dim not in (UNEVEN_FP8_DIMS if fp8 else HOPPER_DIMS):
        return False
    if head_dim == 64 and not fp8:
        return sum(contexts) > sum(new)
    tiles = [-(-n * q_heads // kv_heads // 128) * kv_heads for n in new]
    if max(tiles) == kv_heads:
        return False  # one tile each
    keys = [context - n / 2 for n, context in zip(new, contexts, strict=True)]
    work = sum(count * n for count, n in zip(tiles, keys, strict=True))
    # The longest tile beside the mean one, and beside what each multiprocessor does.
    return max(keys) * min(sum(tiles), multiprocessors(device)) > (UNEVEN_FP8 if fp8 else UNEVEN) * work


def shared_decode_pays(
    requests: int,
    tokens: int,
    shared: int,
    saved: int,
    group: int,
    token_bytes: int,
    capability: int = 0,
    kv_dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    longest: int | None = None,
) -> bool:
    """Whether shared decode is faster for a batch of so many requests with `tokens` tokens in all, of which `shared`
    are read by several requests, and `saved` read again by others where each reads its own. A token takes `token_bytes`
    in a layer. The `longest` context has so many tokens; None: as many as the others.

    Counted in tokens read from memory. Each on its own, requests that share a run read it at about the same time, so
    that much of it comes from the cache. Read once, its keys still meet the queries of all, and more kernels run.
    """
    fp8, config = kv_dtype.itemsize == 1, shared_decode(head_dim, capability, kv_dtype)
    kv_heads = max(1, token_bytes // (2 * head_dim * kv_dtype.itemsize))
    once = tokens - saved
    # The parts of the longest context, if the line of all that is read once is cut for each team of programs.
    longest = tokens // max(1, requests) if longest is None else longest
    parts = MULTIPROCESSORS * config.occupancy / kv_heads * longest / max(1, once) if capability else 0.0
    measured = NARROW_PLAIN if config.narrow else PLAIN if capability == 90 and not fp8 else {}
    if head_dim in measured and parts <= PARTS_MERGED:
        if any(requests >= least and tokens * token_bytes >= nbytes for least, nbytes in measured[head_dim]):
            return True
        if config.narrow and requests >= SHORT_REQUESTS and tokens <= SHORT_TOKENS * requests:
            return True
    if head_dim > 128:
        costs = LARGE_FP8_COSTS if fp8 else LARGE_COSTS
    else:
        costs = NARROW_COSTS if config.narrow else FP8_COSTS if fp8 else WIDE_COSTS
    read = shared + saved
    further = SHARED_OVERHEAD_BYTES + PART_BYTES * max(0.0, parts - PARTS_MERGED)
    loss = costs.all * tokens + costs.own * (tokens - read) + costs.once * once + further / token_bytes
    return costs.again * read > shared + costs.compute * group * read + loss


@functools.cache
def shared_decode(head_dim: int, capability: int, kv_dtype: torch.dtype = torch.bfloat16) -> Config:
    """For decode over shared runs: tiles of many requests' heads. On a Hopper GPU products are in FP8 where the keys
    and values are e4m3, as those of FlashAttention-3: a quarter to a fifth of the time is saved. Three programs a
    multiprocessor hide what each waits for when it widens values: an eighth of the time, of 64 x 8,192 tokens."""
    if capability == 0:
        return Config(16, 16, 4, 1)
    if head_dim > 128:
        return Config(64, 32, 4, 2, capability >= 90)
    narrow = capability == 90 and kv_dtype == torch.float8_e4m3fn
    if narrow:
        return Config(64, 64, 4, 3, True, 3, narrow=True, max_registers=168)
    return Config(64, 64, 4, 3, capability >= 90, 2)
