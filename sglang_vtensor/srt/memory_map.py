"""The map of a rank's memory that `GET /vtensor/map` sends: who owns which frames, and the numbers of the same moment.

It is taken between two batches, when the HTTP server asked for it and at no other time. Owners of frames are numbered
(`frame_map`): 4 is the first request, and behind the requests come the tree's nodes.

    {"first": [...], "count": [...], "owner": [...], ...   runs of frames, and whose they are
     "requests": {"id": [...], "tokens": [...], "node": [...]}     the node whose path the request reads, or -1
     "nodes": {"parent": [...], "tokens": [...], "age": [...]}     tokens from the root; seconds since it was matched
     "shared": [...]}                                              the nodes of `shared_prefixes`, in that order

Lists are columns, and one node or request is one place in each of them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_vtensor.frame_map import frame_map

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.radix_cache import PagedRadixCache
    from sglang_vtensor.srt.runtime import Runtime

#: Of a request's id, which its sender chose, so many characters are told.
SHOWN_ID = 48
#: What the lines of the page show, beside the time.
LINES = ("generated_tokens", "prompt_tokens", "prefix_tokens_served", "pages_live", "pages_cached", "pages_backed")


def lines(runtime: Runtime) -> tuple[int, ...]:
    """The values of `LINES` now. They are counters that exist anyway, so this takes microseconds."""
    memory = runtime.memory
    cached = runtime.pages_cached()
    served, prompt = memory.counts["prefix_tokens"], memory.counts["prompt_tokens"]
    return runtime.generated_tokens, prompt, served, memory.owned - cached, cached, memory.backed


def memory_map(runtime: Runtime, tree: PagedRadixCache, reqs: Mapping[int, Req], shared: int) -> dict[str, Any] | None:
    """The map, or None where the memory has too many pages to draw. `reqs` are the running requests by slot, and
    `shared` says how many shared prefixes are told. The caller holds the memory still."""
    now = time.monotonic()
    nodes = tree.nodes()
    number = {node: at for at, node in enumerate(nodes)}
    parents = [number.get(node.parent, -1) for node in nodes]
    records = runtime.requests
    owners = [record.frames[record.protected :] for record in records.values()]
    drawn = frame_map(runtime.memory, owners + [node.frames for node in nodes])
    if drawn is None:
        return None
    running = [reqs.get(slot) for slot in records]
    drawn["requests"] = {
        "id": ["" if req is None else str(req.rid)[:SHOWN_ID] for req in running],
        "tokens": [0 if req is None else runtime.sglang.allocated(req) for req in running],
        "node": [-1 if req is None else number.get(req.last_node, -1) for req in running],
    }
    drawn["nodes"] = {
        "parent": parents,
        "tokens": [node.depth for node in nodes],
        "age": np.round(now - np.array([node.last_access_time for node in nodes]), 1).tolist(),
    }
    drawn["shared"] = [number[node] for node in tree.most_shared(shared)]
    return drawn
