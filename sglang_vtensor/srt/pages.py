"""How many tokens a page has, and what is in it: chosen from a model's configuration and the device, or refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sglang.srt.utils import get_device_memory_capacity

from sglang_vtensor.srt.options import Options, Refusal, Refused, has_states, kv_dtype, refuse_unsupported
from sglang_vtensor.srt.sides import Sides
from sglang_vtensor.srt.state_models import chunk_tokens, refuse_page, refuse_states
from sglang_vtensor.srt.windows import refuse_readers, windows_of
from sglang_vtensor.vmm import page_units


def settle_page_size(
    args: Any,
    model: Any,
    options: Options,
    *,
    uses_mla: bool,
    attn_tp_size: int,
    without: Collection[int] = (),
    serves_states: bool = False,
    more: Sequence[Refusal] = (),
) -> int:
    """Refuse what cannot be served, and choose the page size, as `choose_page_size`. `args` are SGLang's settings, and
    layers `without` K and V keep states; the rest is as `refuse_unsupported` has it."""
    refuse_unsupported(args, model, options, uses_mla=uses_mla, serves_states=serves_states, more=more)
    if has_states(model):
        refuse_states((model.hf_config.architectures or ["this model"])[0], args)
    names = (args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend)
    refuse_readers(windows_of(model), names)
    device_mib = get_device_memory_capacity(args.device)
    if device_mib is not None:
        options.check_device(int(device_mib) << 20)
    page = choose_page_size(args, model, attn_tp_size=attn_tp_size, without=without)
    if without:
        refuse_page(page, chunk_tokens(model.hf_config))
    return page


def choose_page_size(args: Any, model: Any, *, attn_tp_size: int, without: Collection[int] = ()) -> int:
    """Tokens a page: `--page-size`, or the smallest size that suits the model. Raises `Refused` for one that does not
    fit the memory, the longest context, the cache or a chunk of prefill."""
    page = sides_for(
        args, model, device=args.device, page_tokens=args.page_size, attn_tp_size=attn_tp_size, without=without
    ).page_tokens
    context = model.context_len
    if args.page_size is not None and page > context:
        raise Refused(
            f"--page-size {page} is longer than the longest context, {context} tokens: leave it out to have one chosen"
        )
    if args.max_total_tokens is not None and page > args.max_total_tokens:
        raise Refused(f"--max-total-tokens {args.max_total_tokens} is less than one page of {page} tokens: give more")
    chunk = args.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % page:
        raise Refused(
            f"--chunked-prefill-size {chunk} is not a multiple of the page size, {page} tokens: give "
            f"--chunked-prefill-size {-(-chunk // page) * page}, or another --page-size"
        )
    return page


def sides_for(
    args: Any,
    model: Any,
    *,
    device: str,
    page_tokens: int | None,
    attn_tp_size: int,
    without: Collection[int] = (),
) -> Sides:
    """The sides of the KV cache of one of `attn_tp_size` ranks for `model` on `device`, whose layers `without` K and V
    have states. Raises `Refused` as
    `Sides.choose` and `windows_of` do, and `Unsupported` where the device has no virtual memory management."""
    granularity, tile_tokens = page_units(device)
    windows = windows_of(model)
    try:
        return Sides.choose(
            windows,
            kv_heads=model.get_num_kv_heads(attn_tp_size),
            head_dim=model.head_dim,
            dtype=kv_dtype(args, model),
            granularity=granularity,
            tile_tokens=tile_tokens,
            page_tokens=page_tokens,
            without=without,
        )
    except ValueError as error:
        raise Refused(str(error)) from error
