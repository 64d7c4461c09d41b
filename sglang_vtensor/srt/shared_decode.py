"""Shared decode on an NVIDIA GPU: around the decode backend that SGLang chose, which does the batches for which reading
a shared prefix once does not pay.

Both kinds of batch are captured in CUDA graphs: under SGLang's own keys, and under keys with a label of ours. What a
graph reads of who shares what is on the device, and is told of before it is replayed.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_vtensor.kernels.compiling import Compiling, launches
from sglang_vtensor.kernels.configs import capability, shared_decode
from sglang_vtensor.kernels.launch import DIMS
from sglang_vtensor.kernels.shared_decode import SharedDecoder
from sglang_vtensor.srt.attention_cuda import kinds_of_layers
from sglang_vtensor.srt.batch_sharing import BatchSharing
from sglang_vtensor.srt.runtime import Runtime
from sglang_vtensor.srt.windows import window_of

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

#: Larger batches are done by SGLang's own decode. Partial results of so many requests take 180 MiB with Llama-3-8B's
#: heads, and less where a server runs fewer.
MAX_REQUESTS = 2048


class SharedDecodeBackend(AttentionBackend):
    """The decode half of SGLang's hybrid attention backend, around the one that it chose."""

    def __init__(self, runner: ModelRunner, inner: AttentionBackend) -> None:
        super().__init__()
        self.inner = inner
        self.needs_cpu_seq_lens = inner.needs_cpu_seq_lens
        self.pool = runner.token_to_kv_pool
        self.table: torch.Tensor = runner.req_to_token_pool.req_to_token
        self.runtime: Runtime = self.pool.runtime
        memory = self.runtime.memory
        q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        slots = self.runtime.request_slots
        self.decoder = SharedDecoder(
            max_requests=min(slots - 1, MAX_REQUESTS),  # one slot is padding's
            slots=slots,
            page_tokens=memory.layout.page_tokens,
            max_tokens=self.table.shape[1],
            q_heads=q_heads,
            kv_heads=memory.layout.kv_heads,
            head_dim=memory.layout.head_dim,
            device=memory.vmm.device,
            kv_dtype=memory.layout.dtype,
        )
        #: By window: layers that see one have a plan of their own.
        self.decoders = {
            window: self.decoder if window is None else self.decoder.for_window(window)
            for window in self.pool.sides.windows
        }
        self.sharing = self.runtime.sharing = BatchSharing(
            self.runtime,
            requests=self.decoder.max_requests,
            group=self.decoder.group,
            token_bytes=memory.layout.kv_bytes // memory.layout.layers,
            capability=capability(memory.vmm.device),
            kv_dtype=memory.layout.dtype,
            head_dim=memory.layout.head_dim,
        )
        wanted = {
            window: launches(
                [
                    partial(
                        decoder.rehearse,
                        self.table,
                        *memory.layer_views(0, side),
                        q_dtype=runner.dtype,
                        kinds=kinds_of_layers(runner, window),
                    )
                ]
            )
            for side, (window, decoder) in enumerate(self.decoders.items())
        }
        compiling = Compiling("shared decode", wanted, device=memory.vmm.device)
        self.runtime.compiling.append(compiling)
        compiling.wait()  # its graphs are captured next
        #: Set while the graphs of shared batches are captured.
        self.capturing = False
        #: Whether the batch at hand is done here.
        self.shared = False
        self._told = -1  # the state of the sharing that was looked at last: the device has it, if it fits
        self._fits = False
        self._decided_for, self._decided = -1, False

    @classmethod
    def around(cls, runner: ModelRunner, inner: AttentionBackend) -> AttentionBackend:
        """Around `inner`, or that itself, and a line in the log that says why."""
        dim = runner.model_config.head_dim
        if dim not in DIMS:
            logger.warning(
                "shared decode is off: it takes head dimensions %s, and this model's is %d; decode reads a shared "
                "prefix once a request",
                ", ".join(map(str, DIMS)),
                dim,
            )
            return inner
        memory = runner.token_to_kv_pool.runtime.memory
        layout, sm = memory.layout, capability(memory.vmm.device)
        group = runner.model_config.num_attention_heads // get_parallel().attn_tp_size // layout.kv_heads
        if group > (most := shared_decode(dim, sm, layout.dtype).block_m):
            logger.warning(
                "shared decode is off: it takes up to %d query heads a KV head, and this model has %d; decode reads a "
                "shared prefix once a request",
                most,
                group,
            )
            return inner
        return cls(runner, inner)

    # Outside of the graph is what may differ from batch to batch, and what is read of the table of slots: SGLang writes
    # to that once the graph is launched. Inside is the plan, which is made on the device.

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        requests = forward_batch.batch_size
        self.shared = forward_batch.forward_mode.is_decode() and (
            self.capturing and self.has_room_for(requests) if in_capture else self.decide(forward_batch, requests)
        )
        if self.shared:
            self.decoder.find_pages(self.table, forward_batch.req_pool_indices, forward_batch.seq_lens)
        else:
            self.inner.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        if self.shared:
            for decoder in self.decoders.values():
                decoder.plan(forward_batch.req_pool_indices, forward_batch.seq_lens)
        else:
            self.inner.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.shared = self.decide(forward_batch, forward_batch.batch_size)
        if self.shared:
            self.decoder.find_pages(self.table, forward_batch.req_pool_indices, forward_batch.seq_lens)
            self.init_forward_metadata_in_graph(forward_batch)
        else:
            self.inner.init_forward_metadata(forward_batch)

    def has_room_for(self, requests: int) -> bool:
        """Whether a batch of so many requests, padding included, can be done here."""
        return requests <= self.decoder.max_requests

    def decide(self, forward_batch: ForwardBatch, requests: int) -> bool:
        """Whether the batch at hand is done here, of so many requests, padding included. However often it is asked, the
        answer for one batch is one."""
        if not forward_batch.forward_mode.is_decode():
            return False
        if self._decided_for != self.sharing.batches:
            self._decided_for, self._decided = self.sharing.batches, self._tell(requests)
        return self._decided

    def _tell(self, requests: int) -> bool:
        """Whether the batch is to be done here. If so, the device knows who shares what in it; it is told on the stream
        that the batch runs on, behind the batch before."""
        sharing = self.sharing.sharing
        shared = self.sharing.pays and self.has_room_for(requests)
        if shared and self._told != sharing.changes:
            self._told = sharing.changes
            self._fits = self.decoder.fits(sharing.tables)
            if self._fits:
                self.decoder.update(sharing.tables)
        shared = shared and self._fits
        self.sharing.count(shared)
        return shared

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        if not self.shared:
            if sinks is not None:
                extra["sinks"] = sinks
            return self.inner.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **extra)
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale)
        result = self.decoders[window_of(layer)](
            q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim),
            *self.pool.views[layer.layer_id - self.pool.start_layer],
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            sinks=sinks,
            scales=self.pool.scales(layer, q.dtype),
        )
        return result.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # All else is the inner backend's.

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.forward_extend(*args, **kwargs)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.inner.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.inner.get_cuda_graph_seq_len_fill_value()

    def on_after_cuda_graph_warmup(self) -> None:
        self.inner.on_after_cuda_graph_warmup()

    def support_triton(self) -> bool:
        return self.inner.support_triton()

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
