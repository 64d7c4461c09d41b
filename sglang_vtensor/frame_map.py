"""Which frame belongs to whom at this moment, as runs: what a picture of the memory is drawn from.

    frames    0 | 1  2  3 | 7  8 |  .  .  | 12
    owner     0 | 4  4  4 | 5  5 |        | 1      ->  first [0, 1, 7, 12], count [1, 3, 2, 1], owner [0, 4, 5, 1]

Only frames that hold memory are in it, so its size depends on the pages that exist and not on the addresses, which are
many times as many. It takes a pass over these pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sglang_vtensor.memory import KVMemory

#: Owners that are none of the caller's: the padding frame; pages that nobody uses; pages that hold the unfinished end
#: of a text; pages that the driver did not take back. The caller's owners are numbered from `FIRST_OWNER` on.
PADDING, FREE, KEPT, STUCK = range(4)
FIRST_OWNER = 4
#: Beyond so many pages no map is made: it would hold the scheduling thread up.
MOST_PAGES = 1 << 16


def frame_map(memory: KVMemory, owners: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """The runs of all frames with memory, ascending: `first` frame, `count` of frames and `owner` of each run, three
    lists of equal length. `owners[i]` are the frames of owner `FIRST_OWNER + i`, in the order of their tokens. Of each
    side behind the first one, `sides` has the runs of frames with memory there, as `first, count, first, count, ...`.

    The caller holds the memory's lock. Returns None where there are more than `MOST_PAGES` pages.
    """
    if max(backing.pages for backing in memory.backings) > MOST_PAGES:
        return None
    backing = memory.backing
    groups: list[Sequence[int]] = [[0], backing.free_frames(), memory.tails.frames(), backing.stuck_frames(), *owners]
    first, count, owner = _runs(groups)
    order = np.argsort(first, kind="stable")
    return {
        "frames": memory.placement.num_frames,
        "lane_frames": memory.placement.lane_frames,
        "first": first[order].tolist(),
        "count": count[order].tolist(),
        "owner": owner[order].tolist(),
        "sides": [_pairs(backing.frames_with_memory()) for backing in memory.backings[1:]],
    }


def _runs(groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of ascending frames within each group: first frames, lengths, and the number of the group."""
    sizes = np.fromiter(map(len, groups), np.int64, len(groups))
    frames = np.fromiter(chain.from_iterable(groups), np.int64, int(sizes.sum()))
    group = np.repeat(np.arange(len(groups)), sizes)
    begins = np.ones(len(frames), bool)
    begins[1:] = (frames[1:] != frames[:-1] + 1) | (group[1:] != group[:-1])
    at = np.flatnonzero(begins)
    return frames[at], np.diff(at, append=len(frames)), group[at]


def _pairs(frames: Iterable[int]) -> list[int]:
    first, count, _ = _runs([sorted(frames)])
    pairs: list[int] = np.stack([first, count], axis=1).reshape(-1).tolist()
    return pairs
