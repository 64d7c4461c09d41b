"""What the modules of all versions have in common: where SGLang is hooked, and what it finds there.

A version's module has a `Patch` of its own: where SGLang is hooked, how its settings and its requests are read, and the
classes that have the names which it calls.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_vtensor.patches.seams import CONFIGURATOR, SCHEDULER, SERVER_ARGS, Seam, hook

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_vtensor.arrival import Arrival
    from sglang_vtensor.srt.options import Options, Refusal
    from sglang_vtensor.srt.requests import Requests

logger = logging.getLogger(__name__)

#: SGLang's rows of slots have room for so many tokens more than a context.
_EXTRA_TOKENS = 4
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_TOKENIZER_MODULE = "sglang.srt.managers.tokenizer_manager"
_TOKENIZER = f"{_TOKENIZER_MODULE}.TokenizerManager"


class Patch(abc.ABC):
    """One version of SGLang.

    `register` runs in every process that loads plugins and adds the options, nothing else. `install` runs in a
    scheduler process whose server asked for `--kv-backend vtensor`, before its scheduler is built, and replaces the KV
    memory.
    """

    #: How requests are kept.
    requests: Requests
    #: Whether models are served that have linear attention.
    serves_states = False
    #: Whether this process serves the page (`srt.page`).
    serves_page = False
    #: Of a scheduler that is coming up beside other servers.
    arrival: Arrival | None = None

    # Where SGLang is hooked: what is so in all versions; each adds what is so in it alone.

    def everywhere(self) -> list[Seam]:
        """In every process that loads plugins."""
        scheduler = "sglang.srt.managers.scheduler.configure_scheduler_process"
        return [
            Seam(f"{SERVER_ARGS}.add_cli_args", self.add_cli_args),
            Seam(f"{SERVER_ARGS}.from_cli_args", self.from_cli_args),
            Seam(f"{SERVER_ARGS}.check_server_args", self.serve, HookType.AFTER),
            Seam(scheduler, self.configure_scheduler, HookType.BEFORE),
            Seam("sglang.srt.utils.auth.decide_request_auth", self.decide_request_auth),
        ]

    def in_schedulers(self) -> list[Seam]:
        """In a scheduler with `--kv-backend vtensor`. Other processes import nothing of what is called there."""
        from sglang_vtensor.srt import allocation, occupation, scheduling

        return [
            Seam(f"{CONFIGURATOR}._profile_available_bytes", self.without_padding),
            Seam(f"{CONFIGURATOR}._build_token_to_kv_pool", self.build_pool, HookType.REPLACE),
            Seam(f"{CONFIGURATOR}._build_token_to_kv_pool_allocator", self.build_allocator, HookType.REPLACE),
            Seam("sglang.srt.mem_cache.allocation.alloc_for_extend", allocation.alloc_for_extend, HookType.REPLACE),
            Seam("sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs", self.init_graphs),
            Seam(f"{SCHEDULER}.__init__", self.init_scheduler, HookType.AFTER),
            Seam(f"{SCHEDULER}._get_new_batch_prefill_raw", scheduling.get_new_batch_prefill),
            Seam(f"{SCHEDULER}.run_batch", scheduling.run_batch),
            Seam(f"{SCHEDULER}.on_idle", scheduling.on_idle),
            Seam(f"{SCHEDULER}.maybe_sleep_on_idle", scheduling.sleep_on_idle),
            Seam(f"{SCHEDULER}.get_internal_state", scheduling.add_internal_state, HookType.AFTER),
            Seam(f"{SCHEDULER}.set_internal_state", scheduling.set_internal_state),
            Seam(f"{_WEIGHTS}.release_memory_occupation", occupation.release_memory),
            Seam(f"{_WEIGHTS}.resume_memory_occupation", occupation.resume_memory),
        ]

    def for_shared_decode(self) -> list[Seam]:
        """And where decode may read what requests share once."""
        return [Seam("sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend.__init__", self.init_hybrid)]

    def in_servers(self) -> list[Seam]:
        """Where the HTTP server or the engine of such a scheduler is."""
        from sglang_vtensor.srt.occupation import tell_refusal
        from sglang_vtensor.srt.page import take_maps

        return [
            Seam(f"{_TOKENIZER}.get_internal_state", take_maps),
            Seam(f"{_TOKENIZER}.release_memory_occupation", tell_refusal),
            Seam(f"{_TOKENIZER}.resume_memory_occupation", tell_refusal),
        ]

    def on_the_host(self) -> list[Seam]:
        """And without a GPU."""
        return []

    # How its settings are read.

    @abc.abstractmethod
    def settings(self, server_args: ServerArgs) -> Any:
        """SGLang's arguments by name, as resolved so far."""

    @abc.abstractmethod
    def model(self, server_args: ServerArgs) -> Any:
        """SGLang's `ModelConfig`."""

    @abc.abstractmethod
    def uses_mla(self, server_args: ServerArgs) -> bool:
        """Whether the model has multi-head latent attention."""

    @abc.abstractmethod
    def attn_tp_size(self, server_args: ServerArgs) -> int:
        """How many ranks share the KV heads."""

    @abc.abstractmethod
    def refused(self, server_args: ServerArgs) -> list[Refusal]:
        """What this version has, and others have not, that we do not support."""

    # Its classes.

    @abc.abstractmethod
    def tree_class(self) -> type:
        """Of `PagedRadixCache`."""

    @abc.abstractmethod
    def allocator_class(self) -> type:
        """Of `VTensorAllocator`."""

    def register(self) -> None:
        """Add the options. A server that does not use them runs SGLang's own code, unpatched."""
        hook(self.everywhere())

    def install(self, server_args: ServerArgs) -> None:
        """Replace the KV memory of the scheduler that this process is about to build."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from sglang_vtensor.srt.attention_choice import wants_shared_decode
        from sglang_vtensor.srt.options import ATTENTION_BACKEND, Options

        settings = self.settings(server_args)
        hook(self.in_schedulers())
        states = bool(self.layers_with_states(self.model(server_args)))
        if wants_shared_decode(settings, Options.of(server_args), states=states):
            hook(self.for_shared_decode())
        if settings.device == "cpu":
            hook(self.on_the_host())
        HookRegistry.apply_hooks()
        register_attention_backend(ATTENTION_BACKEND)(self.build_attention)

    # The options.

    def add_cli_args(self, original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
        from sglang.srt import server_args

        from sglang_vtensor.srt import options

        if options.ATTENTION_BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
            server_args.add_attention_backend_choices([options.ATTENTION_BACKEND])
        original(parser)
        options.add_arguments(parser)

    @abc.abstractmethod
    def from_cli_args(self, original: Callable[..., ServerArgs], cls: type, args: argparse.Namespace) -> ServerArgs:
        """A `ServerArgs` by a command line, our options among it."""

    @staticmethod
    @contextlib.contextmanager
    def one_line() -> Iterator[None]:
        """For a command: what is refused meanwhile ends it with one line, where Python gets the exception."""
        from sglang_vtensor.srt.options import Refused
        from sglang_vtensor.vmm import Unsupported

        try:
            yield
        except (Refused, Unsupported) as error:
            raise SystemExit(f"error: {error}") from None

    @staticmethod
    def take_options(kwargs: dict[str, Any]) -> Options | None:
        """Take our options from arguments that are meant for `ServerArgs`; None where there are none."""
        from sglang_vtensor.srt.options import Options

        given = {name: kwargs.pop(name) for name in Options.names() if name in kwargs}
        return Options.given(given) if given else None

    def page_size(self, server_args: ServerArgs) -> int | None:
        """Before SGLang adjusts anything to the model: refuse what cannot be served, and settle the page size. None
        without the option."""
        from sglang_vtensor.srt.options import Options
        from sglang_vtensor.srt.pages import settle_page_size

        options = Options.of(server_args)
        if not options.ours:
            return None
        model = self.model(server_args)
        return settle_page_size(
            self.settings(server_args),
            model,
            options,
            uses_mla=self.uses_mla(server_args),
            attn_tp_size=self.attn_tp_size(server_args),
            without=self.layers_with_states(model),
            serves_states=self.serves_states,
            more=self.refused(server_args),
        )

    def serve(self, _: None, server_args: ServerArgs) -> None:
        """In the process of the HTTP server, or of an engine, which has no application."""
        from sglang_vtensor.srt.options import Options

        if not Options.of(server_args).ours:
            return
        if _TOKENIZER_MODULE in sys.modules:
            hook(self.in_servers())
            HookRegistry.apply_hooks()
        server = sys.modules.get("sglang.srt.entrypoints.http_server")
        if server is None:
            return
        settings = self.settings(server_args)
        workers = settings.tokenizer_worker_num
        if workers > 1:
            logger.warning(
                "--tokenizer-worker-num %d: GET /vtensor and POST /vtensor/limit, /vtensor/sleep and /vtensor/wake are "
                "not there, as SGLang loads no plugin in its HTTP workers. Leave it out to have them.",
                workers,
            )
            return
        from sglang_vtensor.srt.http import add_routes

        # The module knows its state only when it is told, behind this.
        add_routes(server.app, _ServerState(server), keyed=bool(settings.api_key or settings.admin_api_key))
        self.serves_page = True

    def decide_request_auth(self, original: Callable[..., Any], *, method: str, path: str, **more: Any) -> Any:
        """The page is there without a key: a browser sends none before the page can ask for one. It holds no data, and
        what it then asks the server for needs the key."""
        from sglang.srt.utils.auth import AuthDecision

        if self.serves_page and method == "GET" and path == "/vtensor":
            return AuthDecision(allowed=True)
        return original(method=method, path=path, **more)

    def configure_scheduler(self, server_args: ServerArgs, gpu_id: int, *_: Any, **__: Any) -> None:
        from sglang_vtensor.srt.arriving import arrive
        from sglang_vtensor.srt.options import Options

        if Options.of(server_args).ours:
            self.arrival = arrive(self.settings(server_args), gpu_id)
            self.install(server_args)

    # The memory.

    def sides(self, configurator: Any) -> Any:
        from sglang_vtensor.srt.pages import sides_for

        settings = self.settings(configurator.server_args)
        return sides_for(
            settings,
            self.model(configurator.server_args),
            device=configurator.device,
            page_tokens=settings.page_size,
            attn_tp_size=self.attn_tp_size(configurator.server_args),
            without=self.layers_with_states(self.model(configurator.server_args)),
        )

    def layers_with_states(self, model: Any) -> Collection[int]:
        """Layers that keep a state and no K and V, by number."""
        return ()

    def without_padding(self, original: Callable[..., int], configurator: Any, pre_model_load_memory: float) -> int:
        """The bytes that SGLang divides by a token's bytes: with what other servers' KV caches hold for now, less what
        padding takes, and the padding page."""
        sides = self.sides(configurator)
        static = self.settings(configurator.server_args).mem_fraction_static
        if self.arrival is not None and static < 1:
            # SGLang refuses to start if nothing is left, so it is told before: what is to stay free of the memory that
            # there was before the weights, in GiB, is then less by so much.
            pre_model_load_memory -= static / (1 - static) * self.arrival.others_hold() / (1 << 30)
        return int((original(configurator, pre_model_load_memory) - sides.page_bytes) * (1 - sides.waste))

    def build_pool(self, configurator: Any, *, sizes: Any, req_to_token_pool: Any, **_: Any) -> Any:
        from sglang_vtensor.srt.kv_pool import VTensorKVPool, complete_scales
        from sglang_vtensor.srt.options import Options, Refused

        sides = self.sides(configurator)
        dtype = sides.layouts[0].dtype
        if configurator.kv_cache_dtype != dtype:  # SGLang knows it when the weights are there
            raise Refused(
                f"SGLang made this checkpoint's KV cache one of {configurator.kv_cache_dtype} as it read the weights, "
                f"and pages were chosen for {dtype} before: give --kv-cache-dtype with a type, or run with "
                "--kv-backend default"
            )
        complete_scales(configurator.model, configurator.device)
        states = self.states(configurator, req_to_token_pool)
        return VTensorKVPool(
            sizes.max_total_num_tokens,
            sides=sides,
            options=Options.of(configurator.server_args),
            device=configurator.device,
            max_running=req_to_token_pool.req_to_token.shape[0] - 1,
            max_tokens=req_to_token_pool.req_to_token.shape[1] - _EXTRA_TOKENS,
            start_layer=configurator.layer_info.start_layer,
            end_layer=configurator.layer_info.end_layer,
            sglang=self.requests,
            chunk=self.chunk(configurator.server_args),
            window_ratio=self.window_ratio(configurator.server_args),
            **states,
        )

    def states(self, configurator: Any, req_to_token_pool: Any) -> dict[str, Any]:
        """What the pool is to know of the states of requests, where the model has any."""
        return {}

    def chunk(self, server_args: ServerArgs) -> int | None:
        """How many tokens of a request an extend batch computes at most; None: all of them."""
        size = self.settings(server_args).chunked_prefill_size
        return size if size and size > 0 else None

    def window_ratio(self, server_args: ServerArgs) -> float | None:
        """Up to how many times as many tokens as others see, the memory of windows may hold; None: no bound is set."""
        return None

    def build_allocator(self, _: Any, *, sizes: Any, token_to_kv_pool: Any, **__: Any) -> Any:
        ends = token_to_kv_pool.runtime.ends is not None
        size = token_to_kv_pool.tokens if ends else sizes.max_total_num_tokens
        return self.allocator_class()(size, token_to_kv_pool)

    def build_tree(self, context: Any) -> Any:
        return self.tree_class()(context.params)

    # Attention.

    def build_attention(self, runner: Any) -> Any:
        from sglang_vtensor.srt.windows import hold_to

        pool = runner.token_to_kv_pool
        hold_to(pool.sides.windows, pool.sides.layers, runner.model)
        if runner.device == "cpu":
            from sglang_vtensor.srt.attention_host import HostAttentionBackend

            return HostAttentionBackend(runner)
        from sglang_vtensor.srt.attention_cuda import PrefillBackend

        return PrefillBackend.choose(runner)

    @staticmethod
    def init_graphs(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
        with runner.token_to_kv_pool.runtime.memory.paused():
            original(runner, *args, **kwargs)

    @staticmethod
    def init_hybrid(
        original: Callable[..., None], hybrid: Any, model_runner: Any, prefill_backend: Any, decode_backend: Any
    ) -> None:
        from sglang_vtensor.srt.attention_cuda import PrefillBackend
        from sglang_vtensor.srt.shared_decode import SharedDecodeBackend

        if isinstance(prefill_backend, PrefillBackend):
            decode_backend = SharedDecodeBackend.around(model_runner, decode_backend)
        original(hybrid, model_runner, prefill_backend, decode_backend)

    # The scheduler.

    def init_scheduler(self, _: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        from sglang_vtensor.srt.options import Options
        from sglang_vtensor.srt.scheduling import equip

        settings: Any = self.settings(scheduler.server_args)
        name = str(settings.served_model_name) if settings.enable_metrics else None
        # SGLang loads no plugin in its HTTP workers.
        tells_refusals = settings.tokenizer_worker_num == 1
        equip(scheduler, Options.of(scheduler.server_args), name, tells_refusals=tells_refusals)
        if self.arrival is not None:
            self.arrival.over()
            self.arrival = None


def shared_decode(runner: Any) -> Any:
    """The decode backend of a graph runner, if it is ours."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    from sglang_vtensor.srt.shared_decode import SharedDecodeBackend

    hybrid = runner.attn_backend
    backend = hybrid.decode_backend if isinstance(hybrid, HybridAttnBackend) else None
    return backend if isinstance(backend, SharedDecodeBackend) else None


class _ServerState:
    """SGLang's tokenizer manager, as its HTTP server has it when a request comes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    @property
    def tokenizer_manager(self) -> Any:
        return self._server._global_state.tokenizer_manager
