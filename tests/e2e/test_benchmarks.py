"""The prefix-caching suite runs, and that of several servers: all is served and counted; no time is asserted."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import results, rollout, rounds, servers

ROOT = Path(__file__).parents[2]


def test_the_prefix_suite_runs_on_the_host(tmp_path):
    lengths = [(700, 5), (690, 3), (9000, 3), (1030, 9)]
    trace = tmp_path / "trace.jsonl"
    with trace.open("w") as file:
        for n, (prompt, new) in enumerate(lengths):
            blocks = [0, *range(10 * n, 10 * n + prompt // 512)]
            entry = {"timestamp": 100 * n, "input_length": prompt, "output_length": new, "hash_ids": blocks}
            file.write(json.dumps(entry) + "\n")
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.prefix", "--quick", "--rounds", "1", "--trace", str(trace)]
    done = subprocess.run(
        [*command, "--no-write", "--rows", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["workload"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"chat", "chat_full", "agent", "documents", "tree", "random", "trace", "conversation"}
    assert rows["trace"]["requests"] == rows["conversation"]["requests"] == 3, "one is too long"
    assert rows["conversation"]["speed"] == 1
    assert 0 < rows["conversation"]["sustained_speed"] <= 1, "the last request comes before the last answer"
    assert 0 <= rows["conversation"]["goodput_share"] <= 1
    assert rows["random"]["cached_share"] == 0
    for kind in ("chat", "agent", "documents", "tree"):
        assert rows[kind]["cached_share"] > 0.3, kind
    # Every turn goes on where the last one ended: the system prompt, and its own.
    assert rows["chat"]["context_runs"] <= 2.05 * rows["chat"]["contexts"]
    assert all(row["requests_per_second"] > 0 and row["ttft_median_ms"] > 0 for row in rows.values())


def test_other_peoples_benchmarks_run_on_the_host(tmp_path):
    trace, out = tmp_path / "trace.jsonl", tmp_path / "rows.json"
    with trace.open("w") as file:
        for n in range(3):
            entry = {"timestamp": 100 * n, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1, 2 + n]}
            file.write(json.dumps(entry) + "\n")
    agents = tmp_path / "agents.json"
    turns = [
        {"messages": [{"role": "user", "content": f"What is in file {n}?"}], "prompt_tokens": 50} for n in range(3)
    ]
    turns[0]["messages"].insert(0, {"role": "system", "content": "You mend programs. " * 8})
    agents.write_text(json.dumps({"metadata": {}, "conversations": [turns, turns[:2]]}))
    files = ("--trace", str(trace), "--agentic", str(agents))
    run("benchmarks.third_party", "--quick", "--rounds", "1", *files, "--rows", str(out))
    rows = {row["workload"]: row for row in json.loads(out.read_text())}
    assert {kind: row["requests"] for kind, row in rows.items()} == {"gsp": 6, "mooncake": 3, "agentic": 5}
    assert {kind: row["output_tokens"] for kind, row in rows.items()} == {
        "gsp": 6 * 8,
        "mooncake": 3 * 5,
        "agentic": 5 * 8,
    }
    assert all(row["prompt_tokens"] > 20 * row["requests"] for row in rows.values())
    assert rows["mooncake"]["cached_share"] > 0.3, "requests that come after each other share two blocks"
    for row in rows.values():
        assert row["upstream"].startswith("python -m sglang.bench_serving --dataset-name ")
        assert row["contexts"] > row["requests"], "what our server counted stands beside what upstream's client says"


def run(*command: str) -> str:
    """What a benchmark printed."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_rollouts_run_on_the_host(tmp_path):
    before = {path.name for path in results.FOLDER.iterdir()}
    run("benchmarks.rollout", "--quick", "--rounds", "1", "--rows", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    released = [row for row in rows if rounds.is_release(row)]
    assert {row["contestant"] for row in released} == {"vtensor"}
    ran = [row for row in rows if not rounds.is_release(row)]
    assert {row["workload"] for row in ran} == set(rollout.QUICK)
    for row in ran:
        case = rollout.QUICK[row["workload"]]
        assert row["requests"] == case.groups * case.samples
        assert row["prompt_seconds"] > 0
        assert row["cached_share"] > 0.5, "samples computed their prompts again"
    assert {path.name for path in results.FOLDER.iterdir()} == before, "nobody asked for a result"


def test_log_probabilities_are_compared_on_the_host():
    printed = run("benchmarks.logprobs", "--quick")
    (summary,) = (line for line in printed.splitlines() if "'logprob_difference_max'" in line)
    assert "vtensor prefill" in printed
    assert 0 <= float(summary.split("'logprob_difference_max': ")[1].split(",")[0]) < 1e-3


def test_log_probabilities_over_fp8_are_compared_on_the_host():
    printed = run("benchmarks.logprobs", "--quick", "--fp8")
    told = dict(re.findall(r"'(logprob_difference_mean_fp8\w*)': ([0-9.e-]+)", printed))
    assert len(told) == 4
    for what in ("", "_prefill"):
        theirs, ours = (float(told[f"logprob_difference_mean_fp8{who}{what}"]) for who in ("_torch_native", ""))
        assert ours == pytest.approx(theirs, abs=1e-4), "what FP8 changes, it changes on both sides alike"


def test_a_cache_is_filled_until_a_request_is_retracted():
    printed = run("benchmarks.live_tokens", "--quick", "--count", "120", "--rounds", "1")
    ratio = float(re.findall(r"'fp8_live_tokens_vs_bf16': ([0-9.]+)", printed)[0])
    assert 2.5 < ratio < 6, "the same bytes hold four times as many tokens in FP8, but for how often it is asked"


def test_what_the_host_benchmark_times_runs():
    from benchmarks import grouping, turns, unified

    assert grouping.step_us(8, 2) > 0
    sides = {"ours": turns.Ours, "rust": unified.Stock, "python": partial(unified.Stock, core="python")}
    took = unified.measure(sides, conversations=20, turns=10)
    assert took["ours"] > took["ours memory"] > 0
    assert took["rust"] > took["rust memory"] == 0
    assert took["python"] > took["python memory"] == 0


def test_the_suite_of_several_servers_runs_on_the_host(tmp_path):
    """Memory is not short there, so nothing needs to change hands; but a server is killed in the middle."""
    out = tmp_path / "rows.json"
    run("benchmarks.servers", "--quick", "--rows", str(out), "--parts", "killed")
    (row,) = json.loads(out.read_text())
    assert row["part"] == "killed"
    assert row["requests"] > 0
    assert servers.summarize([row]) == {"requests_failed": 0}
