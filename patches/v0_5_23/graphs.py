"""Graphs of decode: batches that share are done by a backend around SGLang's own, and have graphs of their own."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from sglang_vtensor.patches.common import shared_decode

#: Graphs of decode are captured once for SGLang's own attention and once for ours.
PLAIN, SHARED = "vtensor_plain", "vtensor_shared"


class SharedGraphs:
    """SGLang's `AttentionGraphVariants`: each size is captured for both, and a batch chooses before its metadata is
    made."""

    capture_labels = (PLAIN, SHARED)

    def __init__(self, runner: Any, backend: Any) -> None:
        self._sizes, self._backend = sorted(runner.capture_bs), backend

    def select(self, forward_batch: Any) -> str:
        requests = forward_batch.batch_size
        at = bisect.bisect_left(self._sizes, requests)
        size = self._sizes[at] if at < len(self._sizes) else requests
        return SHARED if self._backend.decide(forward_batch, size) else PLAIN


def have_variants(runner: Any, stream_idx: int | None = None) -> None:
    backend = shared_decode(runner)
    if backend is not None:
        runner.attention_graph_variants = SharedGraphs(runner, backend)


def capture_one_shape(
    original: Callable[..., None],
    runner: Any,
    size: int,
    forward: Callable[..., Any],
    stream_idx: int | None = None,
    variant_label: str | None = None,
    attention_variant: str | None = None,
) -> None:
    """For shared decode, where that has room for so many requests."""
    backend = shared_decode(runner)
    shared = backend is not None and attention_variant == SHARED
    if shared and not backend.has_room_for(size):
        return
    if backend is not None:
        backend.capturing = shared
    try:
        original(runner, size, forward, stream_idx, variant_label, attention_variant)
    finally:
        if backend is not None:
            backend.capturing = False
