"""SGLang 0.5.17.

`register` runs in every process that loads plugins and adds the options, nothing else. `install` runs in a scheduler
process whose server asked for `--kv-backend vtensor`, before its scheduler is built, and replaces the KV memory.
The tables of what is hooked where stand at the end.
"""

from __future__ import annotations

import argparse
import contextvars
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_vtensor.patches.common import Seam, hook

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_vtensor.srt.options import Options
    from sglang_vtensor.srt.runtime import Runtime

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
#: How many shared prefixes `sglang-vtensor top` is told of.
_SHOWN_PREFIXES = 5
#: SGLang leaves room for so many tokens more than a context's.
_EXTRA_TOKENS = 4
#: Options parsed by argparse, on their way to the `ServerArgs` that is made of them.
_parsed: contextvars.ContextVar[Any] = contextvars.ContextVar("vtensor_options", default=None)


def register() -> None:
    """Add the options. A server that does not use them runs SGLang's own code, unpatched."""
    hook(EVERYWHERE)


# The option.


def _add_cli_args(original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    from sglang.srt import server_args

    from sglang_vtensor.srt import options

    if options.ATTENTION_BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([options.ATTENTION_BACKEND])
    original(parser)
    options.add_arguments(parser)


def _from_cli_args(original: Callable[..., ServerArgs], cls: type, args: argparse.Namespace) -> ServerArgs:
    """For a command: what is refused ends it with one line, where Python gets the exception."""
    from sglang_vtensor.srt.options import Options, Refused
    from sglang_vtensor.vmm import Unsupported

    token = _parsed.set(None)
    try:
        _parsed.set(Options.parsed(args))
        return original(cls, args)
    except (Refused, Unsupported) as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        _parsed.reset(token)


def _init_server_args(original: Callable[..., None], self: ServerArgs, *args: Any, **kwargs: Any) -> None:
    from sglang_vtensor.srt.options import ATTENTION_BACKEND, Options, Refused

    given = {name: kwargs.pop(name) for name in Options.names() if name in kwargs}
    options = Options.given(given) if given else _parsed.get() or Options()
    options.attach(self)
    if options.ours:
        _choose_attention(kwargs, options)
    elif kwargs.get("attention_backend") == ATTENTION_BACKEND:
        raise Refused("--attention-backend vtensor reads segments: use it with --kv-backend vtensor")
    original(self, *args, **kwargs)


def _choose_attention(kwargs: dict[str, Any], given: Options) -> None:
    """Segments, unless the user chose a backend by name, or deterministic inference. Raises `Refused` for what cannot
    run here.

    On the host one backend does both halves; on a GPU segments are for extend, and decode is SGLang's own choice.
    """
    import torch
    from sglang.srt.platforms import current_platform

    from sglang_vtensor.srt import options

    prefill_kernel = given.vtensor_prefill_kernel
    host = current_platform.device_name == "cpu" and current_platform.is_out_of_tree()
    if not host and not torch.cuda.is_available():
        raise options.Refused(
            "--kv-backend vtensor found no NVIDIA GPU. To run without one, on host memory, set "
            "SGLANG_PLATFORM=vtensor_host"
        )
    if host and prefill_kernel != "auto":
        raise options.Refused(
            f"--vtensor-prefill-kernel {prefill_kernel} needs an NVIDIA GPU: on host memory torch's own operators read "
            "the segments. Leave it out"
        )
    allowed = options.HOST_ATTENTION_BACKENDS if host else options.CUDA_ATTENTION_BACKENDS
    named = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    for option in named:
        value = kwargs.get(option)
        segments_prefill = option == "prefill_attention_backend" and value == options.ATTENTION_BACKEND
        if value is not None and value not in allowed and not segments_prefill:
            raise options.Refused(
                f"--{option.replace('_', '-')} {value} does not run on {'host memory' if host else 'strided K and V'}: "
                f"use {' or '.join(allowed)}, or leave it out"
            )
    deterministic = [
        option for option in ("enable_deterministic_inference", "rl_on_policy_target") if kwargs.get(option)
    ]
    if deterministic:
        _refuse_parking(given)
        ours_named = kwargs.get("prefill_attention_backend") == options.ATTENTION_BACKEND
        _leave_to_sglang(f"--{deterministic[0].replace('_', '-')}", given, host=host, ours_named=ours_named)
        return
    if any(kwargs.get(option) is not None for option in named):
        if options.ATTENTION_BACKEND not in [kwargs.get(option) for option in named]:
            _refuse_parking(given)
        if prefill_kernel != "auto" and kwargs.get("prefill_attention_backend") != options.ATTENTION_BACKEND:
            raise options.Refused(
                f"--vtensor-prefill-kernel {prefill_kernel} reads segments, and an attention backend was named that "
                "does not: leave one of the two out"
            )
        return
    if host:
        kwargs["attention_backend"] = options.ATTENTION_BACKEND
    elif prefill_kernel == "fa3" and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        raise options.Refused(
            f"--vtensor-prefill-kernel fa3 needs sm_90 (Hopper), and this GPU is sm_{major}{minor}: use triton, or auto"
        )
    else:
        kwargs["prefill_attention_backend"] = options.ATTENTION_BACKEND


def _refuse_parking(given: Options) -> None:
    """Where attention reads by slot, no segment waits for the turn that continues it."""
    from sglang_vtensor.srt.options import Refused

    if given.vtensor_max_parked is not None:
        raise Refused(
            f"--vtensor-max-parked {given.vtensor_max_parked} is about segments, and attention reads none here: leave "
            "it out, or the attention backend"
        )


def _leave_to_sglang(option: str, given: Options, *, host: bool, ours_named: bool) -> None:
    """Deterministic inference wants sums whose order does not depend on the batch: SGLang's own kernels can do that, by
    slot. Ours divide the work by what is in the batch. Raises `Refused` where ours were asked for, or are all there is.
    """
    from sglang_vtensor.srt.options import Options, Refused

    if host:
        raise Refused(
            f"--kv-backend vtensor does not support {option} on host memory: SGLang has no deterministic attention "
            "there. Leave it out, or run on a GPU"
        )
    if ours_named or given.vtensor_prefill_kernel != Options.vtensor_prefill_kernel:
        named = "--prefill-attention-backend vtensor" if ours_named else "--vtensor-prefill-kernel"
        raise Refused(f"{named} is not deterministic, and {option} is given: leave one of the two out")
    logger.warning(
        "%s: attention is SGLang's own, by slot, and shared decode is off, as their sums depend on what else is in a "
        "batch. Reuse and memory are as without it.",
        option,
    )


def _choose_page_size(self: ServerArgs) -> None:
    """Before SGLang adjusts anything to the model: refuse what cannot be served, and settle the page size."""
    from sglang.srt.utils import get_device_memory_capacity

    from sglang_vtensor.srt.options import Options, choose_page_size, refuse_unsupported

    if not Options.of(self).ours:
        return
    refuse_unsupported(self)
    device_mib = get_device_memory_capacity(self.device)
    if device_mib is not None:
        Options.of(self).check_device(int(device_mib) << 20)
    self.page_size = choose_page_size(self)


def _add_routes(_: None, self: ServerArgs) -> None:
    """In the process of the HTTP server; an engine without one has no application."""
    from sglang_vtensor.srt.options import Options

    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None or not Options.of(self).ours:
        return
    if self.tokenizer_worker_num > 1:
        logger.warning(
            "--tokenizer-worker-num %d: POST /vtensor/limit, /vtensor/sleep and /vtensor/wake are not there, as SGLang "
            "loads no plugin in its HTTP workers. Leave it out to have them.",
            self.tokenizer_worker_num,
        )
        return
    from sglang_vtensor.srt.http import add_routes

    # The module knows its state only when it is told, behind this.
    add_routes(server.app, _ServerState(server))


class _ServerState:
    """SGLang's tokenizer manager, as its HTTP server has it when a request comes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    @property
    def tokenizer_manager(self) -> Any:
        return self._server._global_state.tokenizer_manager


# The scheduler process.


def _configure_scheduler(server_args: ServerArgs, *_: Any, **__: Any) -> None:
    from sglang_vtensor.srt.options import Options

    if Options.of(server_args).ours:
        install(server_args)


def install(server_args: ServerArgs) -> None:
    """Replace the KV memory of the scheduler that this process is about to build."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_vtensor.srt.options import ATTENTION_BACKEND

    hook(in_schedulers())
    if _wants_shared_decode(server_args):
        hook(FOR_SHARED_DECODE)
    if server_args.device == "cpu":
        hook(ON_THE_HOST)
    HookRegistry.apply_hooks()
    register_attention_backend(ATTENTION_BACKEND)(_build_attention)


def _layout(configurator: Any) -> Any:
    from sglang_vtensor.srt.options import layout_for

    return layout_for(
        configurator.server_args, device=configurator.device, page_tokens=configurator.server_args.page_size
    )


def _without_padding(original: Callable[..., int], self: Any, *args: Any, **kwargs: Any) -> int:
    """The bytes that SGLang divides by a token's bytes: less what padding takes, and the padding page."""
    layout = _layout(self)
    return int((original(self, *args, **kwargs) - layout.page_bytes) * (1 - layout.waste))


def _limit_requests(original: Callable[..., int], self: Any, *args: Any, **kwargs: Any) -> int:
    """Every running request has a segment, and addresses are many but not endless."""
    from sglang_vtensor.manager import most_running

    wanted = original(self, *args, **kwargs)
    most = most_running(_layout(self), self.model_config.context_len + _EXTRA_TOKENS)
    if wanted > most:
        logger.warning(
            "up to %d requests run at a time instead of %d, as each may need contiguous addresses for %d tokens; "
            "a lower --context-length allows more",
            most,
            wanted,
            self.model_config.context_len,
        )
    return min(wanted, most)


def _build_pool(self: Any, *, sizes: Any, req_to_token_pool: Any, **_: Any) -> Any:
    from sglang_vtensor.srt.kv_pool import VTensorKVPool
    from sglang_vtensor.srt.options import NO_FP8, Options, Refused

    layout = _layout(self)
    if self.kv_cache_dtype != layout.dtype:  # SGLang knows it when the weights are there
        raise Refused(
            f"this checkpoint asks for a KV cache of {self.kv_cache_dtype}, and {NO_FP8}, here {layout.dtype}: give "
            "--kv-cache-dtype bfloat16, or run with --kv-backend default"
        )
    return VTensorKVPool(
        sizes.max_total_num_tokens,
        layout=layout,
        options=Options.of(self.server_args),
        device=self.device,
        max_running=req_to_token_pool.req_to_token.shape[0] - 1,
        max_tokens=req_to_token_pool.req_to_token.shape[1],
        start_layer=self.layer_info.start_layer,
        end_layer=self.layer_info.end_layer,
    )


def _build_allocator(self: Any, *, sizes: Any, token_to_kv_pool: Any, **_: Any) -> Any:
    from sglang_vtensor.srt.allocator import VTensorAllocator

    return VTensorAllocator(sizes.max_total_num_tokens, token_to_kv_pool)


def _build_tree(context: Any) -> Any:
    from sglang_vtensor.srt.radix_cache import VTensorChunkCache, VTensorRadixCache

    if context.disable_radix_cache:
        return VTensorChunkCache(context.params)
    return VTensorRadixCache(context.params)


def _build_attention(runner: Any) -> Any:
    if runner.device == "cpu":
        from sglang_vtensor.srt.attention_host import HostAttentionBackend

        return HostAttentionBackend(runner)
    from sglang_vtensor.srt.attention_cuda import SegmentPrefillBackend

    runner.token_to_kv_pool.runtime.use_device_table()
    return SegmentPrefillBackend.choose(runner)


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """SGLang's small indexing kernels have torch twins for backends that run without Triton."""
    from sglang_vtensor.srt.options import ATTENTION_BACKEND

    return backend != ATTENTION_BACKEND and original(backend)


def _init_graphs(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    with self.token_to_kv_pool.runtime.memory.paused():
        original(self, *args, **kwargs)


# Decode: batches that share are done by a backend around SGLang's own, and have graphs of their own.


def _wants_shared_decode(server_args: ServerArgs) -> bool:
    from sglang_vtensor.srt.options import ATTENTION_BACKEND, Options

    # On the host, which is not for speed, nothing is lost.
    if Options.of(server_args).vtensor_shared_decode == "off" or server_args.device == "cpu":
        return False
    if server_args.enable_deterministic_inference:
        return False  # `_leave_to_sglang` said so
    if server_args.prefill_attention_backend != ATTENTION_BACKEND:
        logger.warning(
            "Shared decode is off, as an attention backend was named: each request reads its whole context. Leave the "
            "attention backend out, or give --vtensor-shared-decode off."
        )
        return False
    return True


def _init_hybrid(
    original: Callable[..., None], self: Any, model_runner: Any, prefill_backend: Any, decode_backend: Any
) -> None:
    from sglang_vtensor.srt.attention_cuda import SegmentPrefillBackend
    from sglang_vtensor.srt.shared_decode import SharedDecodeBackend

    if isinstance(prefill_backend, SegmentPrefillBackend):
        decode_backend = SharedDecodeBackend.around(model_runner, decode_backend)
    original(self, model_runner, prefill_backend, decode_backend)


def _shared_decode(runner: Any) -> Any:
    """The decode backend of a graph runner, if it is ours."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    from sglang_vtensor.srt.shared_decode import SharedDecodeBackend

    hybrid = runner.attn_backend
    backend = hybrid.decode_backend if isinstance(hybrid, HybridAttnBackend) else None
    return backend if isinstance(backend, SharedDecodeBackend) else None


def _capture_both(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Each size twice: for SGLang's own decode, and for shared decode where that has room for so many requests."""
    original(self, *args, **kwargs)
    backend = _shared_decode(self)
    if backend is not None:
        sizes = self.capture_bs
        self.capture_bs = [size for size in sizes if backend.has_room_for(size)]
        backend.capturing = True
        try:
            original(self, *args, **kwargs)
        finally:
            backend.capturing = False
            self.capture_bs = sizes


def _label_graph_key(
    original: Callable[..., Any], self: Any, size: int, stream_idx: int | None = None, variant_label: str | None = None
) -> Any:
    """The key says by which decode the batch at hand is done; its metadata was made before."""
    from sglang_vtensor.srt.shared_decode import VARIANT

    backend = _shared_decode(self)
    if backend is not None and backend.shared:
        variant_label = f"{variant_label}-{VARIANT}" if variant_label else VARIANT
    return original(self, size, stream_idx, variant_label)


# The device gives less than the pool's size promised: admission goes down, batches wait, requests are retracted.


def _init_adder(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Admission counts without the memory that the driver refuses."""
    original(self, *args, **kwargs)
    missing = self.token_to_kv_pool_allocator.runtime.missing_tokens()
    self.rem_total_token_offset += missing
    self.cur_rem_token_offset += missing


def _add_one_req(original: Callable[..., Any], self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """A request whose prefix is being computed for another one is passed over: the next batch finds it in the tree."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    # If others were preempted for it, it is to run now.
    may_wait = not self.preempt_list and self.budget_state() is AddReqResult.CONTINUE
    if may_wait and self.tree_cache.awaits(req, self.can_run_list):
        return AddReqResult.CONTINUE
    return original(self, req, *args, **kwargs)


def _update_prefill_budget(
    original: Callable[..., None], self: Any, prefix_len: int, extend_input_len: int, *args: Any, **kwargs: Any
) -> None:
    """An extend batch may have as many tokens as it may have, not as many pages: what its requests leave free in their
    last pages is memory, but no work. With pages of 128 tokens, prompts of 1,025 made batches a tenth too short."""
    original(self, prefix_len, extend_input_len, *args, **kwargs)
    last = self.can_run_list[-1]
    if self.dllm_config is not None or last is self.new_chunked_req:
        return  # one request of a batch may be cut: what is counted of it leaves no room for another
    free = self.ceil_paged_tokens(extend_input_len) - last.extend_range.length
    self.rem_input_tokens += free
    self.log_input_tokens -= free
    if self.rem_chunk_tokens is not None:
        self.rem_chunk_tokens += free


def _get_new_batch_prefill(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """An extend batch for which there is no memory waits, and the running batch decodes meanwhile."""
    from sglang_vtensor.srt.allocation import PutOff

    running_batch, elastic = kwargs["running_batch"], self.vtensor_elastic
    elastic.tick(self.waiting_queue)
    elastic.refuse_too_long(self.waiting_queue, self.ipc_channels.send_to_tokenizer.send_output)
    if elastic.sleeping:
        # Not by a token, as an idle server that is awake answers them, but as a busy one does.
        self.return_health_check_ipcs.extend(elastic.take_health_checks(self.waiting_queue))
        # Grammars are compiled meanwhile: SGLang takes those that are done, or failed, as it makes an extend batch.
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        elastic.answer_failed(self.waiting_queue, self.ipc_channels.send_to_tokenizer.send_output)
    chunked, last = self.chunked_req, self.last_batch
    busy = chunked is not None or not running_batch.is_empty()
    offered, beyond = elastic.offers(self.waiting_queue, busy=busy)
    if elastic.sleeping and not offered and chunked is None:
        return None, running_batch
    if running_batch.is_empty():
        running_batch.batch_is_full = False  # no request will end that would set it back
    # For `awaits`. The last batch is in flight, unless its results are in the tree already: then none awaits them.
    self.tree_cache.computing = list(last.reqs) if last is not None and last.forward_mode.is_extend() else []
    if chunked is not None:
        self.tree_cache.computing.append(chunked)

    def admit(offered: list[Any], beyond: bool) -> Any:
        waiting, self.waiting_queue = self.waiting_queue, offered
        grammars = self.grammar_manager.grammar_queue
        if offered is not waiting:
            self.grammar_manager.grammar_queue = []  # none is ready yet: it would begin with what is offered
        try:
            with elastic.beyond_the_limit(beyond):
                return original(self, *args, **kwargs)
        except PutOff as put_off:
            _put_off(self, put_off.reqs, chunked, alone=running_batch.is_empty())
            return None
        finally:
            if offered is not waiting:
                self.grammar_manager.grammar_queue = grammars
                others = set(offered)
                self.waiting_queue = self.waiting_queue + [req for req in waiting if req not in others]

    result = admit(offered, beyond)
    if result is not None and result[0] is None and elastic.bars(self.waiting_queue, busy=busy):
        running_batch.batch_is_full = False
        result = admit(self.waiting_queue[:1], True)
    if _runtime(self).extend_reads_segments:
        self.tree_cache.prepare(self.waiting_queue)  # the batch was made: what waits has time until the next
    return result or (None, running_batch)


def _put_off(self: Any, reqs: list[Any], chunked: Any, alone: bool) -> None:
    """Undo the admission of `reqs`; `chunked` is the one among them that has its first chunks already, if any.

    That one keeps its pages, unless it is `alone`, with nothing running whose end would make room: then it gives them
    up and queues again, for what others can use and the tree keeps of it.
    """
    from sglang.srt.managers.schedule_batch import retract_all

    if self.chunked_req is not None:
        self.chunked_req.inflight_middle_chunks -= 1
    self.chunked_req = chunked
    waiting = [req for req in reqs if req is not chunked]
    for req in waiting:
        self.tree_cache.dec_lock_ref(req.last_node)
    self.waiting_queue = waiting + self.waiting_queue
    if chunked is None:
        return
    # No tokens in its range tell SGLang that there is no new chunk of it to be cached.
    chunked.set_extend_range(len(chunked.prefix_indices), len(chunked.prefix_indices))
    if alone and not chunked.inflight_middle_chunks:
        self.chunked_req = None
        retract_all(
            reqs=[chunked],
            server_args=self.server_args,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
        )
        self._add_request_to_queue(chunked, is_retracted=True)


def _retract_decode(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The last request, if it finds no page, is retracted too, and waits; it is aborted only where the pool, with
    nothing else in it, is too small for it."""
    retracted, ratio, aborted = original(self, *args, **kwargs)
    memory = self.token_to_kv_pool_allocator.runtime.memory
    for req in list(aborted):
        if memory.layout.pages_for(len(req.origin_input_ids) + len(req.output_ids)) <= memory.pages.limit:
            req.to_finish = None
            aborted.remove(req)
            retracted.append(req)
    return retracted, ratio, aborted


def _run_batch(original: Callable[..., Any], self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = _runtime(self)
    if runtime.copies:
        if self.device == "cpu":
            runtime.copy_partials()
        else:
            with self.device_module.stream(_forward_stream(self)):
                runtime.copy_partials()
    if runtime.sharing is not None and batch.forward_mode.is_decode():
        runtime.sharing.begin([req.req_pool_idx for req in batch.reqs], int(batch.seq_lens_cpu.sum()))
    result = original(self, batch, *args, **kwargs)
    if self.device == "cpu":
        runtime.memory.complete(runtime.memory.launch())  # the host computes in this very call: the batch is done
    else:
        runtime.launched(_forward_stream(self))
    _tell_metrics(self)
    return result


def _forward_stream(scheduler: Any) -> Any:
    """The stream that batches run on, one after another."""
    return scheduler.forward_stream if scheduler.enable_overlap else scheduler.device_module.current_stream()


def _on_idle(original: Callable[..., None], self: Any) -> None:
    self.vtensor_elastic.tick(self.waiting_queue)
    _runtime(self).idle()
    _tell_metrics(self)
    original(self)
    if self.waiting_queue and self.vtensor_elastic.asleep(self.waiting_queue):
        self.maybe_sleep_on_idle()  # SGLang takes a server for busy while requests wait


def _sleep_on_idle(original: Callable[..., None], self: Any) -> None:
    """With --sleep-on-idle the event loop sleeps until a message comes, a second at most; beside neighbours it looks
    for what they want as often as without."""
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    from sglang_vtensor.srt.elastic import LOOK_EVERY_SECONDS

    if isinstance(self.idle_sleeper, IdleSleeper) and self.vtensor_elastic.beside_others:
        self.idle_sleeper.poller.poll(1000 * LOOK_EVERY_SECONDS)
    else:
        original(self)


def _tell_metrics(scheduler: Any) -> None:
    if not scheduler.server_args.enable_metrics:
        return
    runtime = _runtime(scheduler)
    if runtime.metrics is None:
        from sglang_vtensor.srt.metrics import Metrics

        labels = {
            "model_name": str(scheduler.server_args.served_model_name),
            "tp_rank": str(scheduler.ps.tp_rank),
            "dp_rank": str(scheduler.ps.dp_rank or 0),
        }
        runtime.metrics = Metrics(labels, runtime.stats)
    runtime.metrics.update()


def _get_internal_state(result: Any, self: Any, *_: Any, **__: Any) -> Any:
    runtime = _runtime(self)
    free, total = runtime.memory.vmm.memory()
    result.internal_state["vtensor"] = runtime.stats() | {
        "dp_rank": self.ps.dp_rank or 0,
        "device_bytes": total,
        "device_free_bytes": free,
        "weights_bytes": int(self.tp_worker.model_runner.weight_load_mem_usage * (1 << 30)),
        "shared_prefixes": self.tree_cache.shared_prefixes(_SHOWN_PREFIXES),
        "live_tokens": _live_tokens(self),
        "reserve_bytes": runtime.memory.reserve_pages * runtime.memory.layout.page_bytes,
        "token_bytes": runtime.memory.layout.stride_bytes,
    }
    return result


def _live_tokens(scheduler: Any) -> int:
    """Tokens that requests hold and no node does."""
    reqs = {}
    for batch in (scheduler.running_batch, scheduler.last_batch):
        reqs.update({req.rid: req for req in (batch.reqs if batch is not None else [])})
    if scheduler.chunked_req is not None:
        reqs[scheduler.chunked_req.rid] = scheduler.chunked_req
    running = [req for req in reqs.values() if req.kv is not None and req.req_pool_idx is not None]
    return sum(req.kv.kv_allocated_len - req.cache_protected_len for req in running)


def _init_scheduler(_: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    from sglang_vtensor.srt.elastic import Elastic
    from sglang_vtensor.srt.options import Options

    options = Options.of(self.server_args)
    runtime = _runtime(self)
    self.vtensor_elastic = Elastic(
        runtime,
        self.tree_cache,
        cache_idle_seconds=options.vtensor_cache_idle_seconds,
        minimum_bytes=options.minimum_bytes(runtime.memory.pages.limit * runtime.memory.layout.page_bytes),
    )


def _set_internal_state(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    asked = recv_req.server_args
    ours = {key: value for key, value in asked.items() if key.startswith("vtensor_")}
    if not ours:
        return original(self, recv_req)
    return SetInternalStateReqOutput(updated=len(ours) == len(asked) and self.vtensor_elastic.control(ours))


def _runtime(scheduler: Any) -> Runtime:
    return scheduler.token_to_kv_pool_allocator.runtime


# The seams.

#: In every process that loads plugins.
EVERYWHERE = [
    Seam(f"{_SERVER_ARGS}.add_cli_args", _add_cli_args),
    Seam(f"{_SERVER_ARGS}.from_cli_args", _from_cli_args),
    Seam(f"{_SERVER_ARGS}.__init__", _init_server_args),
    Seam(f"{_SERVER_ARGS}._handle_model_specific_adjustments", _choose_page_size, HookType.BEFORE),
    Seam(f"{_SERVER_ARGS}.check_server_args", _add_routes, HookType.AFTER),
    Seam("sglang.srt.managers.scheduler.configure_scheduler_process", _configure_scheduler, HookType.BEFORE),
]

_ALLOCATION = "sglang.srt.mem_cache.allocation"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"


def in_schedulers() -> list[Seam]:
    """In a scheduler with `--kv-backend vtensor`. Other processes import nothing of what is called there."""
    from sglang_vtensor.srt import allocation

    return [
        Seam(f"{_CONFIGURATOR}._profile_available_bytes", _without_padding),
        Seam(f"{_CONFIGURATOR}.resolve_max_num_reqs", _limit_requests),
        Seam(f"{_CONFIGURATOR}._build_token_to_kv_pool", _build_pool, HookType.REPLACE),
        Seam(f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", _build_allocator, HookType.REPLACE),
        Seam(f"{_ALLOCATION}.alloc_for_extend", allocation.alloc_for_extend, HookType.REPLACE),
        Seam(f"{_ALLOCATION}.alloc_for_decode", allocation.alloc_for_decode, HookType.REPLACE),
        Seam(f"{_BATCH}.check_decode_mem", allocation.check_decode_mem, HookType.REPLACE),
        Seam(f"{_BATCH}.retract_decode", _retract_decode),
        Seam(f"{_ADDER}.__init__", _init_adder),
        Seam(f"{_ADDER}.add_one_req", _add_one_req),
        Seam(f"{_ADDER}._update_prefill_budget", _update_prefill_budget),
        Seam("sglang.srt.mem_cache.registry.default_radix_cache_factory", _build_tree, HookType.REPLACE),
        Seam("sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs", _init_graphs),
        Seam(f"{_SCHEDULER}.__init__", _init_scheduler, HookType.AFTER),
        Seam(f"{_SCHEDULER}._get_new_batch_prefill_raw", _get_new_batch_prefill),
        Seam(f"{_SCHEDULER}.run_batch", _run_batch),
        Seam(f"{_SCHEDULER}.on_idle", _on_idle),
        Seam(f"{_SCHEDULER}.maybe_sleep_on_idle", _sleep_on_idle),
        Seam(f"{_SCHEDULER}.get_internal_state", _get_internal_state, HookType.AFTER),
        Seam(f"{_SCHEDULER}.set_internal_state", _set_internal_state),
    ]


_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
#: And where decode may read what requests share once.
FOR_SHARED_DECODE = [
    Seam("sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend.__init__", _init_hybrid),
    Seam(f"{_GRAPHS}._capture_one_stream", _capture_both),
    Seam(f"{_GRAPHS}._make_graph_key", _label_graph_key),
]

#: And without a GPU.
ON_THE_HOST = [Seam("sglang.srt.utils.common.support_triton", _support_triton)]
