"""SGLang 0.5.23."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_vtensor.patches.common import Patch
from sglang_vtensor.patches.seams import CONFIGURATOR, SCHEDULER, SERVER_ARGS, Seam
from sglang_vtensor.patches.v0_5_23 import graphs
from sglang_vtensor.patches.v0_5_23.requests import Requests

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.server_args import ServerArgs

    from sglang_vtensor.srt.options import Options, Refusal

_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
#: Who declares a setting, for SGLang's account of where each comes from.
_SOURCE = "sglang-vtensor"
#: Our tree among SGLang's.
TREE = "vtensor"
#: Marks settings that a command line made.
_COMMAND_LINE = "vtensor_command_line"


def _tell_tokens(original: Callable[..., Any], configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """Where layers see a window, there may be more tokens than there is memory for in all layers."""
    import msgspec

    result = original(configurator, *args, **kwargs)
    return msgspec.structs.replace(result, max_total_num_tokens=result.token_to_kv_pool_allocator.size)


def _refuse_beams(coordinator: Any, req: Req, recv_req: Any) -> str:
    """Beams copy rows of slots among requests that the memory does not know."""
    return (
        "beam search (beam_width above 1) is not supported with --kv-backend vtensor: beams share pages behind the "
        "tree's back. Leave beam_width out, or run the server with --kv-backend default."
    )


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
    serves_states = True

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
            ("bounded replay of sliding windows", swa_replay, "there are no pages of sliding windows"),
            ("--enable-nvidia-megakernel", args.enable_nvidia_megakernel, "it reads another layout of the pool"),
            ("--kv-canary", args.kv_canary not in (None, "none"), "it reads another layout of the pool"),
            (
                "SGLANG_RUST_SERVER",
                envs.SGLANG_RUST_SERVER.get(),
                NO_ROUTES,
            ),
        ]

    def window_ratio(self, server_args: ServerArgs) -> float | None:
        ratio: float | None = server_args.swa_full_tokens_ratio  # what the user gave, and no default
        return ratio

    def layers_with_states(self, model: Any) -> Collection[int]:
        from sglang_vtensor.patches.v0_5_23.states import layers_with_states

        return layers_with_states(model)

    def states(self, configurator: Any, req_to_token_pool: Any) -> dict[str, Any]:
        from sglang_vtensor.patches.v0_5_23.states import layout, slots_a_request

        state = layout(configurator)
        if state is None:
            return {}
        slots = req_to_token_pool.mamba_pool.size
        return {"state": state, "state_slots": slots, "slots_a_request": slots_a_request()}

    def build_pool(self, configurator: Any, *, sizes: Any, req_to_token_pool: Any, **more: Any) -> Any:
        from sglang_vtensor.patches.v0_5_23.states import attach

        pool = super().build_pool(configurator, sizes=sizes, req_to_token_pool=req_to_token_pool, **more)
        if pool.state is not None:
            attach(pool, req_to_token_pool)
        return pool

    def tree_class(self) -> type:
        from sglang_vtensor.patches.v0_5_23.tree import Tree

        return Tree

    def allocator_class(self) -> type:
        from sglang_vtensor.patches.v0_5_23.admission import Allocator

        return Allocator

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
        from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
        from sglang.srt.mem_cache.registry import register_radix_cache_backend

        from sglang_vtensor.patches.v0_5_23.states import StatePool
        from sglang_vtensor.srt.allocation import alloc_for_decode

        register_radix_cache_backend(TREE, self.build_tree)
        HybridReqToTokenPool.mamba_pool_cls = StatePool
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

        from sglang_vtensor.srt.attention_choice import choose_decode

        page_size = self.page_size(server_args)
        if page_size is None:
            previous(server_args)
            return
        declare_resolution(server_args, _SOURCE, page_size=page_size, radix_cache_backend=TREE)
        if self.layers_with_states(self.model(server_args)):
            self._settle_states(server_args, page_size)
        if self.model(server_args).is_hybrid_swa:
            # Windows are our own matter: SGLang sees one pool for all tokens of all layers, as it does with Gemma 3 by
            # itself, and its layers see their windows as ever. So slots, admission and the tree are those of a model
            # without windows. The configuration that it made before says otherwise, and is made again.
            declare_resolution(server_args, _SOURCE, disable_hybrid_swa_memory=True)
            vars(server_args).pop("_model_config", None)
        if chosen := choose_decode(self.settings(server_args), self.model(server_args)):
            declare_resolution(server_args, _SOURCE, **chosen)
        with _known_to_gpt_oss():
            previous(server_args)

    def _settle_states(self, server_args: ServerArgs, page_size: int) -> None:
        from sglang.srt.arg_groups.overrides import declare_resolution

        from sglang_vtensor.patches.v0_5_23.states import refuse_dtype
        from sglang_vtensor.srt.state_models import STRATEGY, chunk_tokens, track_interval

        settings, model = self.settings(server_args), self.model(server_args)
        if settings.linear_attn_decode_backend is None:
            # Behind this step SGLang may choose one that `refuse_states` refuses: on sm_100, for states of bfloat16.
            declare_resolution(server_args, _SOURCE, linear_attn_decode_backend="triton")
        if settings.disable_radix_cache:
            return
        refuse_dtype(model)
        interval = track_interval(settings.mamba_track_interval, page_size, chunk_tokens(model.hf_config))
        declare_resolution(server_args, _SOURCE, mamba_radix_cache_strategy=STRATEGY, mamba_track_interval=interval)

    def everywhere(self) -> list[Seam]:
        return [*super().everywhere(), Seam(f"{SERVER_ARGS}.resolve_once", self._resolve_once)]

    def in_schedulers(self) -> list[Seam]:
        from sglang_vtensor.patches.v0_5_23.admission import Adder, retract_decode
        from sglang_vtensor.patches.v0_5_23.states import count_slots
        from sglang_vtensor.srt import scheduling

        beams = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
        return [
            *super().in_schedulers(),
            Seam(f"{CONFIGURATOR}.configure", _tell_tokens),
            Seam(f"{CONFIGURATOR}._handle_max_mamba_cache", count_slots, HookType.REPLACE),
            Seam("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", retract_decode),
            Seam(beams, _refuse_beams, HookType.REPLACE),
            Seam(f"{SCHEDULER}.get_prefill_adder_class", lambda _: Adder, HookType.REPLACE),
            Seam(f"{SCHEDULER}._record_scheduler_state_for_paused_engine", scheduling.while_paused, HookType.AFTER),
        ]

    def for_shared_decode(self) -> list[Seam]:
        return [
            *super().for_shared_decode(),
            Seam(f"{_GRAPHS}._capture_one_stream", graphs.have_variants, HookType.BEFORE),
            Seam(f"{_GRAPHS}.capture_one_shape", graphs.capture_one_shape),
        ]


PATCH = Patch0523()
