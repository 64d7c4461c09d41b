"""Tables of `benchmarks.report` about what servers do beside throughput: rollouts, FP8's room, right answers."""

from __future__ import annotations

from benchmarks import results
from benchmarks.results import Record, source


def rollout(record: Record) -> str:
    """Samples of few prompts: whole runs, and the time a token takes; and what a release frees, where measured."""
    lines = [
        "| case | server | rounds | tokens/s | ms a token | whole run, vtensor / it | a token, it / vtensor |",
        "|---" * 7 + "|",
    ]
    summary = record["summary"]
    for one in record["comparisons"]:
        ratio = (
            f"**{one['ratio']:.2f}** ({one['ratio_least']:.2f} to {one['ratio_most']:.2f})" if "ratio" in one else ""
        )
        a_token = summary.get(f"{one['workload']}_tpot_vs_{one['contestant']}")
        lines.append(
            f"| {one['workload']} | {one['contestant']} | {one['rounds']} | {one['tokens_per_second']:,.0f} | "
            f"{one['tpot_median_ms']:.1f} | {ratio} | {'' if a_token is None else f'**{a_token:.2f}**'} |"
        )
    if "freed_share" in summary and "freed_share_fa3" in summary:
        lines += [
            "",
            f"A release frees {summary['freed_share']:.3f} times the bytes that the cache holds, in "
            f"{summary['release_seconds']:.3f} s ({summary['release_seconds_fa3']:.3f} s of SGLang's); a resume takes "
            f"{summary['resume_seconds']:.3f} s ({summary['resume_seconds_fa3']:.3f} s).",
        ]
    return "\n".join([*lines, "", source(record)])


SERVERS = {
    "two_short_vs_alone": "The worst peak of two that take turns has {:.3f} times the throughput of a server alone.",
    "both_share": "While both have a peak, one holds {:.3f} times the other one's memory.",
    "three_ttft_p99_vs_static": "The p99 TTFT of three SGLang servers with static thirds is {:.2f} times that of ours.",
    "kvcached_ttft_p99_vs_static": "With static thirds of its SGLang it is {:.2f} times that of kvcached.",
    "idle_footprint": "An idle server holds {:.2f} times what SGLang's holds without its KV pool.",
    "kvcached_idle_footprint": "An idle server with kvcached holds {:.2f} times that.",
    "third_first_answer_s": "A third server answers {:.0f} s after its start.",
    "behind_a_stranger": "A peak behind the stranger's has {:.3f} times the throughput of one before.",
    "two_short_changed_hands_bytes": "{:,.0f} bytes changed hands meanwhile.",
    "requests_failed": "{:.0f} requests failed.",
    "cold_start_extra_s": "The first answer comes {:+.1f} s after SGLang's, with no kernel compiled.",
    "cold_full_speed_extra_s": "No kernel is left to compile {:+.1f} s after SGLang's first answer.",
}
#: Who is measured at intermittent peaks of three, by the part of its rows.
OF_THREE = {"three": "three of ours", "kvcached": "three with kvcached", "static": "three of SGLang, static thirds"}


def servers(record: Record) -> str:
    """Several servers on one GPU: what was measured of it."""
    rows = record["rows"]
    told = [f"- {text.format(record['summary'][key])}" for key, text in SERVERS.items() if key in record["summary"]]
    if any(row["part"] == "killed" and row["given_bytes"] > 0 for row in rows):
        told.append("- Among them are those of a server whose neighbour was killed as it gave memory.")
    gain, theirs = "three_ttft_p99_vs_static", "kvcached_ttft_p99_vs_static"
    ours = results.read("servers_three")
    if theirs in record["summary"] and ours is not None and gain in ours["summary"]:
        ratio = ours["summary"][gain] / record["summary"][theirs]
        told.append(f"- Over static thirds of its own SGLang, ours gains {ratio:.2f} times what kvcached does.")
    lines = []
    for whole in (row for row in rows if row["part"] in OF_THREE and row["what"].endswith(", all")):
        beside = [row for row in rows if (row["part"], row.get("round")) == (whole["part"], whole.get("round"))]
        each = [f"{row['ttft_p99_ms']:,.0f}" for row in beside if row is not whole]
        lines.append(
            f"| {OF_THREE[whole['part']]} | {whole.get('round', 0) + 1} | {whole['requests']} | {whole['failed']} | "
            f"{whole['ttft_p99_ms']:,.0f} ms ({', '.join(each)}) | {whole['ttft_median_ms']:,.0f} ms | "
            f"{whole['tpot_median_ms']:.1f} ms | {whole['tokens_per_second']:,.0f} |"
        )
    if lines:
        told += [
            "",
            "| servers | round | answers | failed | p99 TTFT (of each server) | median TTFT | TPOT | tokens/s |",
        ]
        told += ["|---" * 8 + "|", *lines]
    return "\n".join([*told, "", source(record)])


def gpu_tests(record: Record) -> str:
    """How many tests passed on a GPU, and the names of those that did not."""
    summary = record["summary"]
    lines = [f"{summary['passed']:.0f} tests passed, {summary['failed']:.0f} failed, {summary['skipped']:.0f} skipped:"]
    lines.append("")
    for row in record["rows"]:
        if row["outcome"] != "passed":
            lines.append(f"- {row['outcome']}: `{row['test']}`, at commit {row.get('commit', record['commit'])}")
    return "\n".join([*lines, "", source(record)])


#: What is compared, by the rows of `benchmarks.logprobs`, in the order of the table.
LOGPROBS = {
    "fa3 decode, one at a time": "SGLang, decode: each text alone",
    "vtensor decode": "vtensor, decode that reads shared prefixes once",
    "vtensor-plain decode": "vtensor, decode with `--vtensor-shared-decode off`",
    "fa3 prefill, one at a time": "SGLang, prefill: each text alone",
    "vtensor prefill": "vtensor, prefill",
    "fa3:fp8_e4m3 decode": "SGLang over FP8, decode",
    "vtensor:fp8_e4m3 decode": "vtensor over FP8, decode that reads shared prefixes once",
    "vtensor-plain:fp8_e4m3 decode": "vtensor over FP8, decode with `--vtensor-shared-decode off`",
    "fa3:fp8_e4m3 prefill": "SGLang over FP8, prefill",
    "vtensor:fp8_e4m3 prefill": "vtensor over FP8, prefill",
}


def logprobs(record: Record) -> str:
    """How far log-probabilities of equal tokens are from those of SGLang's FlashAttention-3 with all texts at once."""
    rows = {row["what"]: row for row in record["rows"]}
    lines = ["| log-probabilities of | tokens compared | mean difference | p99 | greatest |", "|---" * 5 + "|"]
    for what, name in LOGPROBS.items():
        if (row := rows.get(what)) is None:
            continue
        numbers = " | ".join(f"{row[key]:.4f}" for key in ("mean", "p99", "max"))
        lines.append(f"| {name} | {row['tokens']:,} | {numbers} |")
    return "\n".join([*lines, "", source(record)])


def live_tokens(record: Record) -> str:
    """What an FP8 cache is worth in the same memory."""
    live = {row["cache"]: row["live_tokens"] for row in record["rows"] if row["part"] == "live"}
    summary = record["summary"]
    told = [
        f"- {live['fp8']:,} live tokens before the first request is retracted, and {live['bf16']:,} in bf16: "
        f"**{summary['fp8_live_tokens_vs_bf16']:.2f}** times as many",
        f"- 1/{summary['fp8_overload_ttft_p99_vs_bf16']:.2f} of the p99 TTFT under 1.5 times the load that fits in "
        f"bf16, and {summary['fp8_overload_tokens_per_second_vs_bf16']:.2f} times the tokens/s",
    ]
    return "\n".join([*told, "", source(record)])


#: Columns; older files do not have all of them.
ACCURACY = {
    "questions": "asked",
    "sglang": "right, SGLang",
    "again": "right, SGLang with pages of 64",
    "vtensor": "right, vtensor",
    "same": "word for word the same",
    "same_again": "the same, SGLang twice",
    "same_vtensor": "the same, vtensor",
}


def accuracy(record: Record) -> str:
    """Right answers with and without the plugin."""
    rows = record["rows"]
    keys = [key for key in ACCURACY if key in rows[0]]
    lines = [f"| questions | tokens | {' | '.join(ACCURACY[key] for key in keys)} |", "|---" * (2 + len(keys)) + "|"]
    for row in rows:
        lines.append(f"| {row['kind']} | {row['tokens']:,} | {' | '.join(str(row[key]) for key in keys)} |")
    lines.append(f"| all | | {' | '.join(str(sum(row[key] for row in rows)) for key in keys)} |")
    return "\n".join([*lines, "", source(record)])
