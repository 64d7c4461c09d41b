"""Which layers of a model are on which side of the memory, and how far back each side is read.

Layers that see a window are on a side of their own, which keeps memory for that window only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from sglang_vtensor.layout import LARGEST_PAGE_BYTES, LARGEST_WASTE, PAGE_TOKENS, KVLayout, padded_stride


@dataclass(frozen=True)
class Sides:
    """`layouts[side]` is the layout of a side; the first side holds all tokens. Layer `i` of the model is layer
    `layers[i][1]` of side `layers[i][0]`; None: it keeps no K and V. On a side, a token is read by the next
    `windows[side]` tokens; None: by all tokens behind it."""

    layouts: Sequence[KVLayout]
    layers: Sequence[tuple[int, int] | None]
    windows: Sequence[int | None]

    @classmethod
    def choose(
        cls,
        windows: Sequence[int | None],
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        granularity: int,
        tile_tokens: int = 1,
        page_tokens: int | None = None,
        without: Collection[int] = (),
    ) -> Sides:
        """Of a model whose layers have these windows: layouts as of `KVLayout.choose`, with as many tokens a page on
        each side. The layers `without` K and V are on none. Raises `ValueError` as that does, and where no layer reads
        all tokens, or where the windows differ.
        """
        windows = [window for n, window in enumerate(windows) if n not in without]
        kinds: list[int | None] = list(dict.fromkeys([None, *windows]))
        if None not in windows or len(kinds) > 2:
            raise ValueError(f"windows {list(windows)}: layers that read all tokens, and one window of others, wanted")
        counts = [sum(window == kind for window in windows) for kind in kinds]
        if len(kinds) == 1:
            layouts = [
                KVLayout.choose(
                    layers=counts[0],
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    dtype=dtype,
                    granularity=granularity,
                    tile_tokens=tile_tokens,
                    page_tokens=page_tokens,
                )
            ]
        else:
            layer_bytes = 2 * kv_heads * head_dim * dtype.itemsize

            def of(tokens: int) -> list[KVLayout]:
                """With padding where a side's pages would be no whole granules."""
                strides = [count * layer_bytes for count in counts]
                strides = [
                    s if s * tokens % granularity == 0 else padded_stride(s, tokens, granularity) for s in strides
                ]
                return [
                    KVLayout(count, kv_heads, head_dim, dtype, tokens, stride, granularity)
                    for count, stride in zip(counts, strides, strict=True)
                ]

            sizes = [tokens for tokens in PAGE_TOKENS if tokens % tile_tokens == 0]
            layouts = _shortest([of(tokens) for tokens in sizes])
            if page_tokens is not None and page_tokens != layouts[0].page_tokens:
                layouts = of(page_tokens) if page_tokens > 0 and page_tokens % tile_tokens == 0 else []
                if not layouts or any(layout.waste for layout in layouts):
                    fits = [str(tokens) for tokens in sizes if not any(layout.waste for layout in of(tokens))]
                    of_all, of_windows = (count * layer_bytes for count in counts)
                    raise ValueError(
                        f"--page-size {page_tokens} cannot be mapped: layers that read all tokens have {of_all} bytes "
                        f"a token, and those that see a window {of_windows}. Each must make pages of whole "
                        f"{granularity} bytes and of whole tiles of {tile_tokens} tokens. Sizes that fit: "
                        f"{', '.join(fits) or 'none'}. Leave --page-size out to have one chosen "
                        f"({_shortest([of(tokens) for tokens in sizes])[0].page_tokens})."
                    )
        number = [0] * len(kinds)
        layers: list[tuple[int, int] | None] = []
        left = iter(windows)
        for n in range(len(windows) + len(without)):
            if n in without:
                layers.append(None)
                continue
            side = kinds.index(next(left))
            layers.append((side, number[side]))
            number[side] += 1
        return cls(layouts, layers, kinds)

    @property
    def page_tokens(self) -> int:
        return self.layouts[0].page_tokens

    @property
    def page_bytes(self) -> int:
        """Of a page of each side."""
        return sum(layout.page_bytes for layout in self.layouts)

    @property
    def waste(self) -> float:
        """The share of these that is padding."""
        return 1 - self.page_tokens * sum(layout.kv_bytes for layout in self.layouts) / self.page_bytes


def _shortest(choices: Sequence[list[KVLayout]]) -> list[KVLayout]:
    """The first one with little padding on each side, and pages that are not too large; else the one with the least."""
    for layouts in choices:
        if all(one.waste <= LARGEST_WASTE and one.page_bytes <= LARGEST_PAGE_BYTES for one in layouts):
            return layouts
    return min(choices, key=lambda layouts: max(layout.waste for layout in layouts))
