"""The options on SGLang's command line, and what they refuse."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import re
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

KV_BACKENDS = ("default", "vtensor")
ATTENTION_BACKEND = "vtensor"
#: Types of a KV cache by SGLang's names for them. Scales of FP8 are constants of a layer.
KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
#: Why another HTTP server is refused.
NO_ROUTES = "the routes under /vtensor, which limit memory and put the server to sleep, would be missing"
#: Attention backends that read K and V by slot, with any stride between tokens: they run on the identity region.
HOST_ATTENTION_BACKENDS = (ATTENTION_BACKEND, "torch_native")
CUDA_ATTENTION_BACKENDS = ("fa3", "triton", "flashinfer")
PREFILL_KERNELS = ("auto", "triton", "fa3")
SHARED_DECODE = ("auto", "off")

#: What is kept free and backed where no `--vtensor-reserve` is given: a share of the capacity, and when the server is
#: idle so many bytes, that a first prompt may begin in.
RESERVE, IDLE_RESERVE_BYTES = 0.02, 256 << 20

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << (10 * power) for power, unit in enumerate("kmgt", start=1)}
_UNITS |= {f"{unit}b": size for unit, size in _UNITS.items()} | {"b": 1}
#: No device has so much.
_MOST_BYTES = 1 << 60


class Refused(ValueError):
    """An option, or a model, that --kv-backend vtensor cannot serve. The message says why, and what to use instead."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for; carried on SGLang's `ServerArgs` as attributes of the same names."""

    kv_backend: str = "default"
    vtensor_reserve: str | float | None = None
    vtensor_idle_seconds: float = 3.0
    vtensor_cache_idle_seconds: float | None = None
    vtensor_headroom: str | float = "1GiB"
    vtensor_min: str | float = "0.05"
    vtensor_prefill_kernel: str = "auto"
    vtensor_shared_decode: str = "auto"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--kv-backend", self.kv_backend, KV_BACKENDS),
            ("--vtensor-prefill-kernel", self.vtensor_prefill_kernel, PREFILL_KERNELS),
            ("--vtensor-shared-decode", self.vtensor_shared_decode, SHARED_DECODE),
        ):
            if value not in choices:
                raise Refused(f"{option} {value!r} is unknown: choose from {', '.join(choices)}")
        self.reserve_pages(1, 1)
        parse_share_or_bytes(self.vtensor_headroom, "--vtensor-headroom")
        parse_share_or_bytes(self.vtensor_min, "--vtensor-min")
        idle, cache_idle = self.vtensor_idle_seconds, self.vtensor_cache_idle_seconds
        if not (_is_number(idle) and 0 <= idle < math.inf):
            raise Refused(f"--vtensor-idle-seconds {idle!r}: give 0 or more seconds, not endless ones")
        if cache_idle is not None and not (_is_number(cache_idle) and 0 < cache_idle < math.inf):
            raise Refused(
                f"--vtensor-cache-idle-seconds {cache_idle!r}: give more than 0 seconds; to cache nothing, "
                "--disable-radix-cache; to cache until memory is short, leave it out"
            )

    def minimum_bytes(self, capacity: int) -> int:
        """What the KV cache keeps of `capacity` bytes for itself."""
        given = parse_share_or_bytes(self.vtensor_min, "--vtensor-min")
        return int(given * capacity) if isinstance(given, float) else given

    def reserve_pages(self, capacity_pages: int, page_bytes: int) -> tuple[int, int]:
        """How many free pages are kept backed, of a cache of so many: while the server has requests, and when it is
        idle. Who gives a reserve has it all the time."""
        given = RESERVE if self.vtensor_reserve is None else self.vtensor_reserve
        size = parse_share_or_bytes(given, "--vtensor-reserve")
        pages = int(size * capacity_pages) if isinstance(size, float) else -(-size // page_bytes)
        return pages, pages if self.vtensor_reserve is not None else min(pages, -(-IDLE_RESERVE_BYTES // page_bytes))

    def check_device(self, device_bytes: int) -> None:
        """Raises `Refused` for more than a device of `device_bytes` has."""
        self.headroom_bytes(device_bytes)
        for option, value in (("--vtensor-reserve", self.vtensor_reserve or 0), ("--vtensor-min", self.vtensor_min)):
            size = parse_share_or_bytes(value, option)
            if isinstance(size, int) and size > device_bytes:
                raise Refused(
                    f"{option} {value} is more than a device of {device_bytes / (1 << 30):.1f} GiB has: give less"
                )

    def headroom_bytes(self, device_bytes: int) -> int:
        """What the KV cache leaves free of a device of `device_bytes`. Raises `Refused` if that is all of it."""
        given = parse_share_or_bytes(self.vtensor_headroom, "--vtensor-headroom")
        headroom = int(given * device_bytes) if isinstance(given, float) else given
        if headroom >= device_bytes:
            raise Refused(
                f"--vtensor-headroom {self.vtensor_headroom} leaves the KV cache nothing of a device of "
                f"{device_bytes / (1 << 30):.1f} GiB: give less, such as {Options.vtensor_headroom}"
            )
        return headroom

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def given(cls, named: dict[str, Any]) -> Options:
        """What a program gave, by name, and the defaults. Raises `Refused` for what does nothing without the backend;
        defaults may be given, as one who copies all arguments of a server does."""
        default = cls()
        return cls(**named)._needing_the_backend([n for n, value in named.items() if value != getattr(default, n)])

    @classmethod
    def parsed(cls, namespace: argparse.Namespace) -> Options:
        """What a user gave on a command line: what was not given is not in `namespace`. Raises `Refused` as `given`."""
        named = {name: value for name, value in vars(namespace).items() if name in cls.names()}
        return cls(**named)._needing_the_backend([name for name in named if name != "kv_backend"])

    def _needing_the_backend(self, names: Sequence[str]) -> Options:
        if names and not self.ours:
            option = f"--{names[0].replace('_', '-')}"
            value = getattr(self, names[0])
            raise Refused(f"{option} {value} needs --kv-backend vtensor: give that too, or leave {option} out")
        return self

    @property
    def ours(self) -> bool:
        return self.kv_backend == "vtensor"

    @classmethod
    def of(cls, carrier: Any) -> Options:
        """The options carried by a `ServerArgs`; the defaults where it carries none."""
        return cls(**{name: getattr(carrier, name) for name in cls.names() if hasattr(carrier, name)})

    def attach(self, server_args: ServerArgs) -> None:
        """They travel with it to other processes."""
        vars(server_args).update({name: getattr(self, name) for name in self.names()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to SGLang's parser."""
    group = parser.add_argument_group("sglang-vtensor")
    group.add_argument(
        "--kv-backend",
        choices=KV_BACKENDS,
        default=Options.kv_backend,
        help="Where the KV cache lives: SGLang's own preallocated buffers, or virtual tensors (sglang-vtensor).",
    )
    group.add_argument(
        "--vtensor-reserve",
        metavar="SHARE|BYTES",
        default=argparse.SUPPRESS,
        help="Free pages kept ready for what comes next, also when the server is idle: a share of the KV capacity such "
        "as 0.02 or 2%%, or bytes such as 512MiB. Without this, 2%%, and 256MiB when it is idle.",
    )
    group.add_argument(
        "--vtensor-idle-seconds",
        type=float,
        default=argparse.SUPPRESS,
        help="Free pages beyond the reserve go back to the driver when nobody needed them for this long.",
    )
    group.add_argument(
        "--vtensor-cache-idle-seconds",
        type=float,
        default=argparse.SUPPRESS,
        help="Cached prefixes that nobody read for this long are given up. Default: they stay until evicted.",
    )
    group.add_argument(
        "--vtensor-headroom",
        metavar="SHARE|BYTES",
        default=argparse.SUPPRESS,
        help="Device memory that the KV cache never takes, whatever its capacity: a share of the device's, or bytes. "
        "Activations live there when another process, or a large --mem-fraction-static, leaves little.",
    )
    group.add_argument(
        "--vtensor-min",
        metavar="SHARE|BYTES",
        default=argparse.SUPPRESS,
        help="What the KV cache keeps, idle or cached, when another vtensor server on this device runs short: a share "
        "of the KV capacity, or bytes.",
    )
    group.add_argument(
        "--vtensor-prefill-kernel",
        choices=PREFILL_KERNELS,
        default=argparse.SUPPRESS,
        help="The kernel for extend: FlashAttention-3 (Hopper), ours in Triton, or the faster one.",
    )
    group.add_argument(
        "--vtensor-shared-decode",
        choices=SHARED_DECODE,
        default=argparse.SUPPRESS,
        help="auto: decode steps whose requests share a prefix read it once where that is faster, on an NVIDIA GPU.",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_share_or_bytes(given: str | float, option: str) -> float | int:
    """A share (`0.02`, `"0.02"`, `"2%"`, `"all"`) as a float from 0 to 1, or a size (`"512MiB"`, `"2g"`) as an int.

    A number without a unit is a share, and 1 is all of it. A larger one is `Refused`: nobody can tell what was meant.
    """
    number, unit = _number_and_unit(given)
    seen = f"{option} {reprlib.repr(given)}"
    if unit == "" and 0 <= number <= 1:
        return float(number)
    if unit == "" and 1 < number < _MOST_BYTES:
        raise Refused(
            f"{seen} has no unit: did you mean {_meant(number)}? A number without one is a share, from 0 to 1"
        )
    if unit == "%" and number <= 100:
        return number / 100
    if unit in _UNITS and number * _UNITS[unit] < _MOST_BYTES:
        if unit == "b" and number != int(number):
            raise Refused(f"{seen} is no whole number of bytes")
        return round(number * _UNITS[unit])
    raise Refused(f"{seen}: give a share such as 0.02, 2% or all, or bytes such as 512MiB or 2GB")


def _number_and_unit(given: str | float) -> tuple[float, str]:
    """Both of what was given, the unit in lower case and "" where there is none; `(nan, "")` for what is no number."""
    if isinstance(given, str):
        text = given.strip().lower()
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|b|[kmgt]i?b?|)", text)
        if match is not None:
            return float(match[1]), match[2]
        return (100, "%") if text == "all" else (math.nan, "")
    return (given, "") if _is_number(given) else (math.nan, "")


def _meant(number: float) -> str:
    """What a number above 1 without a unit may have meant, in words that `parse_share_or_bytes` takes."""
    text = f"{number:.15g}"
    if number <= 100:
        return f"{text}GiB, or {text}%"
    return f"{text}MiB" if number < 10_000 else f"{number:.0f}B"


#: An option or a setting, whether it was given, and why it is refused.
Refusal = tuple[str, bool, str]


def has_states(model: Any) -> bool:
    """Whether layers of the model keep a state, by its configuration."""
    marks = ("mamba_d_state", "ssm_state_size", "linear_num_key_heads", "mamba2")
    return any(hasattr(model.hf_text_config, mark) for mark in marks)


def refuse_unsupported(
    args: Any,
    model: Any,
    options: Options,
    *,
    uses_mla: bool,
    serves_states: bool = False,
    more: Sequence[Refusal] = (),
) -> None:
    """Raise `Refused` for what would break, or be wrong, with this KV memory.

    `args` are SGLang's settings as resolved so far, `model` is its `ModelConfig`, and `more` is what its version has.
    Where a version `serves_states`, it looks at models with states itself.
    """
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import Backend

    def refuse(option: str, why: str, instead: str) -> None:
        raise Refused(f"--kv-backend vtensor does not support {option}: {why}. {instead}")

    without = "Leave it out, or run with --kv-backend default."
    flags: list[Refusal] = [
        ("--speculative-algorithm", args.speculative_algorithm is not None, "draft tokens are not yet mapped"),
        ("--disaggregation-mode", args.disaggregation_mode != "null", "pages are not registered for transfer"),
        ("--enable-hierarchical-cache", args.enable_hierarchical_cache, "pages have no copy on the host"),
        ("--hicache-storage-backend", args.hicache_storage_backend is not None, "pages have no copy on the host"),
        (
            "--cuda-graph-backend-prefill full",
            args.cuda_graph_config is not None and args.cuda_graph_config.prefill.backend == Backend.FULL,
            "what a prefill reads is told to its kernels outside of graphs",
        ),
        (
            "--grpc-mode",
            args.grpc_mode or args.smg_grpc_mode,
            NO_ROUTES,
        ),
        (
            "SGLANG_RADIX_FORCE_MISS",
            envs.SGLANG_RADIX_FORCE_MISS.get(),
            "it forgets what a match found and leaves the request what it found inside of a page",
        ),
        ("--enable-lmcache", args.enable_lmcache, "it brings a tree of its own"),
        ("--enable-flexkv", args.enable_flexkv, "it brings a tree of its own"),
        ("--radix-cache-backend", args.radix_cache_backend is not None, "the tree is where pages are shared"),
        (
            "--enable-memory-saver on host memory",
            args.enable_memory_saver and args.device == "cpu",
            "torch_memory_saver keeps the memory of a GPU",
        ),
        ("--enable-mixed-chunk", args.enable_mixed_chunk, "decode requests in an extend batch are not yet mapped"),
        ("--enable-unified-memory", args.enable_unified_memory, "it is another layout of the pool"),
        ("--enable-page-major-kv-layout", args.enable_page_major_kv_layout, "it is another layout of the pool"),
        ("--enable-hisparse", args.enable_hisparse, "it moves tokens behind the tree's back"),
        ("--enable-streaming-session", args.enable_streaming_session, "sessions keep pages outside of the tree"),
        ("--enable-session-radix-cache", args.enable_session_radix_cache, "it needs SGLang's unified tree"),
        ("--dllm-algorithm", args.dllm_algorithm is not None, "blocks are rewritten in place"),
        ("--enable-pdmux", args.enable_pdmux, "two batches would run at once"),
        ("--enable-two-batch-overlap", args.enable_two_batch_overlap, "two batches would run at once"),
        ("--use-ray", args.use_ray, "the options do not reach Ray's actors"),
        ("--prefill-only-disable-kv-cache", args.prefill_only_disable_kv_cache, "there is no KV cache to back"),
        (
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
            envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
            "the pool's size is settled before graphs are captured, its memory is not",
        ),
        (
            "--vtensor-cache-idle-seconds with --tp-size above 1",
            options.vtensor_cache_idle_seconds is not None and args.tp_size > 1,
            "ranks have no clock in common, and their trees would differ",
        ),
        (
            "--vtensor-cache-idle-seconds with --disable-radix-cache",
            options.vtensor_cache_idle_seconds is not None and args.disable_radix_cache,
            "nothing is cached",
        ),
        ("--pp-size above 1", args.pp_size > 1, "stages would need to agree on pages"),
        ("--dcp-size above 1", args.dcp_size > 1, "a context would be spread over ranks"),
        ("--attn-cp-size above 1", args.attn_cp_size > 1, "a context would be spread over ranks"),
        *more,
    ]
    for option, given, why in flags:
        if given:
            refuse(option, why, without)

    name = (model.hf_config.architectures or ["this model"])[0]
    default = "Run this model with --kv-backend default."
    if uses_mla:
        refuse(name, "multi-head latent attention (MLA) caches a compressed vector, not K and V", default)
    if getattr(model, "is_encoder_decoder", False):
        refuse(name, "its encoder's K and V belong to no prefix", default)
    if model.v_head_dim != model.head_dim:
        refuse(name, f"K has {model.head_dim} elements a head and V {model.v_head_dim}", default)
    if not serves_states and has_states(model):
        refuse(name, "its state-space (Mamba, linear-attention) layers keep a state, not K and V", default)
    if args.kv_cache_dtype != "auto" and args.kv_cache_dtype not in KV_DTYPES:
        refuse(
            f"--kv-cache-dtype {args.kv_cache_dtype}",
            "its scales lie beside tokens, and pages hold keys and values only",
            "Use --kv-cache-dtype fp8_e4m3, or auto.",
        )
    if args.device == "cuda":
        cache, capability = kv_dtype(args, model), torch.cuda.get_device_capability()
        if args.prefill_attention_backend == ATTENTION_BACKEND:
            refuse_types(cache, model.dtype, capability)
        if takes_fa3(args, capability):
            half = "fa3" in (args.prefill_attention_backend, args.decode_attention_backend)
            refuse_types_of_fa3(cache, model.dtype, half=half)


def refuse_types(cache: torch.dtype, computed: torch.dtype, capability: tuple[int, int]) -> None:
    """Raise `Refused` where our kernels cannot read a KV cache of type `cache` for a model that computes in
    `computed`, on a GPU of that compute capability."""
    instead = "or give --attention-backend flashinfer, which reads it by slot"
    if computed not in (torch.float16, torch.bfloat16):
        raise Refused(f"--dtype {computed}: our kernels compute in float16 and bfloat16. Use one of them, {instead}")
    if cache == torch.float8_e4m3fn and computed == torch.float16 and capability == (9, 0):
        raise Refused(
            "a KV cache of fp8_e4m3 with a model of torch.float16: FlashAttention-3 reads it for torch.bfloat16 only. "
            f"Use --dtype bfloat16, or --kv-cache-dtype fp8_e5m2, {instead}"
        )
    if cache == torch.float8_e4m3fn and capability < (8, 9):
        raise Refused(
            f"a KV cache of fp8_e4m3 needs sm_89 for our kernels, and this GPU is sm_{capability[0]}{capability[1]}: "
            f"use --kv-cache-dtype fp8_e5m2, {instead}"
        )
    if cache.itemsize > 1 and cache != computed:
        raise Refused(
            f"a KV cache of {cache} with a model of {computed}: our kernels read the model's own type, and FP8. Leave "
            f"--kv-cache-dtype out, {instead}"
        )


def takes_fa3(args: Any, capability: tuple[int, int]) -> bool:
    """Whether FlashAttention-3 is in one half of attention or in both by what was named, as SGLang fills it in on
    Hopper where only one half was."""
    halves, rest = (args.prefill_attention_backend, args.decode_attention_backend), args.attention_backend
    if rest is None and any(halves) and capability == (9, 0):
        rest = "fa3"
    return "fa3" in [half or rest for half in halves]


def refuse_types_of_fa3(cache: torch.dtype, computed: torch.dtype, *, half: bool) -> None:
    """The same for FlashAttention-3, which was named for a `half` of attention, or else is in all that was not."""
    if cache == torch.float8_e4m3fn and computed == torch.float16:
        raise Refused(
            "fa3 reads a KV cache of fp8_e4m3 for a model of torch.bfloat16 only, and this one is of torch.float16: "
            "use --dtype bfloat16, or name flashinfer"
        )
    if cache == torch.float8_e5m2 and half:  # SGLang looks at --attention-backend itself, and takes triton
        raise Refused("fa3 does not read a KV cache of fp8_e5m2: name triton, or use --kv-cache-dtype fp8_e4m3")


def kv_dtype(args: Any, model: Any) -> torch.dtype:
    """The type of the KV cache: what the user gave, or what the checkpoint asks for, or the model's own."""
    if args.kv_cache_dtype != "auto":
        return KV_DTYPES[args.kv_cache_dtype]
    own: torch.dtype = model.dtype
    return torch.float8_e4m3fn if asks_for_fp8_kv(model, args.download_dir) else own


def asks_for_fp8_kv(model: Any, download_dir: str | None = None) -> bool:
    """Whether a checkpoint asks for an FP8 KV cache, as SGLang reads it. Each format of checkpoints says so in words of
    its own, and not every version of SGLang listens to all of them."""
    if model.quantization is None:
        return False
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.weight_utils import get_quant_config

    model = copy.copy(model)
    model.hf_config = copy.deepcopy(model.hf_config)  # SGLang notes there what it is asked with
    try:
        read: Any = get_quant_config(model, LoadConfig(download_dir=download_dir), {})
    except Exception:
        return False  # SGLang says what is wrong with it as it reads the weights
    return str(getattr(read, "kv_cache_quant_algo", None)).upper() == "FP8"
