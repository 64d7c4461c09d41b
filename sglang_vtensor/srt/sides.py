"""Which layers of a model are on which side of the memory, and how far back each side is needed.

Models with sliding windows are not served yet; what serves them is here, and tested: a side whose layers see a window
keeps memory for that window only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sglang_vtensor.layout import KVLayout


@dataclass(frozen=True)
class Sides:
    """`layouts[side]` is the layout of a side; the first side holds all tokens. Layer `i` of the model is layer
    `layers[i][1]` of side `layers[i][0]`. On a side, a token is read by the next `windows[side]` tokens; None: by all
    tokens behind it."""

    layouts: Sequence[KVLayout]
    layers: Sequence[tuple[int, int]]
    windows: Sequence[int | None]

    @classmethod
    def of(cls, layout: KVLayout, windows: Sequence[int | None]) -> Sides:
        """Of a model whose layers have these windows, from the layout of all its layers together. Raises `ValueError`
        where no layer reads all tokens, or where the windows differ."""
        kinds: list[int | None] = list(dict.fromkeys([None, *windows]))
        if None not in windows or len(kinds) > 2:
            raise ValueError(f"windows {list(windows)}: layers that read all tokens, and one window of others, wanted")
        of_side: list[list[int]] = [[i for i, window in enumerate(windows) if window == kind] for kind in kinds]
        layouts = [layout]
        if len(kinds) > 1:
            layouts = [
                replace(layout, layers=len(some), stride_bytes=layout.kv_bytes // layout.layers * len(some))
                for some in of_side
            ]
        layers = sorted((i, side, number) for side, some in enumerate(of_side) for number, i in enumerate(some))
        return cls(layouts, [(side, number) for _, side, number in layers], kinds)


def sides_of(layout: KVLayout) -> Sides:
    """Of a model that is served today: every layer reads all tokens."""
    return Sides.of(layout, [None] * layout.layers)
