"""SGLang's KV pool over the frames: its K and V buffers are strided views, by slot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_vtensor.kernels.kv_store import store_kv
from sglang_vtensor.kernels.launch import Scales
from sglang_vtensor.memory import KVMemory
from sglang_vtensor.srt.admission import longest
from sglang_vtensor.srt.options import Options, Refused
from sglang_vtensor.srt.runtime import Runtime
from sglang_vtensor.srt.sides import Sides
from sglang_vtensor.srt.window_side import SIDE, pages_within
from sglang_vtensor.vmm import open_vmm

if TYPE_CHECKING:
    from sglang_vtensor.srt.requests import Requests
    from sglang_vtensor.states import StateLayout

logger = logging.getLogger(__name__)


#: A tile of a kernel on a GPU begins up to so many tokens before the window of its first query: FlashAttention-3 takes
#: up to 224 keys at a time, over FP8, and its tiles begin at multiples of that.
BEFORE_WINDOW = 223


class VTensorKVPool(MHATokenToKVPool):
    """A pool with the memory of `capacity` tokens in all layers that holds none until frames are handed out. Where
    layers see a window, contexts of more tokens share it (`tokens`): the window side has memory for windows only, and
    for no more than `window_ratio` times as many tokens as the other one, if that is given. Where requests have states,
    as `state` says, these come out of the same memory: `slots_a_request` for each, and `state_slots` at most.

    `views[layer]` are K and V, `(slots, kv_heads, head_dim)` views of all frames, of which there are many more than the
    capacity; reading or writing a slot without memory is a fault, as it would be past the end of a tensor. `k_buffer`
    and `v_buffer` are the same in the type that SGLang stores them as: FP8 as bytes. `size`, which SGLang checks slots
    against, is that of the frames.
    """

    def __init__(
        self,
        capacity: int,
        *,
        sides: Sides,
        options: Options,
        device: str,
        max_running: int,
        max_tokens: int,
        start_layer: int,
        end_layer: int,
        sglang: Requests,
        chunk: int | None = None,
        window_ratio: float | None = None,
        state: StateLayout | None = None,
        state_slots: int = 0,
        slots_a_request: int = 0,
    ) -> None:
        # The base class creates the buffers in its constructor: what that needs comes first.
        self.sides, self.state, layout = sides, state, sides.layouts[0]
        capacity_pages = capacity // layout.page_tokens
        reserve_pages, idle_reserve_pages = options.reserve_pages(capacity_pages, sides.page_bytes)
        vmm = open_vmm(device)
        vmm.headroom_bytes = options.headroom_bytes(vmm.memory()[1])
        window = sides.windows[-1]
        reach = None if window is None else window + (BEFORE_WINDOW if torch.device(device).type == "cuda" else 0)
        most_frames, most_pages = _shares(sides, capacity_pages, reach, chunk, window_ratio)
        if state is not None:
            needed = (slots_a_request + 1) * state.page_bytes  # and the state that it goes on behind
            most_frames = (capacity_pages * sides.page_bytes - needed) // sides.page_bytes
            if most_frames < 1:
                raise Refused(
                    f"the KV cache has {capacity_pages * sides.page_bytes} bytes, and the states of one request take "
                    f"{needed}: raise --mem-fraction-static or --max-total-tokens"
                )
        self.runtime = Runtime(
            KVMemory(
                vmm,
                sides.layouts,
                capacity_pages=capacity_pages,
                max_tokens=max_tokens,
                most_frames=most_frames,
                most_pages=most_pages,
                state_bytes=0 if state is None else state.page_bytes,
                state_slots=state_slots,
                reserve_pages=reserve_pages,
                idle_reserve_pages=idle_reserve_pages,
                idle_seconds=options.vtensor_idle_seconds,
            ),
            max_running + 1,
            sglang,
            reach=reach,
            chunk=chunk,
        )
        super().__init__(
            (self.runtime.memory.placement.num_frames - 1) * layout.page_tokens,
            page_size=layout.page_tokens,
            dtype=layout.dtype,
            head_num=layout.kv_heads,
            head_dim=layout.head_dim,
            layer_num=len(sides.layers),
            device=device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
            kv_cache_layout="page_major",
        )

    @property
    def tokens(self) -> int:
        """How many tokens may be there at most: those of one context, with its window."""
        return self.runtime.memory.limit * self.runtime.page_tokens

    def _create_buffers(self) -> None:
        # SGLang counts buffers by layer. Those of a layer without K and V are never asked for.
        places = [place or (0, 0) for place in self.sides.layers]
        self.views = [self.runtime.memory.layer_views(number, side) for side, number in places]
        self.k_buffer = [k.view(self.store_dtype) for k, _ in self.views]
        self.v_buffer = [v.view(self.store_dtype) for _, v in self.views]

    def scales(self, layer: RadixAttention, computed: torch.dtype) -> Scales:
        """What keys and values of a layer, of type `computed`, are divided by as they are stored; None: by nothing.
        SGLang's `set_kv_buffer` divides whatever it converts, to FP8 or not."""
        if layer.k_scale is None or self.dtype == computed:
            return None
        return layer.k_scale, layer.v_scale

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        memory, layout = self.runtime.memory, self.runtime.memory.layout
        self.mem_usage = (memory.capacity + 1) * memory.page_bytes / (1 << 30)
        logger.info(
            "KV memory: %d tokens in pages of %d (%.1f MiB, %.1f %% padding), %.2f GiB if all were backed; "
            "addresses for %d tokens, in %d lanes",
            self.tokens,
            layout.page_tokens,
            memory.page_bytes / (1 << 20),
            100 * self.sides.waste,
            self.mem_usage,
            memory.placement.num_frames * layout.page_tokens,
            memory.placement.num_frames // memory.placement.lane_frames,
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


def complete_scales(model: torch.nn.Module, device: str) -> None:
    """Of --quantization-param-path a layer has numbers. Some kernels take tensors, others numbers of another name: give
    it both, as it has them of a checkpoint."""
    for layer in model.modules():
        if isinstance(layer, RadixAttention) and isinstance(layer.k_scale, (int, float)):
            layer.k_scale_float, layer.v_scale_float = layer.k_scale, layer.v_scale
            layer.k_scale, layer.v_scale = (
                torch.tensor(scale, dtype=torch.float32, device=device) for scale in (layer.k_scale, layer.v_scale)
            )


def _shares(
    sides: Sides, capacity_pages: int, reach: int | None, chunk: int | None, ratio: float | None
) -> tuple[int | None, dict[int, int]]:
    """How many frames may be owned where the second side, if there is one, has memory for windows only; and the bound
    that `ratio` sets on its pages. Raises `Refused` where that is less than what one request needs."""
    if reach is None:
        return None, {}
    page_bytes, window_bytes = (layout.page_bytes for layout in sides.layouts)
    nbytes = capacity_pages * sides.page_bytes
    most_frames = longest(nbytes, page_bytes, window_bytes, pages_within(reach, 1, sides.page_tokens))
    if ratio is None:
        return most_frames, {}
    most = int(nbytes * ratio / (page_bytes + ratio * window_bytes))
    least = pages_within(reach, chunk or 1, sides.page_tokens) + 1
    if most < least:
        raise Refused(
            f"--swa-full-tokens-ratio {ratio:g} bounds the memory of windows to {most} pages of {sides.page_tokens} "
            f"tokens, and one request needs {least}: give more, a smaller --chunked-prefill-size, or leave it out"
        )
    return most_frames, {SIDE: most}
