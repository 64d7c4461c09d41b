"""What a results file must have before `benchmarks.report` shows a table of it: one commit, and three rounds."""

from __future__ import annotations

import re

from benchmarks.results import Record

ROUNDS = 3
#: Files without clocks, in which something is counted once.
COUNTED = (
    *("hit_rates", "accuracy", "accuracy_fp8_e4m3", "logprobs", "logprobs_fp8_e4m3", "gpu_tests"),
    *("servers_killed", "servers_idle"),
)
#: Files that do not meet this yet, and why. Their tables say so. An entry goes when its file is measured anew.
NOT_YET = {
    "gpu_tests": "its tests ran at several commits",
    "memory": "its parts ran once each, at two commits",
    "servers": "the server alone had two peaks",
    "servers_both": "its peak ran once",
    "servers_three": "its peaks ran once",
    "prefill": "the spread of its rounds was not kept",
    "shared_decode": "the spread of its rounds was not kept",
    "plain_decode": "the spread of its rounds was not kept",
    "prefix_0517": "it has two rounds, of two commits",
    "serving": "its rounds are not told apart",
    "serving_triton": "it has one round",
}


class Refused(ValueError):
    """A results file of which no table is shown. The message says why, and what to do."""


def lacking(name: str, record: Record) -> str:
    """What the results file of this name lacks; "" if nothing."""
    commits = {record["commit"], *(row["commit"] for row in record["rows"] if "commit" in row)}
    if len(commits) > 1 or not re.fullmatch(r"[0-9a-f]{7,40}", record["commit"]):
        return f"its rows are of {', '.join(sorted(commits))}, and not of one commit without changes"
    if name in COUNTED or (rounds := fewest_rounds(record)) >= ROUNDS:
        return ""
    return f"{rounds or 'no'} rounds are told apart, and not {ROUNDS}"


def fewest_rounds(record: Record) -> int:
    """Of all that a results file compares; 0 if its rows do not say."""
    rows = record["rows"]
    if "comparisons" in record:
        return min((int(one["rounds"]) for one in record["comparisons"]), default=0)
    if all("rounds" in row for row in rows):
        return min((int(row["rounds"]) for row in rows), default=0)
    timed = [row for row in rows if "round" in row or "seconds" in row]  # others count something, once
    if timed and all("round" in row for row in timed):
        parts = {row.get("part") for row in timed}
        return min(len({row["round"] for row in timed if row.get("part") == part}) for part in parts)
    return 0


def check(name: str, record: Record) -> str:
    """A sentence that stands under the table of a file in `NOT_YET`; "" for others. Raises `Refused` for a file that
    lacks something, and for one in `NOT_YET` that lacks nothing any more."""
    what = lacking(name, record)
    if name in NOT_YET and what:
        return f"**To be measured again**: {NOT_YET[name]}."
    if name in NOT_YET:
        raise Refused(f"{name}.json has its rounds and its commit now: take it from benchmarks.evidence.NOT_YET")
    if what:
        raise Refused(f"{name}.json is refused: {what}. Measure it anew, at one commit: {record['command']}")
    return ""
