"""`python -m benchmarks.fp8`: kernels over FP8 KV (e4m3) beside FlashAttention-3 over FP8, on a Hopper GPU.

As `benchmarks.kernels` measures, over the geometries that people serve. FlashAttention-3 has queries in FP8 already,
and pools of its own with pages of 1, 64 and 128 tokens in random order; what the server takes where our kernel is not
taken is FlashAttention-3 too, over pages of 128 of our layout. Errors are those of the first request, against attention
in float32 over the same FP8 keys and values: the root of the mean square over that of the result.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.kernels import (
    HEADS,
    PREFILL,
    SERVED,
    SHARED,
    TOKENS_IN_ALL,
    Call,
    Case,
    Paged,
    PlainCase,
    Row,
    SharedCase,
    as_bytes,
    fa3,
    fa3_on,
    graph,
    ours,
    rates,
    rounds,
    times,
    told,
)
from sglang_vtensor.kernels import configs

console = Console(width=200)
FP8 = torch.float8_e4m3fn
PAGES = (1, 64, 128)
ALL = ["Llama-3-8B", "Qwen3-32B", *SERVED, *HEADS]
PAGE = 128
SHARING = tuple(name for name in SHARED if name != "no_sharing")
DECODE: list[list[int]] = [[8192] * 64, [32768] * 8, [1024] * 64, [4096] * 128, [131072], [512] * 256]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int) -> torch.Tensor:
    """Causal attention in float32. `q`: `(new, q_heads, dim)`; `k`, `v`: `(context, kv_heads, dim)`."""
    group = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        keys, values = (x[:, head // group].float() for x in (k, v))
        scores = q[:, head].float() @ keys.T * q.shape[2] ** -0.5
        seen = torch.arange(len(k), device=q.device)[None, :] <= torch.arange(len(q), device=q.device)[:, None] + prefix
        outs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values)
    return torch.stack(outs, 1)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def measure_prefill(geometry: str, shape: list[tuple[int, int]]) -> Row:
    case = Case(geometry, shape, FP8)
    row: Row = {"part": "prefill", "geometry": geometry, "shape": case.label()}
    calls: dict[str, Call] = {"ours": ours(case), "fa3_in_ours": fa3_on(case, *case.pages())}
    graphs = {name: graph(call, case.rotation) for name, call in calls.items()}
    for page in PAGES:
        one = {f"fa3_page{page}": fa3(case, page)}
        calls |= one
        graphs |= {name: graph(call, case.rotation) for name, call in one.items()}
    row |= told(rounds(graphs, case.rotation))
    new, context = case.new[0], case.contexts[0]
    wanted = exact(case.q[:new], case.pool[:context, 0, 0], case.pool[:context, 0, 1], context - new)
    row |= {f"error_{name}": round(error(calls[name](0)[:new], wanted), 5) for name in ("ours", "fa3_page128")}
    heads = case.q_heads, case.kv_heads, case.dim
    row["taken"] = configs.ours_before_fa3(case.new, case.contexts, *heads, "cuda", FP8)
    row["server"] = row["ours"] if row["taken"] else row["fa3_in_ours"]
    return row


def measure_decode(what: str, make: Callable[[torch.dtype], Paged]) -> Row:
    """A batch of `make`, and then the same in bfloat16: there is no room for both of the largest ones."""
    row = _over_fp8(what, make(FP8))
    let_go()
    wide = make(torch.bfloat16)
    calls: dict[str, Call] = {"ours": wide.ours(wide.decoder()), "fa3_page128": fa3(wide, 128)}
    measured = times({name: graph(call, wide.rotation) for name, call in calls.items()}, wide.rotation)
    row |= {f"{name}_bf16": value for name, value in measured.items()}
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def _over_fp8(what: str, case: Paged) -> Row:
    decoder = case.decoder()
    k, v, table = case.slots()
    in_ours = (*(x.squeeze(2).unflatten(1, (-1, PAGE)) for x in (k, v)), table[:, ::PAGE] // PAGE)
    calls: dict[str, Call] = {"ours": case.ours(decoder), "fa3_in_ours": fa3_on(case, *in_ours)}
    calls |= {f"fa3_page{page}": fa3(case, page) for page in PAGES}
    row: Row = {"part": "decode", "case": what, "requests": case.requests, "tokens": sum(case.context_lens.tolist())}
    row |= told(rounds({name: graph(call, case.rotation) for name, call in calls.items()}, case.rotation))
    slots = case.table[0, : int(case.context_lens[0])].long()
    keys, values = (as_bytes(case.pool[:, 0, part])[slots].view(FP8) for part in (0, 1))
    wanted = exact(case.q[:1], keys, values, len(slots) - 1)
    row |= {f"error_{name}": error(calls[name](0)[:1], wanted) for name in ("ours", "fa3_page128")}
    sharing, group = case.sharing, case.q_heads // case.kv_heads
    numbers = case.requests, int(row["tokens"]), sharing.shared_tokens, sharing.saved_tokens, group, case.token_bytes
    row["taken"] = configs.shared_decode_pays(*numbers, configs.capability("cuda"), FP8, case.dim)
    row["server"] = row["ours"] if row["taken"] else row["fa3_in_ours"]
    return row


def let_go() -> None:
    """Of what a case had, which pools of tens of GiB may be: calls and what they are made of refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def best(row: Row) -> float:
    return float(min(row[f"fa3_page{page}"] for page in PAGES))


def shares(row: Row) -> bool:
    """Whether requests of this decode batch share a prefix."""
    return row["part"] == "decode" and row["case"].endswith(SHARING)


def summarize(rows: list[Row]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for part in ("prefill", "decode"):
        all_of_it = [row for row in rows if row["part"] == part]
        for name, some in (
            (f"fp8_{part}", [row for row in all_of_it if not shares(row)]),
            (f"fp8_shared_{part}", [row for row in all_of_it if shares(row)]),
        ):
            if some:
                ratios = [best(row) / row["server"] for row in some]
                summary[f"{name}_vs_fa3"] = statistics.geometric_mean(ratios)
                summary[f"{name}_vs_fa3_min"] = min(ratios)
                summary[f"{name}_own_vs_fa3"] = statistics.geometric_mean([best(row) / row["ours"] for row in some])
                summary[f"{name}_taken"] = sum(row["taken"] for row in some) / len(some)
        if all_of_it:
            errors = [row["error_ours"] / row["error_fa3_page128"] for row in all_of_it]
            summary[f"fp8_{part}_error_vs_fa3_worst"] = max(errors)
    for row in rows:
        if row["part"] == "decode" and row["case"] == "Llama-3-8B, shared_8k_x64":
            summary["fp8_shared_decode_8k_x64"] = best(row) / row["ours"]
        if row["part"] == "decode" and row["case"] == "Llama-3-8B, 64 x 8192":
            summary["fp8_decode_vs_bf16"] = row["ours_bf16"] / row["ours"]
            summary["fp8_decode_fa3_vs_bf16"] = row["fa3_page128_bf16"] / row["fa3_page128"]
    return summary


def main(
    geometries: Annotated[str, typer.Option(help="With semicolons.")] = ";".join(ALL),
    parts: Annotated[str, typer.Option(help="With commas.")] = "decode,prefill",
    write: Annotated[bool, typer.Option(help="Write fp8_decode.json and fp8_prefill.json.")] = True,
) -> None:
    """Measure, print and write."""
    console.print(f"{rates()[1] / 1e9:.0f} GB/s")
    rows: list[Row] = []
    for geometry in geometries.split(";"):
        cases: list[tuple[str, Callable[[torch.dtype], Paged]]] = []
        if "decode" in parts:
            cases += [(name, partial(SharedCase, name, geometry)) for name in SHARING]
            fitting = [contexts for contexts in DECODE if sum(contexts) <= 2 * TOKENS_IN_ALL]
            cases += [(f"{len(some)} x {some[0]}", partial(PlainCase, some, geometry)) for some in fitting]
        for what, make in cases:
            rows.append(measure_decode(f"{geometry}, {what}", make))
            console.print(rows[-1])
            let_go()
        for shape in PREFILL if "prefill" in parts else ():
            if sum(a + b for a, b in shape) <= TOKENS_IN_ALL:
                rows.append(measure_prefill(geometry, shape))
                console.print(rows[-1])
                let_go()
    for part in ("decode", "prefill"):
        if of_part := [row for row in rows if row["part"] == part]:
            summary = summarize(of_part)
            if write:
                results.write(f"fp8_{part}", summary, of_part)
            console.print(summary)


if __name__ == "__main__":
    typer.run(main)
