"""What rounds say: ratios within a round, their spread over the rounds, and which rows belong together.

A row is one round of one contestant. Contestants that take part in a round have the same `run` and `round` and get the
same requests; a ratio is only ever taken between them. `among` names all contestants of the run. The number of a round
says who goes first, so a later call may add rounds by going on with the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
#: The configurations of SGLang's own FlashAttention-3, of which the stronger one counts.
PEERS = ("fa3", "fa3-page128")
#: What is true of a whole run, and stands at the head of a results file.
HEAD = ("command", "commit", "date", "device", "driver", "versions")
SHOWN = ("requests_per_second", "ttft_median_ms", "ttft_p99_ms", "tpot_median_ms", "cached_share", "mapping_share")
#: Of requests that came by the clock of a trace.
TARGETS = ("ttft_target_ms", "tpot_target_ms")
BY_CLOCK = ("speed", "sustained_speed", *TARGETS, "goodput_requests_per_second", "goodput_share")


class Spread(NamedTuple):
    """Several measurements of one thing."""

    rounds: int
    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Raises `ValueError` for none."""
    if not values:
        raise ValueError("nothing was measured")
    return Spread(len(values), statistics.median(values), min(values), max(values))


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of the contestants in a round: each is first in turn."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def ratios(rows: Sequence[Row], workload: str, other: str, key: str = "tokens_per_second") -> list[float]:
    """Ours over `other`'s, for each round in which both took part."""
    rounds: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["workload"] == workload:
            rounds.setdefault((row["run"], row["round"]), {})[row["contestant"]] = row[key]
    return [both["vtensor"] / both[other] for both in rounds.values() if "vtensor" in both and other in both]


def compare(rows: Sequence[Row]) -> list[Row]:
    """For each workload, company and contestant: how many rounds, how often it was first, medians, the least and the
    most throughput, and ours over it with least and most. What some row does not say is left out."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row["workload"], row["among"]), []).append(row)
    compared = []
    for (workload, among), group in together.items():
        for name in sorted(among.split(","), key=lambda name: (name == "vtensor", name)):
            mine = [row for row in group if row["contestant"] == name]
            if not mine:
                continue
            rate = spread([row["tokens_per_second"] for row in mine])
            one = {"workload": workload, "contestant": name, "among": among, "rounds": rate.rounds}
            one |= {"first": sum(row["place"] == 0 for row in mine), "kv_tokens": mine[0]["kv_tokens"]}
            one |= {"tokens_per_second": rate.median, "least": rate.least, "most": rate.most}
            told = [key for key in (*SHOWN, *BY_CLOCK) if all(key in row for row in mine)]
            one |= {key: round(statistics.median(row[key] for row in mine), 4) for key in told}
            one["worker_share"] = round(
                statistics.median(row.get("worker_seconds", 0.0) / row["seconds"] for row in mine), 4
            )
            if name != "vtensor" and (paired := ratios(group, workload, name)):
                ours = spread(paired)
                one |= {"ratio": round(ours.median, 4), "ratio_least": round(ours.least, 4)}
                one |= {"ratio_most": round(ours.most, 4), "ratio_rounds": ours.rounds}
            compared.append(one)
    return compared


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Ratios of throughput with their spread, and the worst of what must be low.

    Where prompts were computed before the clock started, `<workload>_tpot_vs_` is the other's time a token over ours.

    `<workload>_vs_best` is the lower of the ratios against `PEERS`, and is there where both were measured: if they ran
    in one run, that is the ratio against the stronger one.
    """
    summary: dict[str, float] = {}
    against_triton, waits = [], []
    for kind in dict.fromkeys(row["workload"] for row in rows):
        measured = {
            other: spread(paired)
            for other in dict.fromkeys(row["contestant"] for row in rows)
            if other != "vtensor" and (paired := ratios(rows, kind, other))
        }
        if all(peer in measured for peer in PEERS):
            measured["best"] = min((measured[peer] for peer in PEERS), key=lambda one: one.median)
        for other, ours in measured.items():
            summary[f"{kind}_vs_{other}"] = ours.median
            summary |= {f"{kind}_vs_{other}_least": ours.least, f"{kind}_vs_{other}_most": ours.most}
        if all("goodput_share" in row for row in rows if row["workload"] == kind):
            summary |= _by_clock(rows, kind, measured.keys() - {"best"})
        if any("prompt_seconds" in row for row in rows if row["workload"] == kind):
            for other in measured.keys() - {"best"}:
                slower = ratios(rows, kind, other, "tpot_median_ms")
                summary[f"{kind}_tpot_vs_{other}"] = 1 / statistics.median(slower)
            if "best" in measured:
                summary[f"{kind}_tpot_vs_best"] = min(summary[f"{kind}_tpot_vs_{peer}"] for peer in PEERS)
        if "triton" in measured and kind != "random":
            against_triton.append(measured["triton"].median)
        if slower := ratios(rows, kind, "fa3", "ttft_p99_ms"):
            waits.append(1 / statistics.median(slower))
    if against_triton:
        summary["geomean_vs_triton"] = statistics.geometric_mean(against_triton)
        summary["max_vs_triton"] = max(against_triton)
    if waits:
        summary["ttft_p99_vs_fa3_worst"] = min(waits)
    if ours_rows := [row for row in rows if row["contestant"] == "vtensor"]:
        summary["mapping_share_worst"] = max(row["mapping_share"] for row in ours_rows)
        summary["worker_share_worst"] = max(row["worker_seconds"] / row["seconds"] for row in ours_rows)
        summary["worker_driver_share_worst"] = max(row["worker_driver_seconds"] / row["seconds"] for row in ours_rows)
        for kind in dict.fromkeys(row["workload"] for row in ours_rows):
            of_kind = [row for row in ours_rows if row["workload"] == kind]
            contexts, pages = (sum(row[key] for row in of_kind) for key in ("contexts", "pages_allocated"))
            summary[f"runs_per_context_{kind}"] = sum(row["context_runs"] for row in of_kind) / max(1, contexts)
            summary[f"broken_runs_{kind}"] = sum(row["broken_runs"] for row in of_kind)
            summary[f"pages_with_memory_{kind}"] = sum(row["pages_with_memory"] for row in of_kind) / max(1, pages)
    return summary


def _by_clock(rows: Sequence[Row], kind: str, others: Collection[str]) -> dict[str, float]:
    """Where requests come by the clock, throughput says little: ours over the other's goodput, unless that had none,
    and the other's p99 TTFT over ours. `best` is the lower one against `PEERS`."""
    summary: dict[str, float] = {}
    for other in others:
        summary[f"{kind}_ttft_p99_vs_{other}"] = 1 / statistics.median(ratios(rows, kind, other, "ttft_p99_ms"))
        if all(row["goodput_share"] for row in rows if (row["workload"], row["contestant"]) == (kind, other)):
            good = statistics.median(ratios(rows, kind, other, "goodput_requests_per_second"))
            summary[f"{kind}_goodput_vs_{other}"] = good
    for what in ("ttft_p99", "goodput"):
        of_peers = [summary.get(f"{kind}_{what}_vs_{peer}") for peer in PEERS]
        if None not in of_peers:
            summary[f"{kind}_{what}_vs_best"] = min(one for one in of_peers if one is not None)
    return summary


def is_release(row: Row) -> bool:
    """Whether this is a turn of `benchmarks.rollout --release`, which is no round of anything."""
    return "release_seconds" in row


def of_releases(rows: Sequence[Row]) -> dict[str, float]:
    """Of our own: what the first release freed of what was held, medians of seconds, and what the device had less free
    behind the last release than behind the second one; of others, with their names, seconds and the share."""
    summary: dict[str, float] = {}
    for name in dict.fromkeys(row["contestant"] for row in rows):
        mine = [row for row in rows if row["contestant"] == name]
        end = "" if name.startswith("vtensor") else f"_{name.removesuffix('-saver')}"
        summary[f"freed_share{end}"] = mine[0]["freed_bytes"] / mine[0]["held_bytes"]
        for key in ("release_seconds", "resume_seconds"):
            summary[f"{key}{end}"] = statistics.median(row[key] for row in mine)
        leaked = mine[-1]["used_bytes"] - mine[min(1, len(mine) - 1)]["used_bytes"]
        summary[f"leaked_bytes_{len(mine)}_turns{end}"] = max(0, leaked)
    return summary


class Differ(ValueError):
    """Rows that must not stand in one file. The message says what differs."""


def check_same(heads: Sequence[Row], keys: Sequence[str] = ("commit", "device")) -> None:
    """Raises `Differ` if runs are of several commits and devices (`keys`), or versions of one package."""
    for key in keys:
        if len(found := dict.fromkeys(head[key] for head in heads)) > 1:
            raise Differ(f"{key}: {' and '.join(found)}")
    for package in dict.fromkeys(package for head in heads for package in head["versions"]):
        found = dict.fromkeys(head["versions"][package] for head in heads if package in head["versions"])
        if len(found) > 1:
            raise Differ(f"{package}: {' and '.join(found)}")


def whole(rows: Sequence[Row]) -> list[Row]:
    """Without rounds that a cut-off run left without one of its contestants."""
    took: dict[tuple[str, str, int], set[str]] = {}
    for row in rows:
        took.setdefault(_round(row), set()).add(row["contestant"])
    return [row for row in rows if took[_round(row)] == set(row["among"].split(","))]


def joined(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The whole rounds of several runs, each row with its head in it. A later part replaces a round of an earlier one
    if workload, company and number are equal; as a whole, so that a round is never of two runs. Raises `Differ`."""
    check_same([row for part in parts for row in part])
    kept: list[Row] = []
    for part in map(whole, parts):
        newer = {_round(row) for row in part}
        kept = [row for row in kept if _round(row) not in newer] + part
    return kept


def _round(row: Row) -> tuple[str, str, int]:
    return row["workload"], row["among"], row["round"]


def head_of(rows: Sequence[Row]) -> Row:
    """The head of a results file with these rows: their common commit and device, all versions, all commands, the
    newest date."""
    head = {key: rows[-1][key] for key in HEAD}
    head["versions"] = {package: version for row in rows for package, version in row["versions"].items()}
    head["command"] = " && ".join(dict.fromkeys(one for row in rows for one in row["command"].split(" && ")))
    head["date"] = max(row["date"] for row in rows)
    return head


def with_heads(record: Row) -> list[Row]:
    """The rows of a results file, each with its head in it; none if the file is older than `among`."""
    return _headed(record, [row for row in record["rows"] if "among" in row])


def releases_of(record: Row) -> list[Row]:
    """The releases of a results file, each with its head in it."""
    return _headed(record, record.get("releases", []))


def _headed(record: Row, rows: Sequence[Row]) -> list[Row]:
    head = {key: record[key] for key in HEAD}
    return [head | row for row in rows]
