"""SGLang 0.5.23."""

from __future__ import annotations

import argparse
import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_vtensor.patches.common import SCHEDULER, SERVER_ARGS, Patch, Seam, shared_decode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.server_args import ServerArgs

    from sglang_vtensor.srt.options import Options, Refusal

_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
#: Who declares a setting, for SGLang's account of where each comes from.
_SOURCE = "sglang-vtensor"
#: Graphs of decode are captured once for SGLang's own attention and once for ours.
PLAIN, SHARED = "vtensor_plain", "vtensor_shared"
#: Our tree among SGLang's.
TREE = "vtensor"
#: Marks settings that a command line made.
_COMMAND_LINE = "vtensor_command_line"


class Requests:
    """What a request has, `req.kv` says; its row is there as long as it holds any."""

    def slot(self, req: Req) -> int:
        return req.kv.req_pool_idx

    def begun(self, req: Req) -> bool:
        return req.kv.holds_kv

    def prefix(self, req: Req) -> int:
        return req.prefix_len

    def allocated(self, req: Req) -> int:
        return req.kv.kv_allocated_len

    def committed(self, req: Req) -> int:
        return req.kv.kv_committed_len

    def own(self, req: Req) -> int:
        return req.kv.kv_allocated_len - req.kv.cache_protected_len

    def extended(self, req: Req, tokens: int) -> None:
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens

    def decoded(self, req: Req) -> None:
        req.kv.kv_allocated_len += 1
        req.kv.kv_committed_len += 1

    def nothing_new(self, req: Req) -> None:
        req.extend_end = req.prefix_len

    def release_match(self, tree: Any, req: Req) -> None:
        tree.unlock(req.lock)
        req.lock = None

    def retract(self, scheduler: Any, reqs: list[Req]) -> None:
        from sglang.srt.managers.schedule_batch import retract_all

        retract_all(
            reqs=reqs,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )

    def key(self, req: Req, tokens: Sequence[int]) -> RadixKey:
        return self.like(req, tokens)

    def like(self, key: Req | RadixKey, tokens: Sequence[int]) -> RadixKey:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens, key.extra_key, cache_salt=key.cache_salt)

    def namespace(self, owner: Req | RadixKey) -> str:
        return repr((owner.extra_key, owner.cache_salt or None))

    def idle(self, scheduler: Any) -> bool:
        return scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused)

    def ranks(self, scheduler: Any) -> tuple[int, int]:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_rank, get_parallel().dp_rank or 0


def _tree_class() -> type:
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from sglang_vtensor.srt.radix_cache import PagedInsertParams, PagedRadixCache

    class Tree(PagedRadixCache):
        @staticmethod
        def matched(result: MatchResult) -> int:
            return result.device_prefix_len

        @staticmethod
        def longer(result: MatchResult, tokens: int) -> MatchResult:
            matched = result.device_prefix_len
            return result._replace(device_prefix_len=matched + tokens, cache_protected_len=matched)

        def insertion(self, req: Req, key: RadixKey, value: Any, frames: list[int]) -> PagedInsertParams:
            inserted = req.kv.cache_inserted_len
            req.kv.cache_inserted_len = max(inserted, len(key))
            return PagedInsertParams(
                key=key, value=value, inserted_len=inserted, priority=req.priority or 0, frames=frames
            )

        def hold(self, req: Req, leaf: TreeNode, tokens: int) -> None:
            self.unlock(req.lock)
            req.lock = self.lock(leaf)
            req.last_node, req.kv.cache_protected_len = leaf, tokens

        def tell_removed(self, leaf: TreeNode) -> None:
            self.kv_events.record_remove(leaf)

        def checkpoint(self, req: Req, *, up_to: int) -> None:
            if not self.disable:
                self.advance(req, req.full_untruncated_fill_ids[:up_to], over=req.finished())

        def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
            """What a request has is freed by page, all of it in `on_release`: rows are not read back."""

        def on_release(self, req: Req, *, checkpointed: bool) -> None:
            self.end_request(req, req.owned_kv_len(), kept=checkpointed and not self.disable)

    return Tree


def _allocator_class() -> type:
    from sglang.srt.mem_cache.prefill_budget import PrefillBudget

    from sglang_vtensor.srt.allocation import secure_decode
    from sglang_vtensor.srt.allocator import VTensorAllocator

    class Allocator(VTensorAllocator):
        def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> PrefillBudget:
            """Admission counts without the memory that the driver refuses."""
            budget = PrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
            missing = self.runtime.missing_tokens()
            budget.total_offset += missing
            budget.current_offset += missing
            return budget

        def check_decode_capacity(
            self, *, num_tokens: int, tree_cache: Any, requests: list[Req] | None = None, spec_algorithm: Any = None
        ) -> bool:
            if requests is None:  # a question, not a batch
                return super().check_decode_capacity(num_tokens=num_tokens, tree_cache=tree_cache)
            return secure_decode(self.runtime, tree_cache, requests)

    return Allocator


def _prefill_adder_class(scheduler: Any) -> type:
    from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

    from sglang_vtensor.srt.scheduling import passes_over

    class Adder(PrefillAdder):
        """An extend batch may have as many tokens as it may have, not as many pages: what its requests leave free in
        their last pages is memory, but no work. With pages of 128 tokens, prompts of 1,025 made batches a tenth too
        short."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.exact_chunk_fill = self.dllm_config is None

        def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            if passes_over(self, req):
                return AddReqResult.CONTINUE
            return super().add_one_req(req, has_chunked_req, truncation_align_size)

    return Adder


def _retract_decode(original: Callable[..., Any], batch: Any) -> Any:
    from sglang_vtensor.srt.scheduling import spare

    retracted, ratio, aborted = original(batch)
    spare(batch.token_to_kv_pool_allocator.runtime, retracted, aborted, may_wait=lambda req: req.beam_group is None)
    return retracted, ratio, aborted


def _refuse_beams(coordinator: Any, req: Req, recv_req: Any) -> str:
    """Beams copy rows of slots among requests that the memory does not know."""
    return (
        "beam search (beam_width above 1) is not supported with --kv-backend vtensor: beams share pages behind the "
        "tree's back. Leave beam_width out, or run the server with --kv-backend default."
    )


# Decode: batches that share are done by a backend around SGLang's own, and have graphs of their own.


class _SharedGraphs:
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


def _have_variants(runner: Any, stream_idx: int | None = None) -> None:
    backend = shared_decode(runner)
    if backend is not None:
        runner.attention_graph_variants = _SharedGraphs(runner, backend)


def _capture_one_shape(
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


@contextlib.contextmanager
def _known_to_gpt_oss() -> Iterator[None]:
    """SGLang holds gpt-oss to a list of attention backends that know windows and sinks. Ours knows both, and is told
    meanwhile as one of that list: only to that check, as a hook would change the answer for whoever else asks."""
    from sglang.srt.arg_groups import model_hook

    from sglang_vtensor.srt.options import ATTENTION_BACKEND

    original = model_hook.attention_backends_of

    def told(settings: Any) -> tuple[str, ...]:
        return tuple("triton" if name == ATTENTION_BACKEND else name for name in original(settings))

    model_hook.attention_backends_of = told
    try:
        yield
    finally:
        model_hook.attention_backends_of = original


class Patch0523(Patch):
    requests = Requests()
    serves_windows = True

    def settings(self, server_args: ServerArgs) -> Any:
        from sglang.srt.arg_groups.overrides import resolving_view

        return resolving_view(server_args)

    def model(self, server_args: ServerArgs) -> Any:
        from sglang.srt.arg_groups.model_override_base import model_config_of

        return model_config_of(server_args)

    def uses_mla(self, server_args: ServerArgs) -> bool:
        from sglang.srt.arg_groups.model_override_base import use_mla_backend

        return use_mla_backend(server_args)

    def attn_tp_size(self, server_args: ServerArgs) -> int:
        settings = self.settings(server_args)
        return settings.tp_size // settings.attn_dp_size

    def refused(self, server_args: ServerArgs) -> list[Refusal]:
        from sglang.srt.environ import envs

        from sglang_vtensor.srt.options import NO_ROUTES

        args = self.settings(server_args)
        swa_replay = args.enable_encoder_swa_bounded_replay or args.enable_decoder_swa_bounded_replay
        backup = args.disaggregation_decode_retraction_backup
        return [
            (
                "--attn-dp-size above 1",
                args.attn_dp_size > 1,
                "beside a rank that prefills, SGLang runs decode batches as prefill, and of those nothing is mapped",
            ),
            ("--enable-kv-cache-sharding", args.enable_kv_cache_sharding, "a context would be spread over ranks"),
            (
                "--enable-unified-cache-external-linker",
                args.enable_unified_cache_external_linker,
                "it needs SGLang's unified tree",
            ),
            ("--radix-eviction-policy tlru", args.radix_eviction_policy == "tlru", "it needs SGLang's unified tree"),
            ("--enable-pd-role-switch", args.enable_pd_role_switch, "pages are not registered for transfer"),
            (
                f"--disaggregation-decode-retraction-backup {backup}",
                backup == "host_pool",
                "pages have no copy on the host",
            ),
            (
                "--swa-full-tokens-ratio",
                args.swa_full_tokens_ratio is not None,
                "memory goes to each kind of layers as it is needed, and no share of it is set apart",
            ),
            ("bounded replay of sliding windows", swa_replay, "there are no pages of sliding windows"),
            ("--enable-nvidia-megakernel", args.enable_nvidia_megakernel, "it reads another layout of the pool"),
            ("--kv-canary", args.kv_canary not in (None, "none"), "it reads another layout of the pool"),
            (
                "SGLANG_RUST_SERVER",
                envs.SGLANG_RUST_SERVER.get(),
                NO_ROUTES,
            ),
        ]

    def tree_class(self) -> type:
        return _tree_class()

    def allocator_class(self) -> type:
        return _allocator_class()

    # The settings are a sealed record, which no hook on its construction reaches. Until it is resolved its fields may
    # be set.

    def register(self) -> None:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
        from sglang.srt.entrypoints.engine import Engine

        super().register()
        register_resolution_hook("handle_model_specific_adjustments")(self._settle)
        Engine.server_args_class = staticmethod(self.make)

    def install(self, server_args: ServerArgs) -> None:
        from sglang.srt.mem_cache.allocation import ALLOC_FOR_DECODE_FUNCS
        from sglang.srt.mem_cache.registry import register_radix_cache_backend

        from sglang_vtensor.srt.allocation import alloc_for_decode

        register_radix_cache_backend(TREE, self.build_tree)
        for device in ("cuda", "cpu"):
            ALLOC_FOR_DECODE_FUNCS[device] = alloc_for_decode
        super().install(server_args)

    def make(self, **given: Any) -> ServerArgs:
        """A `ServerArgs` by what a program gave, our options among it."""
        from sglang.srt.server_args import ServerArgs

        from sglang_vtensor.srt.options import Options

        options = self.take_options(given) or Options()
        return self._with(ServerArgs(**given), options)

    def from_cli_args(self, original: Callable[..., ServerArgs], cls: type, args: argparse.Namespace) -> ServerArgs:
        from sglang_vtensor.srt.options import Options

        with self.one_line():
            server_args = self._with(original(cls, args), Options.parsed(args))
        vars(server_args)[_COMMAND_LINE] = True
        return server_args

    @staticmethod
    def _with(server_args: ServerArgs, options: Options) -> ServerArgs:
        """The options, and the attention that they ask for, are in the settings from now on."""
        from sglang_vtensor.srt.attention_choice import DETERMINISTIC, NAMES, choose_attention

        given = {name: getattr(server_args, name) for name in (*NAMES, *DETERMINISTIC)}
        for name, value in choose_attention(given, options).items():
            setattr(server_args, name, value)
        options.attach(server_args)
        return server_args

    def _resolve_once(self, original: Callable[..., None], server_args: ServerArgs) -> None:
        """What a command line asked for is refused here, too."""
        with self.one_line() if _COMMAND_LINE in vars(server_args) else contextlib.nullcontext():
            original(server_args)

    def _settle(self, server_args: ServerArgs, previous: Callable[..., None]) -> None:
        """Before SGLang adjusts anything to the model."""
        from sglang.srt.arg_groups.overrides import declare_resolution

        page_size = self.page_size(server_args)
        if page_size is None:
            previous(server_args)
            return
        declare_resolution(server_args, _SOURCE, page_size=page_size, radix_cache_backend=TREE)
        if self.model(server_args).is_hybrid_swa:
            # Windows are our own matter: SGLang sees one pool for all tokens of all layers, as it does with Gemma 3 by
            # itself, and its layers see their windows as ever. So slots, admission and the tree are those of a model
            # without windows. The configuration that it made before says otherwise, and is made again.
            declare_resolution(server_args, _SOURCE, disable_hybrid_swa_memory=True)
            vars(server_args).pop("_model_config", None)
        with _known_to_gpt_oss():
            previous(server_args)

    def everywhere(self) -> list[Seam]:
        return [*super().everywhere(), Seam(f"{SERVER_ARGS}.resolve_once", self._resolve_once)]

    def in_schedulers(self) -> list[Seam]:
        beams = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
        return [
            *super().in_schedulers(),
            Seam("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", _retract_decode),
            Seam(beams, _refuse_beams, HookType.REPLACE),
            Seam(f"{SCHEDULER}.get_prefill_adder_class", _prefill_adder_class, HookType.REPLACE),
        ]

    def for_shared_decode(self) -> list[Seam]:
        return [
            *super().for_shared_decode(),
            Seam(f"{_GRAPHS}._capture_one_stream", _have_variants, HookType.BEFORE),
            Seam(f"{_GRAPHS}.capture_one_shape", _capture_one_shape),
        ]


PATCH = Patch0523()
