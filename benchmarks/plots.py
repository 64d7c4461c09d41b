"""The plots of docs/benchmarks.md, drawn from the committed results by `python -m benchmarks.report`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import results

FOLDER = Path(__file__).parents[1] / "docs" / "plots"
#: How contestants are shown, everywhere alike.
NAMES = {
    "ours": "ours (Gluon)",
    "fa3_segments": "FlashAttention-3 on segments",
    "fa3_page128": "FlashAttention-3, pages of 128",
    "fa3_page1": "FlashAttention-3, pages of 1",
    "flashinfer_paged": "FlashInfer",
    "triton": "SGLang's Triton",
}
COLOURS = {
    "ours": "tab:red",
    "fa3_segments": "tab:purple",
    "fa3_page128": "tab:blue",
    "fa3_page1": "tab:cyan",
    "flashinfer_paged": "tab:green",
    "triton": "tab:orange",
}
SWEEPS = {"prefix": "tokens of prefix, 4 x 512 new ones", "new": "new tokens, 4 requests over 8,192 of prefix"}


def draw() -> list[Path]:
    """Every plot that there are results for."""
    drawn = []
    record = results.read("prefill")
    for sweep in SWEEPS:
        rows = [row for row in record["rows"] if row.get("sweep") == sweep] if record else []
        if rows:
            drawn.append(_sweep(sweep, rows))
    record = results.read("prefix")
    if record:
        drawn.append(_suite(record))
    record = results.read("memory")
    held = [row for row in record["rows"] if row["part"] == "held"] if record else []
    if held:
        drawn.append(_held(held))
    return drawn


def _suite(record: dict[str, Any]) -> Path:
    """Throughput of our server over each other one, workload by workload; the least and the most, where rounds of
    both alternated."""
    figure, axes = _figure()
    rows, summary = record["rows"], record["summary"]
    kinds = list(dict.fromkeys(row["workload"] for row in rows))
    others = [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != "vtensor"]

    def middle(kind: str, name: str) -> float | None:
        rates = [row["tokens_per_second"] for row in rows if (row["workload"], row["contestant"]) == (kind, name)]
        return statistics.median(rates) if rates else None

    def ratio(kind: str, other: str) -> tuple[float, float, float] | None:
        """The median, and how far the least and the most are from it."""
        key = f"{kind}_vs_{other}"
        if f"{key}_least" in summary:
            return summary[key], summary[key] - summary[f"{key}_least"], summary[f"{key}_most"] - summary[key]
        ours, theirs = middle(kind, "vtensor"), middle(kind, other)
        return (ours / theirs, 0.0, 0.0) if "comparisons" not in record and ours and theirs else None

    for n, other in enumerate(others):
        at, ratios = [], []
        for x, kind in enumerate(kinds):
            if found := ratio(kind, other):
                at.append(x + 0.8 * (n + 0.5) / len(others) - 0.4)
                ratios.append(found)
        over = [found[0] for found in ratios]
        axes.bar(at, over, 0.8 / len(others), label=f"over {other}")
        if "comparisons" in record:
            ends = [[found[1] for found in ratios], [found[2] for found in ratios]]
            axes.errorbar(at, over, ends, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("throughput, vtensor / it")
    return _save(figure, axes, "prefix")


def _held(rows: list[dict[str, Any]]) -> Path:
    """Memory of the device over time, from start to after a burst."""
    figure, axes = _figure()
    for row in rows:
        name = "SGLang as it ships" if row["what"] != "vtensor" else "vtensor"
        begin = row["phases"][0][0]
        points = [(at - begin, mib / 1024) for at, mib in row["points"] if at >= begin]
        colour = "tab:red" if name == "vtensor" else "tab:blue"
        axes.plot(*zip(*points, strict=True), color=colour, label=name)
        if name == "vtensor":
            for at, phase in row["phases"]:
                axes.axvline(at - begin, color="gray", linewidth=0.5)
                axes.text(at - begin, axes.get_ylim()[1] * 0.02, f" {phase}", fontsize=6, rotation=90, va="bottom")
    axes.axhline(rows[0]["device_bytes"] / (1 << 30), color="black", linewidth=0.8, linestyle="--", label="the GPU")
    axes.set_xlabel("seconds")
    axes.set_ylabel("GiB held")
    return _save(figure, axes, "memory")


def _sweep(sweep: str, rows: list[dict[str, Any]]) -> Path:
    """TFLOP/s over what varies, a line a contestant; the floor is what memory and tensor cores allow at most."""
    figure, axes = _figure()
    at = [max(row["x"], 512) for row in rows] if sweep == "prefix" else [row["x"] for row in rows]
    axes.plot(at, [row["operations"] / row["floor_us"] / 1e6 for row in rows], "--", color="gray", label="the floor")
    for name, label in NAMES.items():
        if all(name in row for row in rows):
            rate = [row["operations"] / row[name] / 1e6 for row in rows]
            axes.plot(at, rate, marker="o", markersize=3, color=COLOURS[name], label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{row['x']:,}" for row in rows])
    axes.set_xlabel(SWEEPS[sweep])
    axes.set_ylabel("TFLOP/s")
    return _save(figure, axes, f"prefill_{sweep}")


def _figure() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sglang-vtensor"  # the same results, the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    return figure, axes


def _save(figure: Any, axes: Any, name: str) -> Path:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
