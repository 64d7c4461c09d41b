"""Which attention reads the KV memory: ours, but for a backend that the user named, or deterministic inference."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from sglang_vtensor.srt.options import (
    ATTENTION_BACKEND,
    CUDA_ATTENTION_BACKENDS,
    HOST_ATTENTION_BACKENDS,
    Options,
    Refused,
)

logger = logging.getLogger(__name__)

#: SGLang's arguments that name a backend.
NAMES = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
#: SGLang's arguments that ask for sums whose order does not depend on what else is in a batch.
DETERMINISTIC = ("enable_deterministic_inference", "rl_on_policy_target")
#: Models that SGLang does not run on FlashInfer's attention.
NOT_BY_FLASHINFER = ("gpt_oss", "olmo2", "olmo3", "exaone4", "exaone_moe", "llama4", "llama4_text")


def choose_attention(given: Mapping[str, Any], options: Options) -> dict[str, str]:
    """What SGLang is to be told beside what the user gave (`given`, by name). Raises `Refused` for what cannot be.

    On the host one backend does both halves; on a GPU ours is for extend, and decode is SGLang's own choice.
    """
    from sglang.srt.platforms import current_platform

    if not options.ours:
        if given.get("attention_backend") == ATTENTION_BACKEND:
            raise Refused("--attention-backend vtensor reads the memory of --kv-backend vtensor: give both, or neither")
        return {}
    kernel = options.vtensor_prefill_kernel
    host = current_platform.device_name == "cpu" and current_platform.is_out_of_tree()
    if not host and not torch.cuda.is_available():
        raise Refused(
            "--kv-backend vtensor found no NVIDIA GPU. To run without one, on host memory, set "
            "SGLANG_PLATFORM=vtensor_host"
        )
    if host and kernel != "auto":
        raise Refused(
            f"--vtensor-prefill-kernel {kernel} needs an NVIDIA GPU: on host memory torch's own operators attend. "
            "Leave it out"
        )
    allowed = HOST_ATTENTION_BACKENDS if host else CUDA_ATTENTION_BACKENDS
    for name in NAMES:
        value = given.get(name)
        ours_prefill = name == "prefill_attention_backend" and value == ATTENTION_BACKEND
        if value is not None and value not in allowed and not ours_prefill:
            raise Refused(
                f"--{name.replace('_', '-')} {value} does not run on {'host memory' if host else 'strided K and V'}: "
                f"use {' or '.join(allowed)}, or leave it out"
            )
    deterministic = [name for name in DETERMINISTIC if given.get(name)]
    if deterministic:
        ours_named = given.get("prefill_attention_backend") == ATTENTION_BACKEND
        _leave_to_sglang(f"--{deterministic[0].replace('_', '-')}", options, host=host, ours_named=ours_named)
        return {}
    if any(given.get(name) is not None for name in NAMES):
        if kernel != "auto" and given.get("prefill_attention_backend") != ATTENTION_BACKEND:
            raise Refused(
                f"--vtensor-prefill-kernel {kernel} is of our attention, and another attention backend was named: "
                "leave one of the two out"
            )
        return {}
    if host:
        return {"attention_backend": ATTENTION_BACKEND}
    if kernel == "fa3" and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        raise Refused(
            f"--vtensor-prefill-kernel fa3 needs sm_90 (Hopper), and this GPU is sm_{major}{minor}: use triton, or auto"
        )
    return {"prefill_attention_backend": ATTENTION_BACKEND}


def choose_decode(settings: Any, model: Any) -> dict[str, str]:
    """What SGLang is to be told for a half of attention on a GPU that the user named no backend for, and that is not
    ours; nothing where its own choice reads our memory. `settings` are SGLang's, and `model` is its `ModelConfig`.

    For gpt-oss, whose sinks few backends know, SGLang chooses only where nothing is given. On sm_100 it takes
    `trtllm_mha`, which has pages of at most 128 tokens.
    """
    prefill, decode = settings.prefill_attention_backend, settings.decode_attention_backend
    deterministic = any(getattr(settings, name) for name in DETERMINISTIC)  # SGLang has a choice of its own for that
    if settings.device != "cuda" or settings.attention_backend or deterministic:
        return {}
    major, _ = torch.cuda.get_device_capability()
    kind, chosen = model.hf_config.model_type, {}
    if major == 10 and not (prefill and decode):
        chosen["attention_backend"] = "triton" if kind in NOT_BY_FLASHINFER else "flashinfer"
    if kind == "gpt_oss" and prefill == ATTENTION_BACKEND and not decode:
        fa3 = major == 9 and settings.kv_cache_dtype != "fp8_e5m2"  # which FlashAttention-3 does not read
        chosen["decode_attention_backend"] = "fa3" if fa3 else "triton"
    return chosen


def _leave_to_sglang(option: str, options: Options, *, host: bool, ours_named: bool) -> None:
    """Deterministic inference wants sums whose order does not depend on the batch: SGLang's own kernels can do that, by
    slot. Ours divide the work by what is in the batch. Raises `Refused` where ours were asked for, or are all there is.
    """
    if host:
        raise Refused(
            f"--kv-backend vtensor does not support {option} on host memory: SGLang has no deterministic attention "
            "there. Leave it out, or run on a GPU"
        )
    if ours_named or options.vtensor_prefill_kernel != Options.vtensor_prefill_kernel:
        named = "--prefill-attention-backend vtensor" if ours_named else "--vtensor-prefill-kernel"
        raise Refused(f"{named} is not deterministic, and {option} is given: leave one of the two out")
    logger.warning(
        "%s: attention is SGLang's own, by slot, and shared decode is off, as their sums depend on what else is in a "
        "batch. Reuse and memory are as without it.",
        option,
    )


def wants_shared_decode(settings: Any, options: Options, *, states: bool = False) -> bool:
    """Whether decode steps may read what their requests share once; a warning where only a backend by name is in the
    way, or that layers of the model have `states`. `settings` are SGLang's, resolved."""
    # On the host, which is not for speed, nothing is lost.
    if options.vtensor_shared_decode == "off" or settings.device == "cpu":
        return False
    if settings.enable_deterministic_inference:
        return False  # `_leave_to_sglang` said so
    if states:
        logger.warning(
            "Shared decode is off, as layers of this model keep states: each request reads its whole context "
            "in the other layers. Give --vtensor-shared-decode off to say so."
        )
        return False
    if settings.prefill_attention_backend != ATTENTION_BACKEND:
        logger.warning(
            "Shared decode is off, as an attention backend was named: each request reads its whole context. Leave the "
            "attention backend out, or give --vtensor-shared-decode off."
        )
        return False
    return True
