"""Decode on the host that reads what requests share from one of them, as the kernel does: by the tables that it gets.

Put into a scheduler of the harness, in its process. What the tables say wrongly is read wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_vtensor.sharing import Tables
from sglang_vtensor.srt.batch_sharing import BatchSharing


def whatever_is_shared_pays(scheduler: Any) -> None:
    """On a GPU, from now on: of a small model it would not."""
    scheduler.token_to_kv_pool_allocator.runtime.sharing.token_bytes = 1 << 40


def read_shared_once(scheduler: Any, requests: int) -> None:
    """From now on. Batches of more than `requests` are done as before."""
    backend = scheduler.tp_worker.model_runner.attn_backend
    runtime = backend.runtime
    table = scheduler.req_to_token_pool.req_to_token
    plain = backend.forward_extend
    # One token is worth so much that whatever is shared pays.
    sharing = runtime.sharing = BatchSharing(runtime, requests=requests, group=1, token_bytes=1 << 40)

    def init(forward_batch: Any) -> None:
        if not forward_batch.forward_mode.is_decode():
            return of_runs(forward_batch)
        sharing.sharing.check_integrity()
        sharing.count(sharing.pays)
        slots, contexts = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
        if len(slots) <= requests:
            assert sharing.sharing.slots() == set(slots)
        backend.parts = _parts(sharing.sharing.tables, slots, contexts)
        return None

    def decode(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any) -> Any:
        backend.work = []
        plain(q, k, v, layer, forward_batch, save_kv_cache)  # writes k and v, and reads nothing
        heads = layer.tp_k_head_num
        rows = q.reshape(-1, heads, layer.tp_q_head_num // heads, layer.qk_head_dim)
        by_slot = runtime.memory.layer_views(layer.layer_id)
        out = []
        for row, parts in zip(rows, backend.parts, strict=True):
            slots = torch.cat([table[slot, low:high] for slot, low, high in parts]).long()
            k, v = (x[slots] for x in by_slot)
            k, v = (x.permute(1, 0, 2)[:, None].expand(-1, row.shape[1], -1, -1) for x in (k, v))
            out.append(scaled_dot_product_attention(row[:, :, None], k, v, scale=layer.scaling)[:, :, 0])
        return torch.stack(out).reshape(len(out), -1)

    of_runs = backend.init_forward_metadata
    backend.init_forward_metadata, backend.forward_decode = init, decode


def _parts(tables: Tables, slots: list[int], contexts: list[int]) -> list[list[tuple[int, int, int]]]:
    """Of each request of a batch, whose tokens are read for its own: of which request, from one and to another."""
    first: dict[int, int] = {}
    parts = []
    for slot, context in zip(slots, contexts, strict=True):
        runs, end = [], 0
        for unit in (int(unit) for unit in tables.chains[slot] if unit >= 0):
            assert tables.lows[unit] == end
            end = int(tables.highs[unit])
            runs.append((first.setdefault(unit, slot), int(tables.lows[unit]), end))
        parts.append([*runs, (slot, end, context)])
    return parts
