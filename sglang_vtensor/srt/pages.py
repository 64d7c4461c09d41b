"""How many tokens a page has, and what is in it: chosen from a model's configuration and the device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sglang_vtensor.srt.options import Refused, kv_dtype
from sglang_vtensor.srt.sides import Sides
from sglang_vtensor.srt.windows import windows_of
from sglang_vtensor.vmm import page_units


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
