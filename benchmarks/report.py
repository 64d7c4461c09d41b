"""Write the numbers of `benchmarks/results/*.json` into README.md and docs/benchmarks.md, between their marks.

    python -m benchmarks.report           rewrite both pages, and draw the plots into docs/plots
    python -m benchmarks.report --check   exit with 1 if one of the pages says anything else

A file of fewer than three rounds, or of more than one commit, is refused (`benchmarks.evidence`).

A mark is `<!-- results NAME -->` or `<!-- short NAME -->`, up to the next `<!-- end -->`. NAME is a results file.
TABLES makes its whole table, and SHORT the part of it that README shows.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import evidence, plots, results, rounds
from benchmarks.kernel_tables import fp8_decode, fp8_prefill, plain_decode, prefill, shared_decode
from benchmarks.results import Record, source, where
from benchmarks.server_tables import accuracy, gpu_tests, live_tokens, logprobs, rollout, servers

#: What the workloads of the prefix suite are, in a few words.
WORKLOADS = {
    "chat": "chat: 64 conversations under one system prompt",
    "documents": "documents: many questions on each long text",
    "tree": "tree: prompts that branch",
    "chat_full": "chat, in a cache with room for half of it",
}
ROOT = Path(__file__).parents[1]
#: The pages that have marks.
PAGES = (ROOT / "README.md", ROOT / "docs/benchmarks.md")


def host(record: Record) -> str:
    """Rates of both engines on the host backend: medians, and the least and the most of the rounds."""
    lines = ["| chat on the host backend, tokens/s | SGLang, torch_native | vtensor | ratio |", "|---|---|---|---|"]
    for part, what in (("prefill", "new prompt tokens"), ("decode", "answers")):
        of = {
            engine: [row[part] for row in record["rows"] if row["engine"] == engine]
            for engine in ("torch_native", "vtensor")
        }
        cells = []
        for values in of.values():
            _, middle, least, most = rounds.spread(values)
            cells.append(f"{middle:,.0f} ({least:,.0f} to {most:,.0f})")
        _, middle, least, most = rounds.spread([mine / theirs for theirs, mine in zip(*of.values(), strict=True)])
        lines.append(f"| {what} | {' | '.join(cells)} | {middle:.2f} ({least:.2f} to {most:.2f}) |")
    lines += ["", "| on the scheduling thread, microseconds | SGLang, core in Rust | in Python | vtensor |"]
    lines.append("|---" * 4 + "|")
    for name, count in (("100", "100"), ("10k", "10,000")):
        times = [f"{record['summary'][f'{core}turn_us_at_{name}']:.0f}" for core in ("rust_", "python_", "")]
        memory = record["summary"][f"turn_memory_us_at_{name}"]
        lines.append(
            f"| a turn in tree and pools, {count} conversations cached | {' | '.join(times)}, of these {memory:.0f} "
            "for placing and backing |"
        )
    if "grouping_us_256" in record["summary"]:
        took = record["summary"]["grouping_us_256"]
        lines.append(f"| who shares what, a decode step of 256 requests, two of them new | | | {took:.0f} |")
    return "\n".join([*lines, "", source(record)])


def serving(record: Record) -> str:
    """Whole servers."""
    lines = [
        "| workload | server | tokens/s | TTFT median | TTFT p99 | mapping, share of time | worker | vtensor / it |",
        "|---" * 8 + "|",
    ]

    def middle(server: str, kind: str, key: str) -> float:
        rows = [row for row in record["rows"] if row["contestant"] == server and row["workload"] == kind]
        return statistics.median(row[key] for row in rows)

    def worker(server: str, kind: str) -> str:
        if not all("worker_share" in row for row in record["rows"]):
            return "not counted"
        return f"{middle(server, kind, 'worker_share'):.2%}"

    for kind in dict.fromkeys(row["workload"] for row in record["rows"]):
        for server in dict.fromkeys(row["contestant"] for row in record["rows"]):
            ratio = middle("vtensor", kind, "tokens_per_second") / middle(server, kind, "tokens_per_second")
            lines.append(
                f"| {kind} | {server} | {middle(server, kind, 'tokens_per_second'):,.0f} | "
                f"{middle(server, kind, 'ttft_median_ms'):.0f} ms | {middle(server, kind, 'ttft_p99_ms'):.0f} ms | "
                f"{middle(server, kind, 'mapping_share'):.2%} | {worker(server, kind)} | {ratio:.3f} |"
            )
    end = source(record)
    if max(row["start"] for row in record["rows"]):  # after one start each, the first contestant has compiled for all
        end = f"Start-up takes {record['summary']['startup_extra_s']:+.1f} s. {end}"
    return "\n".join([*lines, "", end])


def prefix(record: Record) -> str:
    """The prefix-caching suite."""
    return _side_by_side(record) if "comparisons" in record else _one_after_another(record)


def _side_by_side(record: Record) -> str:
    """Rounds that alternate: medians, and the least and the most of throughput and of ratios."""
    head = ["workload", "server", "rounds", "requests/s", "tokens/s", "TTFT", "p99", "TPOT", "cached", "mapping"]
    head += ["worker", "vtensor / it"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in _strongest_first(record["comparisons"]):
        cached = f"{one['cached_share']:.1%}" if "cached_share" in one else "not told"
        ratio = (
            f"**{one['ratio']:.3f}** ({one['ratio_least']:.3f} to {one['ratio_most']:.3f})" if "ratio" in one else ""
        )
        lines.append(
            f"| {one['workload']} | {one['contestant']} | {one['rounds']} | {one['requests_per_second']:.2f} | "
            f"{one['tokens_per_second']:,.0f} ({one['least']:,.0f} to {one['most']:,.0f}) | "
            f"{one['ttft_median_ms']:.0f} ms | {one['ttft_p99_ms']:.0f} ms | {one['tpot_median_ms']:.1f} ms | "
            f"{cached} | {one['mapping_share']:.2%} | {one['worker_share']:.1%} | {ratio} |"
        )
    end = [text for one in record["comparisons"] if (text := _by_clock(one))]
    kinds = list(dict.fromkeys(one["workload"] for one in record["comparisons"]))
    for other, name in (("best", "the stronger of `fa3` and `fa3-page128`"), ("vllm", "vLLM")):
        if measured := [kind for kind in kinds if f"{kind}_vs_{other}" in record["summary"]]:
            said = ", ".join(f"{kind} {_ratio(record['summary'], f'{kind}_vs_{other}')}" for kind in measured)
            end.append(f"Throughput over that of {name}, the median of the rounds (least to most): {said}.")
    return "\n".join([*lines, "", *_of_all(record["summary"], end), source(record)])


def _strongest_first(comparisons: list[Record]) -> list[Record]:
    """Of the contestants that ran together: by throughput, but Triton behind the others, and ours last."""
    together = list(dict.fromkeys((one["workload"], one["among"]) for one in comparisons))

    def rank(one: Record) -> tuple[int, int, float]:
        name = one["contestant"]
        last = ("triton", "vtensor").index(name) + 1 if name in ("triton", "vtensor") else 0
        return together.index((one["workload"], one["among"])), last, -one["tokens_per_second"]

    return sorted(comparisons, key=rank)


def _by_clock(one: Record) -> str:
    """What is said of a contestant whose requests came by the clock of a trace; "" for others. Other people's clients
    do not tell all of it."""
    if "goodput_share" not in one:
        return ""
    speed = f" at {one['speed']:.2f} times the recorded speed" if "speed" in one else ""
    targets = ", ".join(f"{key[:4].upper()} at most {one[key]:.0f} ms" for key in rounds.TARGETS if key in one)
    said = (
        f"- {one['workload']}{speed}, {one['contestant']}: {one['goodput_requests_per_second']:.2f} good requests/s, "
        f"{one['goodput_share']:.1%} of all"
    )
    said += f" ({targets})" if targets else ""
    return said + (f"; it sustained {one['sustained_speed']:.2f}" if "sustained_speed" in one else "")


def third_party(record: Record) -> str:
    """Other people's benchmarks, each with its own command line."""
    ran = {row["workload"]: row["upstream"] for row in record["rows"]}
    return "\n".join([_side_by_side(record), "", *(f"- {kind}: `{command}`" for kind, command in ran.items())])


def _ratio(summary: dict[str, float], key: str) -> str:
    return f"**{summary[key]:.2f}** ({summary[f'{key}_least']:.2f} to {summary[f'{key}_most']:.2f})"


def _one_after_another(record: Record) -> str:
    """Files from before servers stood side by side."""
    lines = [
        "| workload | server | requests/s | tokens/s | TTFT | p99 | TPOT | cached | mapping | worker | vtensor / it |",
        "|---" * 11 + "|",
    ]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault((row["workload"], row["contestant"]), []).append(row)

    def middle(workload: str, server: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[workload, server])

    def worker(workload: str, server: str) -> float:
        """The share of time that the mapping worker was busy for; there is none with SGLang's own memory."""
        return statistics.median(row.get("worker_seconds", 0.0) / row["seconds"] for row in rows[workload, server])

    kinds = list(dict.fromkeys(workload for workload, _ in rows))
    for workload, server in sorted(rows, key=lambda key: (kinds.index(key[0]), key[1] == "vtensor")):
        ratio = middle(workload, "vtensor", "tokens_per_second") / middle(workload, server, "tokens_per_second")
        lines.append(
            f"| {workload} | {server} | {middle(workload, server, 'requests_per_second'):.2f} | "
            f"{middle(workload, server, 'tokens_per_second'):,.0f} | "
            f"{middle(workload, server, 'ttft_median_ms'):.0f} ms | "
            f"{middle(workload, server, 'ttft_p99_ms'):.0f} ms | {middle(workload, server, 'tpot_median_ms'):.1f} ms | "
            f"{middle(workload, server, 'cached_share'):.1%} | {middle(workload, server, 'mapping_share'):.2%} | "
            f"{worker(workload, server):.1%} | {ratio:.3f} |"
        )
    return "\n".join([*lines, "", *_of_all(record["summary"], []), source(record)])


def _of_all(summary: dict[str, float], end: list[str]) -> list[str]:
    """What a summary says of all workloads together, after `end`."""
    if "geomean_vs_triton" in summary:
        mean, most = summary["geomean_vs_triton"], summary["max_vs_triton"]
        end.append(f"Against Triton {mean:.2f} times in the geometric mean of what shares, {most:.2f} at most.")
    if "ttft_p99_vs_fa3_worst" in summary:
        end.append(f"The p99 TTFT of fa3 is {summary['ttft_p99_vs_fa3_worst']:.2f} of ours at worst.")
    if "runs_per_context_chat" in summary:
        end.append(f"In chat a context was {summary['runs_per_context_chat']:.2f} runs of addresses in the mean.")
    return end


def suite(record: Record) -> str:
    """The suite as it is measured now: the picture has these numbers, and no earlier ones."""
    return f"{prefix(record)}\n\n![Throughput by workload](plots/prefix.svg)"


def hit_rates(record: Record) -> str:
    """How much of a trace is found, by the cache's size and tree."""
    rows = {(row["room"], row["tree"]): row for row in record["rows"]}
    trees = list(dict.fromkeys(tree for _, tree in rows))
    lines = [f"| room for | tokens | {' | '.join(trees)} |", "|---" * (2 + len(trees)) + "|"]
    for room in dict.fromkeys(room for room, _ in rows):
        rates = " | ".join(f"{rows[room, tree]['hit_rate']:.2%}" for tree in trees)
        lines.append(f"| {room} | {rows[room, trees[0]]['room_tokens']:,} | {rates} |")
    some = record["rows"][0]
    asked = f"{some['requests']:,} requests with {some['prompt_tokens']:,} tokens of prompts."
    return "\n".join([*lines, "", f"{asked} {source(record)}"])


def memory(record: Record) -> str:
    """What servers hold of a GPU."""
    lines = []
    held = [row for row in record["rows"] if row["part"] == "held"]
    if held:
        lines += _held(held)
    said = {
        "freed_share_idle": "of the GPU is free that SGLang would hold, idle",
        "freed_share_one": "in one conversation",
        "bytes_over_live_worst": "times the bytes of live and cached tokens and the reserve are held, at worst",
        "returned_share_5s": "of what a burst freed is back with the driver within 5 s",
        "throughput_vs_backed": "times the throughput of the same server with everything backed at start",
        "ttft_after_trim_vs_warm": "times the p99 time to the first token, in the first burst after a trim",
        "two_servers_vs_alone": "times the throughput of a server alone, for each of two that peak in turns",
    }
    for key, text in said.items():
        if key in record["summary"]:
            value = record["summary"][key]
            lines.append(f"- {f'{value:.1%}' if 'share' in key else f'{value:.3f}'} {text}")
    lines += [f"- A second server of SGLang as it ships: {row['said']}" for row in record["rows"] if "said" in row]
    end = ["", "![Memory over time](plots/memory.svg)"] if held else []
    return "\n".join([*lines, "", source(record), *end])


def _held(rows: list[dict[str, Any]]) -> list[str]:
    phases = list(rows[0]["used"])
    lines = [f"| GiB of the GPU held | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for row in rows:
        name = "vtensor" if row["what"] == "vtensor" else "SGLang as it ships"
        sizes = (row["used"][phase] / (1 << 30) for phase in phases)
        lines.append(f"| {name} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")
    return [*lines, ""]


TABLES = {
    "host": host,
    "serving": serving,
    "serving_triton": serving,  # Triton attention too, in another run: ratios are its own
    "prefix": suite,
    "third_party": third_party,
    "moves": prefix,
    "prefix_segments": prefix,
    "prefix_0517": prefix,
    "fp8": prefix,
    "fp8_decode": fp8_decode,
    "fp8_prefill": fp8_prefill,
    "live_tokens": live_tokens,
    "models": prefix,
    "qwen3moe": prefix,
    "rollout": rollout,
    "logprobs": logprobs,
    "logprobs_fp8_e4m3": logprobs,
    "accuracy": accuracy,
    "accuracy_fp8_e4m3": accuracy,
    "prefill": prefill,
    "shared_decode": shared_decode,
    "plain_decode": plain_decode,
    "hit_rates": hit_rates,
    "memory": memory,
    "servers": servers,
    "servers_both": servers,
    "servers_three": servers,
    "servers_kvcached": servers,
    "servers_third": servers,
    "servers_killed": servers,
    "servers_idle": servers,
    "servers_cold": servers,
    "gpu_tests": gpu_tests,
}


def prefix_short(record: Record) -> str:
    """Throughput of whole servers on what shares prefixes, beside SGLang's own with each of its two page sizes."""
    lines = [
        "| requests that share | SGLang, tokens/s | with pages of 128 | vtensor | vtensor / the stronger |",
        "|---" * 5 + "|",
    ]
    rates = {(one["workload"], one["contestant"]): one["tokens_per_second"] for one in record["comparisons"]}
    for kind in dict.fromkeys(one["workload"] for one in record["comparisons"]):
        if f"{kind}_vs_best" in record["summary"]:
            row = " | ".join(f"{rates[kind, server]:,.0f}" for server in ("fa3", "fa3-page128", "vtensor"))
            lines.append(f"| {WORKLOADS.get(kind, kind)} | {row} | {_ratio(record['summary'], f'{kind}_vs_best')} |")
    return "\n".join([*lines, "", where(record)])


def memory_short(record: Record) -> str:
    """What two kinds of servers hold of a GPU."""
    return "\n".join([*_held([row for row in record["rows"] if row["part"] == "held"]), where(record)])


SHORT = {"prefix": prefix_short, "memory": memory_short}


def render(text: str) -> str:
    """A page with every marked block made anew. Raises `KeyError` for a mark without a function, `evidence.Refused` for
    a results file that has too few rounds, or more than one commit."""

    def block(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        table, record = (TABLES if kind == "results" else SHORT)[name], results.read(name)
        if record is None:
            return f"<!-- {kind} {name} -->\nNot measured yet.\n<!-- end -->"
        again = evidence.check(name, record)
        said = [table(record), *([again] if again else [])]
        return "\n".join([f"<!-- {kind} {name} -->", "\n\n".join(said), "<!-- end -->"])

    return re.sub(r"<!-- (results|short) (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(check: Annotated[bool, typer.Option("--check", help="Only compare.")] = False) -> None:
    """Rewrite the pages, or compare them."""
    texts = {page: page.read_text() for page in PAGES}
    try:
        wanted = {page: render(text) for page, text in texts.items()}
    except evidence.Refused as error:
        print(error)
        raise typer.Exit(1) from None
    stale = [str(page.relative_to(ROOT)) for page in PAGES if texts[page] != wanted[page]]
    if check and stale:
        print(f"{', '.join(stale)} does not say what benchmarks/results says: run python -m benchmarks.report")
        raise typer.Exit(1)
    if not check:
        for page in PAGES:
            page.write_text(wanted[page])
        for path in plots.draw():
            print(path)


if __name__ == "__main__":
    typer.run(main)
