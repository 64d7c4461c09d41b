"""Tables of the kernel benchmarks, for `benchmarks.report`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks import plots
from benchmarks.results import Record, source

#: Contestants of the kernel benchmarks, and what they are called; the strongest stand first, and Triton last.
OTHERS = {
    "cascade_page1": "FlashInfer's cascade, pages of 1",
    "cascade_page128": "FlashInfer's cascade, pages of 128",
    "cascade_fa2_page1": "FlashInfer's cascade by fa2, pages of 1",
    "cascade_fa2_page128": "FlashInfer's cascade by fa2, pages of 128",
    "fa3_page128": "FlashAttention-3, pages of 128",
    "fa3_page64": "FlashAttention-3, pages of 64",
    "fa3_page1": "FlashAttention-3, pages of 1",
    "flashinfer_ragged": "FlashInfer ragged",
    "flashinfer_paged": "FlashInfer paged",
    "triton": "SGLang's Triton",
}
SHARED = {
    "shared_8k_x64": "64 requests, 8,192 tokens for all, 512 each",
    "groups_16k_x256": "256 requests in 8 groups, 16,384 tokens a group, 256 each",
    "two_level": "64 requests, 2,048 tokens for all, 4,096 for each 8, 512 each",
    "no_sharing": "64 requests, 4,096 tokens each, nothing shared",
}
#: Of `benchmarks.fp8`: what shares, and the plain batch that the issue of FP8 asks about.
_SHARING = {name: text for name, text in SHARED.items() if name != "no_sharing"}
FP8_CASES = _SHARING | {"64 x 8192": "64 requests, 8,192 tokens each, nothing shared"}


def rounds_of(rows: list[dict[str, Any]], names: Iterable[str]) -> str:
    """How many rounds these contestants had, and how far from its median one was; "" where that was not kept."""
    if not all("rounds" in row for row in rows):
        return ""
    ends = [
        abs(row[f"{name}_{end}"] / row[name] - 1)
        for row in rows
        for name in names
        if f"{name}_least" in row
        for end in ("least", "most")
    ]
    fewest = min(row["rounds"] for row in rows)
    return f"Times are medians of {fewest} rounds, of which none is more than {max(ends):.1%} away. "


def prefill(record: Record) -> str:
    """Prefix-prefill kernels, shape by shape: ours over each contestant, the geometric mean over the geometries, and
    ours for Llama-3-8B beside the floor."""
    measured = [row for row in record["rows"] if "sweep" not in row]
    others = [name for name in OTHERS if all(name in row for row in measured)]
    lines = [
        "| prefill, requests x (prefix + new) | TFLOP/s, Llama-3-8B | share of the floor | "
        + " | ".join(f"x {OTHERS[other]}" for other in others)
        + " |",
        "|---" * (3 + len(others)) + "|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in measured):
        rows = [row for row in measured if row["shape"] == shape]
        llama = next((row for row in rows if row["geometry"] == "Llama-3-8B"), rows[0])
        ratios = (statistics.geometric_mean(row[other] / row["ours"] for row in rows) for other in others)
        lines.append(
            f"| {shape} | {llama['tflops']:,.0f} | {llama['floor_us'] / llama['ours']:.2f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )
    ratios = (statistics.geometric_mean(row[other] / row["ours"] for row in measured) for other in others)
    lines.append("| all | | | " + " | ".join(f"**{ratio:.2f}**" for ratio in ratios) + " |")
    drawn = [f"![{text}](plots/prefill_{sweep}.svg)" for sweep, text in plots.SWEEPS.items()]
    swept = {row["sweep"] for row in record["rows"] if "sweep" in row}
    end = [picture for picture, sweep in zip(drawn, plots.SWEEPS, strict=True) if sweep in swept]
    told = rounds_of(measured, ("ours", *others)) + source(record)
    return "\n".join([*lines, "", told, *(["", *end] if end else [])])


def shared_decode(record: Record) -> str:
    """Decode of batches that share: microseconds of each contestant, and ours beside the strongest of them, with the
    least and the most of the rounds. A contestant may have failed in some cases, and stands in the others."""
    rows = record["rows"]
    others = [name for name in OTHERS if any(name in row for row in rows)]
    head = ["decode, Llama-3-8B", "floor, all read once", "shared decode", *(OTHERS[name] for name in others)]
    lines = [f"| {' | '.join([*head, 'the strongest / ours'])} |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        strongest = min((name for name in others if name in row), key=row.__getitem__)
        ratio = f"**{row[strongest] / row['ours']:.2f}**"
        if "rounds" in row:
            ratio = f"**{row[f'{strongest}_ratio']:.2f}** "
            ratio += f"({row[f'{strongest}_ratio_least']:.2f} to {row[f'{strongest}_ratio_most']:.2f})"
        cells = [f"{row[name]:.0f} us" if name in row else "failed" for name in ("floor_us", "ours", *others)]
        lines.append(f"| {' | '.join([SHARED[row['case']], *cells, ratio])} |")
    planned = [row["plan_us"] for row in rows]
    end = f"Once a step, for all layers, the work is divided: {min(planned):.0f} to {max(planned):.0f} us."
    if all("rounds" in row for row in rows):
        end += f" Medians of {min(row['rounds'] for row in rows)} rounds; the last column has the least and the most."
    return "\n".join([*lines, "", end, source(record)])


def plain_decode(record: Record) -> str:
    """Decode of batches that share nothing: the geometric mean over the geometries, where our kernel is taken and where
    it is not."""
    head = ["decode, nothing shared", "batches", "x FlashAttention-3, this layout", "least", "most"]
    head += ["x FlashAttention-3, its own", "least", "most"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    summary = record["summary"]
    said = {"taken": "8 requests and 32 MB a layer, or more: ours", "left": "fewer or less: FlashAttention-3's"}
    for name, text in said.items():
        count = sum(row["taken"] is (name == "taken") for row in record["rows"])
        ratios = (
            summary.get(f"{name}_vs_{other}_{what}", 0.0)
            for other in ("fa3_slots", "fa3_page1")
            for what in ("geomean", "min", "max")
        )
        lines.append(f"| {text} | {count} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join([*lines, "", rounds_of(record["rows"], ("ours", "fa3_slots", "fa3_page1")) + source(record)])


def fp8_decode(record: Record) -> str:
    """Decode over FP8 KV: what shares, and what the server takes for each geometry, beside FlashAttention-3 at its best
    page size of 1, 64 and 128 tokens, on a pool of its own."""
    lines = ["| decode over FP8, Llama-3-8B | vtensor's kernel | FlashAttention-3 | x | vtensor's over bf16 |"]
    lines.append("|---" * 5 + "|")
    by_case = {row["case"]: row for row in record["rows"]}
    for case, text in FP8_CASES.items():
        row = by_case[f"Llama-3-8B, {case}"]
        lines.append(
            f"| {text} | {row['ours']:.0f} us | {_best_fa3(row):.0f} us | **{_best_fa3(row) / row['ours']:.2f}** | "
            f"{row['ours_bf16']:.0f} us |"
        )
    shared = [row for row in record["rows"] if row["case"].endswith(tuple(_SHARING))]
    plain = [row for row in record["rows"] if not row["case"].endswith(tuple(SHARED))]
    for what, some in (("prefixes shared, as above", shared), ("nothing shared", plain)):
        ours = "our kernel in | our kernel over bf16 / over FP8"
        lines += ["", f"| {what}: FlashAttention-3 / what the server takes | mean | least | most | {ours} |"]
        lines.append("|---" * 6 + "|")
        for geometry in dict.fromkeys(row["case"].rpartition(", ")[0] for row in some):
            rows = [row for row in some if row["case"].rpartition(", ")[0] == geometry]
            ratios = [_best_fa3(row) / row["server"] for row in rows]
            taken = f"{sum(row['taken'] for row in rows)} of {len(rows)}"
            mean = statistics.geometric_mean(ratios)
            gain = statistics.geometric_mean(row["ours_bf16"] / row["ours"] for row in rows)
            lines.append(f"| {geometry} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {taken} | {gain:.2f} |")
    summary = record["summary"]
    end = (
        f"Where nothing is shared, decode is {summary['fp8_decode_vs_fa3']:.2f} times as fast as FlashAttention-3 in "
        "the geometric mean over the geometries, and "
        f"{summary['fp8_shared_decode_vs_fa3']:.2f} times where prefixes are shared. The server "
        f"takes our kernel in {summary['fp8_decode_taken']:.0%} of the former cases, and in "
        f"{summary['fp8_shared_decode_taken']:.0%} of the latter. Beside attention in float32 "
        "over the same FP8 keys and values, the error of our kernel is at most "
        f"{summary['fp8_decode_error_vs_fa3_worst']:.2f} of FlashAttention-3's. " + rounds_of(record["rows"], _FP8)
    ).strip()
    return "\n".join([*lines, "", end, source(record)])


def fp8_prefill(record: Record) -> str:
    """Prefill over FP8 KV, as `fp8_decode`."""
    lines = ["| FlashAttention-3 / what the server takes | mean | least | most | our kernel alone |", "|---" * 5 + "|"]
    for geometry in dict.fromkeys(row["geometry"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["geometry"] == geometry]
        ratios = [_best_fa3(row) / row["server"] for row in rows]
        alone = statistics.geometric_mean(_best_fa3(row) / row["ours"] for row in rows)
        mean = statistics.geometric_mean(ratios)
        lines.append(f"| {geometry} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {alone:.2f} |")
    summary = record["summary"]
    others = statistics.geometric_mean(_best_fa3(row) / row["server"] for row in record["rows"] if not row["taken"])
    end = (
        f"Prefill is {summary['fp8_prefill_vs_fa3']:.3f} times as fast as FlashAttention-3 in the geometric mean. The "
        f"server takes our kernel in {summary['fp8_prefill_taken']:.0%} of the cases; in the others the mean is "
        f"{others:.3f}. " + rounds_of(record["rows"], _FP8)
    ).strip()
    return "\n".join([*lines, "", end, source(record)])


_FP8 = ("ours", "fa3_in_ours", "fa3_page1", "fa3_page64", "fa3_page128")


def _best_fa3(row: dict[str, Any]) -> float:
    """FlashAttention-3's time at its best page size."""
    return float(min(row[f"fa3_page{page}"] for page in (1, 64, 128)))
