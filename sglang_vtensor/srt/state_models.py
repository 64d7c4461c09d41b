"""Which models with states are served: those that have linear attention, or Mamba-2, beside full attention.

Such a layer keeps one state of a sequence. SGLang writes copies of it where a match may end later, into slots beside
the request's own, and that is the way that this memory takes (`state_side`).
"""

from __future__ import annotations

import math
from typing import Any

from sglang_vtensor.srt.options import Refused

#: Architectures with states that are served: gated delta nets beside full attention, and Mamba-2 beside it.
SERVED = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "NemotronHForCausalLM",
)
#: SGLang's name for the way that keeps copies beside the request's own state.
STRATEGY = "extra_buffer"
#: Kernels of linear attention that read states at any distance from one another, by option. FlashInfer's prefill copies
#: the states of its batch first. Its decode takes the last slot for the requests that a graph is padded with, and that
#: slot has no memory here.
KERNELS = {
    "linear_attn_backend": ("triton",),
    "linear_attn_prefill_backend": ("triton", "flashinfer"),
    "linear_attn_decode_backend": ("triton",),
}
#: SGLang divides prompts into chunks of so many tokens, where the model does not say of how many.
CHUNK_TOKENS = 64


def refuse_states(name: str, settings: Any) -> None:
    """Raise `Refused` for a model with states that is not served, or for settings that its states do not go with."""
    default = "Run this model with --kv-backend default."
    if name not in SERVED:
        raise Refused(
            f"--kv-backend vtensor does not support {name}: of models with state-space (Mamba, linear-attention) "
            f"layers, it serves {', '.join(SERVED)}. {default}"
        )
    given = settings.mamba_radix_cache_strategy
    if given not in ("auto", STRATEGY):
        raise Refused(
            f"--kv-backend vtensor does not support --mamba-radix-cache-strategy {given}: states are kept at whole "
            f"pages, beside the one that a batch moves on. Leave it out, or give {STRATEGY}."
        )
    if settings.mamba_track_interval < 1:
        raise Refused(f"--mamba-track-interval {settings.mamba_track_interval}: give 1 token or more")
    for option, kernels in KERNELS.items():
        if (named := getattr(settings, option)) not in (None, *kernels):
            raise Refused(
                f"--kv-backend vtensor does not support --{option.replace('_', '-')} {named}: states of a request lie "
                f"together, and not together with those of others. Leave it out, or give {' or '.join(kernels)}."
            )
    if settings.mamba_backend != "triton":
        raise Refused(
            f"--kv-backend vtensor does not support --mamba-backend {settings.mamba_backend}: states of a request lie "
            "together, and not together with those of others. Leave it out, or give triton."
        )
    if settings.mamba_max_states_per_path != -1:
        raise Refused(
            f"--kv-backend vtensor does not support --mamba-max-states-per-path {settings.mamba_max_states_per_path}: "
            "states go where memory is short, the longest unused one first. Leave it out, or bound how many there are "
            "with --max-mamba-cache-size."
        )
    for option, asked in (
        ("--enable-linear-replayssm", settings.enable_linear_replayssm),
        ("--enable-int8-mamba-checkpoint", settings.enable_int8_mamba_checkpoint),
        ("--enable-mis", settings.enable_mis),
    ):
        if asked:
            raise Refused(
                f"--kv-backend vtensor does not support {option}: states lie in pages of their own. Leave it out, or "
                "run with --kv-backend default."
            )


def chunk_tokens(config: Any) -> int:
    """Of how many tokens SGLang's chunks of a prompt are; states are kept between them. `config` is of the model."""
    return getattr(config, "mamba_chunk_size", CHUNK_TOKENS)


def refuse_page(page_tokens: int, chunk: int) -> None:
    """Raise `Refused` where pages and chunks of so many tokens do not end together."""
    if page_tokens % chunk and chunk % page_tokens:
        raise Refused(
            f"--page-size {page_tokens}: with states a page of this model is a multiple of {chunk} tokens, or divides "
            "them. Leave it out to have one chosen."
        )


def track_interval(given: int, page_tokens: int, chunk: int) -> int:
    """Of how many tokens of an answer a state is kept at a time: as SGLang is told (256 by itself), in whole pages and
    whole chunks."""
    return math.lcm(given, page_tokens, chunk)
