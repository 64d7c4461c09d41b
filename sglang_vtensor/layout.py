"""Where a token's K and V lie: the arithmetic of tokens and pages, and the strided views that kernels read.

Token-major: the bytes of one token are `[layer][k|v][head][dim]`, and tokens follow one another at a constant stride,
over all frames. A layer's K is then a tensor `(tokens, heads, dim)` with one stride
between tokens, whatever pages lie behind the addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_vtensor.placement import lane_frames_for

#: SGLang keeps slots, and kernels count tokens, in 32 bits.
SLOTS = 1 << 31
#: Page sizes in tokens that are tried, smallest first, when the user names none.
PAGE_TOKENS = (16, 32, 64, 128, 256, 512)
#: A page larger than this wastes more in half-filled last pages than small pages cost in mapping calls.
LARGEST_PAGE_BYTES = 64 << 20
#: Padding the token stride is preferred to a page larger than that, up to this share of waste.
LARGEST_WASTE = 0.07


#: Addresses that frames may take, all sides together; reserving 64 TiB was seen to succeed, a process has 128.
ADDRESS_BYTES = 32 << 40
#: More lanes than contexts that live at a time are of no use, and more frames cost a byte each.
MOST_LANES, MOST_FRAMES = 4096, 1 << 22


@dataclass(frozen=True)
class KVLayout:
    """The geometry of one rank's KV cache. `token_bytes` and `page_bytes` include padding, `kv_bytes` does not."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_tokens: int
    stride_bytes: int
    granularity: int

    def __post_init__(self) -> None:
        if self.stride_bytes < self.kv_bytes or self.stride_bytes % self.dtype.itemsize:
            raise ValueError(
                f"a stride of {self.stride_bytes} bytes cannot hold {self.kv_bytes} bytes of {self.dtype}: give at "
                "least that many, in whole elements"
            )
        if self.page_bytes % self.granularity:
            raise ValueError(
                f"a page of {self.page_tokens} tokens is {self.page_bytes} bytes, not a multiple of the granularity "
                f"of {self.granularity}: choose a size with KVLayout.choose"
            )

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.stride_bytes

    @property
    def waste(self) -> float:
        """The share of each page that is padding."""
        return 1 - self.kv_bytes / self.stride_bytes

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_tokens)

    def layer_views(self, region: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer over a flat uint8 region that starts at a token.

        Both are `(tokens, kv_heads, head_dim)` of `dtype`, strides `(stride, head_dim, 1)` elements; no copy.
        """
        flat = region.view(self.dtype)
        stride = self.stride_bytes // self.dtype.itemsize
        plane = self.kv_heads * self.head_dim
        shape = (flat.numel() // stride, self.kv_heads, self.head_dim)
        strides = (stride, self.head_dim, 1)
        first = flat.storage_offset() + layer * 2 * plane
        return flat.as_strided(shape, strides, first), flat.as_strided(shape, strides, first + plane)

    @classmethod
    def choose(
        cls,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        granularity: int,
        tile_tokens: int = 1,
        page_tokens: int | None = None,
    ) -> KVLayout:
        """The layout for a model on a device whose pages are multiples of `granularity` bytes.

        Without `page_tokens`, the smallest of PAGE_TOKENS that is whole tiles (`tile_tokens`, so that a kernel that
        loads whole tiles stays within a context's own pages) and whole granules; where that page were larger than
        LARGEST_PAGE_BYTES, or none fits, the token stride is padded to fit. With it, that size: without padding, or
        padded where it is the one that would have been chosen; or a `ValueError` that names the sizes that fit.
        """
        kv_bytes = layers * 2 * kv_heads * head_dim * dtype.itemsize
        # The sizes that need no padding are the multiples of this one.
        step = math.lcm(granularity // math.gcd(granularity, kv_bytes), tile_tokens)

        def layout(tokens: int, stride: int) -> KVLayout:
            return cls(layers, kv_heads, head_dim, dtype, tokens, stride, granularity)

        if page_tokens is not None:
            if page_tokens > 0 and page_tokens % step == 0:
                return layout(page_tokens, kv_bytes)
            chosen = cls.choose(
                layers=layers,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                granularity=granularity,
                tile_tokens=tile_tokens,
            )
            if page_tokens == chosen.page_tokens:
                return chosen
            fits = ", ".join(str(step * k) for k in (1, 2, 4, 8))
            raise ValueError(
                f"--page-size {page_tokens} cannot be mapped: {kv_bytes} bytes a token make a page of "
                f"{page_tokens * kv_bytes} bytes, and pages here are multiples of {granularity} bytes and of "
                f"{tile_tokens} tokens. Sizes that fit are the multiples of {step}: {fits}, ... Leave --page-size out "
                f"to have one chosen ({chosen.page_tokens})."
            )
        for tokens in PAGE_TOKENS:
            if tokens % step == 0 and tokens * kv_bytes <= LARGEST_PAGE_BYTES:
                return layout(tokens, kv_bytes)
        best: KVLayout | None = None
        for tokens in PAGE_TOKENS:
            if tokens % tile_tokens:
                continue
            candidate = layout(tokens, padded_stride(kv_bytes, tokens, granularity))
            if candidate.waste <= LARGEST_WASTE and candidate.page_bytes <= LARGEST_PAGE_BYTES:
                return candidate
            if best is None or candidate.waste < best.waste:
                best = candidate
        assert best is not None
        return best


def padded_stride(kv_bytes: int, tokens: int, granularity: int) -> int:
    """The least bytes of a token, of which `kv_bytes` are K and V, that make pages of `tokens` tokens whole granules.
    Strides with padding are multiples of 256 bytes, what TMA and cache lines like."""
    unit = math.lcm(granularity // math.gcd(granularity, tokens), 256)
    return -(-kv_bytes // unit) * unit


def frames_for(sides: Sequence[KVLayout], capacity_pages: int, max_tokens: int) -> tuple[int, int]:
    """How many frames there are, and how long a lane is, for contexts of up to `max_tokens` tokens.

    As many lanes as are of use, and as addresses and 32-bit slots allow. Raises `ValueError` if that is less than twice
    the capacity.
    """
    lane = lane_frames_for(sides[0].pages_for(max_tokens))
    page_bytes = sum(side.page_bytes for side in sides)
    most = min(ADDRESS_BYTES // page_bytes, (SLOTS - 1) // sides[0].page_tokens)
    while lane > most:
        lane //= 2  # a context is several runs then
    least = 2 * (capacity_pages + 1)
    frames = min(most // lane, -(-max(min(MOST_FRAMES, MOST_LANES * lane), least) // lane)) * lane
    if frames < least:
        raise ValueError(
            f"{capacity_pages} pages of {page_bytes} bytes need at least twice as many frames, and addresses allow "
            f"{frames}: lower --mem-fraction-static or --max-total-tokens"
        )
    return frames, lane
