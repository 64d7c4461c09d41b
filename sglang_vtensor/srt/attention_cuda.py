"""Extend on an NVIDIA GPU: attention by our kernel, over the runs of each context, or by FlashAttention-3, over pages
of the same frames. Where both can be had, the measured table says which is the faster for a batch.

Our kernel reads a run as contiguous memory: `(first slot, tokens)`, one behind the other. FlashAttention-3 takes a
table of frames, which is SGLang's table of slots divided by the page; pages are whole tiles, so it reads within them.
Decode is in `shared_decode.py`, and where that does not pay SGLang's own, by slot.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_vtensor.kernels.compiling import Compiling, launches
from sglang_vtensor.kernels.configs import UNEVEN_FP8_DIMS, ours_before_fa3
from sglang_vtensor.kernels.launch import DIMS
from sglang_vtensor.kernels.prefix_prefill import Kind, Plan, plan_prefill, prefill_calls, prefix_prefill
from sglang_vtensor.srt.options import Options, Refused
from sglang_vtensor.srt.runtime import Runtime
from sglang_vtensor.srt.windows import window_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class PrefillBackend(AttentionBackend):
    """The prefill half of SGLang's hybrid attention backend: writes K and V by slot, and reads contexts."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        self.runtime: Runtime = self.pool.runtime
        self.page_tokens = self.runtime.page_tokens
        self.slots: torch.Tensor = runner.req_to_token_pool.req_to_token
        #: Of each side of the memory.
        self.windows: Sequence[int | None] = self.pool.sides.windows

    @classmethod
    def choose(cls, runner: ModelRunner) -> PrefillBackend:
        """The kernel that the user named; else ours, or the faster one where FlashAttention-3 runs too (sm_90)."""
        kernel = Options.of(runner.server_args).vtensor_prefill_kernel
        dtype = runner.token_to_kv_pool.dtype
        if kernel == "fa3" and dtype == torch.float8_e5m2:
            raise Refused("--vtensor-prefill-kernel fa3 reads FP8 as fp8_e4m3 only, not fp8_e5m2: use triton, or auto")
        fa3 = torch.cuda.get_device_capability(runner.device) == (9, 0) and dtype != torch.float8_e5m2
        ours = runner.model_config.head_dim in (UNEVEN_FP8_DIMS if dtype == torch.float8_e4m3fn else DIMS)
        if kernel == "fa3" or (kernel == "auto" and fa3 and not ours):
            return FlashAttention3(runner)
        return Fastest(runner) if kernel == "auto" and fa3 else TritonPrefill(runner)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale)
        heads, dim = layer.tp_q_head_num, layer.head_dim
        out = getattr(forward_batch, "_attn_output", None)
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        result = self.attend(
            q.contiguous().view(-1, heads, dim),
            keys,
            values,
            layer,
            sinks,
            None if out is None else out.view(-1, heads, layer.v_head_dim),
        )
        return result.view(-1, heads * layer.v_head_dim)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(rows, heads, dim)` of the batch that `init_forward_metadata` was told of, over one layer's slots."""
        raise NotImplementedError


@dataclass(slots=True)
class _Metadata:
    """Of one forward pass; int32 on the device."""

    #: By window: (requests, most pages). Behind a window stands the padding frame: what it reads there is not seen.
    frames: dict[int | None, torch.Tensor]
    contexts: torch.Tensor  # (requests,) tokens
    starts: torch.Tensor  # (requests + 1,) first row of each request's new tokens
    longest_new: int


class FlashAttention3(PrefillBackend):
    """SGLang's FlashAttention-3, over pages."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache
        self.metadata: _Metadata | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        longest = max(_contexts(forward_batch))
        frames = self.slots[forward_batch.req_pool_indices, : longest : self.page_tokens] // self.page_tokens
        self.metadata = _Metadata(
            frames={window: self._within(window, frames, forward_batch) for window in self.windows},
            contexts=forward_batch.seq_lens.to(torch.int32),
            starts=torch.nn.functional.pad(torch.cumsum(forward_batch.extend_seq_lens, 0, dtype=torch.int32), (1, 0)),
            longest_new=int(max(forward_batch.extend_seq_lens_cpu)),
        )

    def _within(self, window: int | None, frames: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """The frames that the batch's tokens see. A tile may begin before a window, where nothing has memory."""
        if window is None:
            return frames
        starts = forward_batch.seq_lens - forward_batch.extend_seq_lens
        first = (starts - window).clamp(min=0) // self.page_tokens
        at = torch.arange(frames.shape[1], device=frames.device)
        return frames.masked_fill(at[None, :] < first[:, None], 0)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        metadata, window = self.metadata, window_of(layer)
        assert metadata is not None
        extra: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
        if (scales := self.pool.scales(layer, q.dtype)) is not None:
            each = (len(metadata.contexts), keys.shape[1])
            extra |= {name: scale.expand(each) for name, scale in zip(("k_descale", "v_descale"), scales, strict=True)}
        return self._attend(
            q=q if q.dtype == keys.dtype else q.to(keys.dtype),  # both are of one type in its FP8 products
            k_cache=keys.unflatten(0, (-1, self.page_tokens)),
            v_cache=values.unflatten(0, (-1, self.page_tokens)),
            page_table=metadata.frames[window],
            cache_seqlens=metadata.contexts,
            cu_seqlens_q=metadata.starts,
            max_seqlen_q=metadata.longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window, 0),
            softcap=layer.logit_cap,
            out=out,
            **extra,
        )


class TritonPrefill(PrefillBackend):
    """Our prefix-prefill kernel. What it may need is compiled from here on. Where nothing else does prefill, that is
    waited for; else whoever calls looks whether the kernels of a batch are there (`ready`)."""

    def __init__(self, runner: ModelRunner, *, wait: bool = True) -> None:
        super().__init__(runner)
        self.kv_heads, self.head_dim = self.pool.views[0][0].shape[1:]
        if self.head_dim not in DIMS:
            raise Refused(
                f"the prefix-prefill kernel takes head dimensions {', '.join(map(str, DIMS))}, not this model's "
                f"{self.head_dim}: use --attention-backend flashinfer, which reads pages by slot"
            )
        self.q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        #: By window.
        self.plans: dict[int | None, Plan] = {}
        calls = {
            (window, config): some
            for side, window in enumerate(self.windows)
            for config, some in prefill_calls(
                *self.runtime.memory.layer_views(0, side),
                q_dtype=runner.dtype,
                q_heads=self.q_heads,
                max_tokens=self.slots.shape[1],
                page_tokens=self.page_tokens,
                window=window,
                kinds=kinds_of_layers(runner, window),
            ).items()
        }
        wanted = {key: launches(some) for key, some in calls.items()}
        self.compiling = Compiling("prefill kernels", wanted, device=self.slots.device)
        self.runtime.compiling.append(self.compiling)
        if wait:
            self.compiling.wait()
            for some in calls.values():
                for call in some:  # what this GPU cannot run is known now
                    call()
            torch.cuda.synchronize()

    def ready(self, window: int | None) -> bool:
        """Whether the batch that `init_forward_metadata` was told of compiles nothing in layers with that window."""
        plan = self.plans.get(window)
        return plan is not None and self.compiling.ready((window, plan.config))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        contexts = _contexts(forward_batch)
        slots = self.runtime.batch + [0] * (len(contexts) - len(self.runtime.batch))
        runs = [self.runtime.runs(slot, context) for slot, context in zip(slots, contexts, strict=True)]
        self.plans = {
            window: plan_prefill(
                forward_batch.extend_seq_lens_cpu,
                runs,
                q_heads=self.q_heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                device=self.slots.device,
                page_tokens=self.page_tokens,
                kv_dtype=self.pool.dtype,
                window=window,
            )
            for window in self.windows
        }

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        plan = self.plans[window_of(layer)]
        # A captured batch is padded: rows behind those of the plan belong to no request.
        rows = plan.rows
        out = torch.empty_like(q) if out is None else out
        prefix_prefill(
            q[:rows],
            keys,
            values,
            plan,
            scale=layer.scaling,
            out=out[:rows],
            soft_cap=layer.logit_cap,
            sinks=sinks,
            scales=self.pool.scales(layer, q.dtype),
        )
        return out


class Fastest(PrefillBackend):
    """FlashAttention-3 or our kernel, whichever is the faster for a batch by the measured table, for layers of each
    window. While our kernel is being compiled FlashAttention-3 does all batches, so the server answers before that is
    done."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.fa3 = FlashAttention3(runner)
        self.ours = TritonPrefill(runner, wait=False)
        self.chosen: dict[int | None, PrefillBackend] = {}
        self._said = False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        new, contexts, ours = forward_batch.extend_seq_lens_cpu, _contexts(forward_batch), self.ours
        shape = ours.q_heads, ours.kv_heads, ours.head_dim, str(self.slots.device), self.pool.dtype
        first = [window for window in self.windows if ours_before_fa3(new, contexts, *shape, window)]
        if first:
            ours.init_forward_metadata(forward_batch)
        taken = list(filter(ours.ready, first))
        if len(taken) < len(first):
            self._say_once()
        self.chosen = {window: ours if window in taken else self.fa3 for window in self.windows}
        if self.fa3 in self.chosen.values():
            self.fa3.init_forward_metadata(forward_batch)

    def _say_once(self) -> None:
        if not self._said:
            self._said = True
            logger.info(
                "prefill: FlashAttention-3 does a batch for which our kernel is faster, as %d of our kernels are not "
                "compiled yet; this line comes once",
                self.ours.compiling.left,
            )

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.chosen[window_of(layer)].attend(q, keys, values, layer, sinks, out)


def kinds_of_layers(runner: ModelRunner, window: int | None) -> Collection[Kind]:
    """A soft cap, scales and sinks of each kind of layer with that window: each kind is a kernel of its own."""
    pool, modules = runner.token_to_kv_pool, list(runner.model.modules())
    layers = [module for module in modules if isinstance(module, RadixAttention) and window_of(module) == window]
    every = [(float(layer.logit_cap), pool.scales(layer, runner.dtype)) for layer in layers]
    # A model gives them with each call. Where it has any, layers without are compiled for as well.
    sinks = next((m.sinks for m in modules if isinstance(getattr(m, "sinks", None), torch.Tensor)), None)
    kinds = {(cap > 0, scales is not None): (cap, scales) for cap, scales in every}.values()
    return [(*kind, some) for kind in kinds for some in ([None] if sinks is None else [None, sinks])]


def _contexts(forward_batch: ForwardBatch) -> list[int]:
    """Tokens of each request, the new ones included, as the host knows them."""
    prefixes, new = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    return [int(a) + int(b) for a, b in zip(prefixes, new, strict=True)]
