"""SGLang's KV pool over the identity region: its K and V buffers are strided views, by slot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_vtensor.kernels.kv_store import store_kv
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
from sglang_vtensor.srt.options import Options, parse_share_or_bytes
from sglang_vtensor.srt.runtime import Runtime
from sglang_vtensor.vmm import open_vmm

if TYPE_CHECKING:
    from sglang_vtensor.srt.requests import Requests

logger = logging.getLogger(__name__)


class VTensorKVPool(MHATokenToKVPool):
    """A pool of `size` tokens that holds no memory until pages are handed out.

    `k_buffer[layer]` and `v_buffer[layer]` are `(size + page_tokens, kv_heads, head_dim)` views of the identity
    region; reading or writing a slot of a page that is not backed is a fault, as it would be past the end of a tensor.
    """

    def __init__(
        self,
        size: int,
        *,
        layout: KVLayout,
        options: Options,
        device: str,
        max_running: int,
        max_tokens: int,
        start_layer: int,
        end_layer: int,
        sglang: Requests,
    ) -> None:
        # The base class creates the buffers in its constructor: what that needs comes first.
        capacity_pages = size // layout.page_tokens
        reserve = parse_share_or_bytes(options.vtensor_reserve, "--vtensor-reserve")
        if isinstance(reserve, float):
            reserve_pages = int(reserve * capacity_pages)
        else:
            reserve_pages = -(-reserve // layout.page_bytes)
        vmm = open_vmm(device)
        vmm.headroom_bytes = options.headroom_bytes(vmm.memory()[1])
        self.runtime = Runtime(
            KVMemory(
                vmm,
                layout,
                capacity_pages=capacity_pages,
                max_tokens=max_tokens,
                max_running=max_running,
                max_parked=options.vtensor_max_parked,
                reserve_pages=reserve_pages,
                idle_seconds=options.vtensor_idle_seconds,
            ),
            max_running + 1,
            sglang,
        )
        super().__init__(
            size,
            page_size=layout.page_tokens,
            dtype=layout.dtype,
            head_num=layout.kv_heads,
            head_dim=layout.head_dim,
            layer_num=layout.layers,
            device=device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
            kv_cache_layout="page_major",
        )

    def _create_buffers(self) -> None:
        views = [self.runtime.memory.identity_views(layer) for layer in range(self.layer_num)]
        self.k_buffer = [k for k, _ in views]
        self.v_buffer = [v for _, v in views]

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        memory, layout = self.runtime.memory, self.runtime.memory.layout
        self.mem_usage = memory.pages.num_pages * layout.page_bytes / (1 << 30)
        logger.info(
            "KV memory: %d tokens in pages of %d (%.1f MiB, %.1f %% padding), %.2f GiB if all were backed; "
            "%d segments of %d tokens",
            num_tokens,
            layout.page_tokens,
            layout.page_bytes / (1 << 20),
            100 * layout.waste,
            self.mem_usage,
            memory.segments.num_segments,
            memory.segments.max_pages * layout.page_tokens,
        )

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        keys, values = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        if loc.is_cuda:
            store_kv(cache_k, cache_v, keys, values, loc)
        else:
            keys[loc] = cache_k
            values[loc] = cache_v

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[tgt_loc] = buffer[src_loc]

    def get_contiguous_buf_infos(self) -> NoReturn:
        raise NotImplementedError("a token-major KV cache has no contiguous run of one layer to transfer")

    def set_kv_buffer_prefix_valid(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("speculative decoding is refused with --kv-backend vtensor")
