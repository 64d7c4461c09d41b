"""Traces by the clock: what is replayed, when, and what counts as good."""

import contextlib
import json
import threading
from types import SimpleNamespace

import pytest
import typer

from benchmarks import contestants, prefix, report, rounds, workloads

TARGETS = workloads.Targets(ttft_ms=100, tpot_ms=10)


@pytest.fixture
def trace(tmp_path):
    """Three requests in 200 ms, and one that is too long."""
    requests = [(0, [0, 1], 700), (100, [0, 2], 600), (150, list(range(200)), 100_000), (200, [0, 1, 3], 1100)]
    file = tmp_path / "trace.jsonl"
    with file.open("w") as lines:
        for at, blocks, prompt in requests:
            entry = {"timestamp": at, "input_length": prompt, "output_length": 4, "hash_ids": blocks}
            lines.write(json.dumps(entry) + "\n")
    return file


class Asked(contestants.Client):
    """Remembers what it was asked for."""

    async def ask(self, http, tokens, new):
        self.seen = [*getattr(self, "seen", []), (tokens, new)]
        return [0] * new


def replayed(replay, monkeypatch):
    """What is asked for, and after how many seconds."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(workloads.asyncio, "sleep", sleep)
    client = Asked("http://nobody", 400)
    client.drive(replay, seed=3)
    return client.seen, waits


def test_equal_blocks_are_equal_tokens_and_requests_come_by_the_clock(trace, monkeypatch):
    made = workloads.workloads(False, trace, 2.0)
    seen, waits = replayed(made["conversation"], monkeypatch)
    assert [(len(tokens), new) for tokens, new in seen] == [(700, 4), (600, 4), (1100, 4)], "one is too long"
    first, second, third = (tokens for tokens, _ in seen)
    assert first[:512] == second[:512] == third[:512]
    assert first[512:] == third[512:700]
    assert first[512:600] != second[512:600]
    assert all(6 <= token < 400 for token in third)
    assert [arrival.at for arrival in made["conversation"].arrivals] == [0, 0.05, 0.1], "twice as fast"
    assert [arrival.at for arrival in made["conversation_fast"].arrivals] == pytest.approx([0, 0.1 / 3, 0.2 / 3])
    assert waits == [0, 0.05, 0.1]
    assert {arrival.at for arrival in made["conversation"].short().arrivals} == {0}


def test_a_request_is_good_that_meets_both_targets(trace):
    answers = [
        contestants.Answer(0.0, first, last, 0.0, 10, 0, 11) for first, last in ((0.1, 0.2), (0.2, 0.25), (0.05, 0.5))
    ]
    assert [TARGETS.met(answer) for answer in answers] == [True, False, False]
    replay = workloads.replay(trace, 10, 64_000, 2.0)
    told = replay.told(answers, 0.4, TARGETS)
    assert (told["goodput_share"], told["goodput_requests_per_second"]) == (0.3333, 2.5)
    assert told["sustained_speed"] == 0.5, "0.2 s of the trace took 0.4 s"


def test_the_clock_has_its_own_ratios(tmp_path, monkeypatch):
    rows = []
    for name, good, wait in (("vtensor", 0.9, 100.0), ("fa3", 0.6, 150.0), ("fa3-page128", 0.5, 80.0)):
        row = {
            "workload": "conversation",
            "contestant": name,
            "among": "fa3,fa3-page128,vtensor",
            "run": "a",
            "round": 1,
        }
        row |= {"place": 0, "tokens_per_second": 100.0, "requests_per_second": 1.0, "ttft_median_ms": 50.0}
        row |= {"ttft_p99_ms": wait, "tpot_median_ms": 5.0, "cached_share": 0.2, "mapping_share": 0.01, "seconds": 2.0}
        row |= {"goodput_share": good, "goodput_requests_per_second": good, "speed": 0.8, "sustained_speed": 0.7}
        row |= {"ttft_target_ms": 100, "tpot_target_ms": 10, "kv_tokens": 1024, "worker_seconds": 0.1}
        row |= {"worker_driver_seconds": 0.1, "contexts": 1, "context_runs": 1, "broken_runs": 0}
        rows.append(row | {"pages_allocated": 1, "pages_with_memory": 1})
    summary = rounds.summarize(rows)
    assert summary["conversation_goodput_vs_best"] == pytest.approx(1.5)
    assert summary["conversation_ttft_p99_vs_best"] == pytest.approx(0.8)
    assert summary["conversation_vs_best"] == 1
    rows[1]["goodput_share"] = 0
    assert "conversation_goodput_vs_best" not in rounds.summarize(rows), "nothing is a multiple of none"
    head = {
        "name": "prefix",
        "command": "c",
        "commit": "c",
        "date": "d",
        "device": "e",
        "versions": {"sglang": "1", "torch": "2"},
    }
    record = head | {"summary": summary, "rows": rows, "comparisons": rounds.compare(rows)}
    assert (
        "- conversation at 0.80 times the recorded speed, vtensor: 0.90 good requests/s, 90.0% of all"
        in report.prefix(record)
    )


def test_what_takes_minutes_is_warmed_up_by_what_fills_its_cache(tmp_path, monkeypatch):
    made, ran = workloads.workloads(False, None, 1.0), []
    suite = prefix.Suite(["vtensor"], made, contestants.Plan(tmp_path, 400, 4096, 8192), {}, None)
    client = SimpleNamespace(run=lambda workload, seed: ran.append(workload))
    for kind in workloads.FULL:
        suite.warm_up(kind, "vtensor", client)
    assert ran == [made["chat_full"], workloads.WARM["agent_full"]]
    for kind, workload in workloads.WARM.items():
        asked, _ = replayed(workload, monkeypatch)
        assert sum(len(tokens) + new for tokens, new in asked) > workloads.FULL[kind] / 2


class Rounds(prefix.Suite):
    """Of servers that need not be up: two contestants, whose rounds begin only when both have begun."""

    @contextlib.contextmanager
    def _up(self, names):
        yield {name: SimpleNamespace(kv_tokens=lambda: 1024) for name in names}

    def warm_up(self, kind, name, client):
        self.barrier.wait()

    def once(self, kind, number, name, client):
        self.barrier.wait()
        return {"tokens_per_second": 100.0 * len(name), "seconds": 1.0}


def test_rounds_at_once_begin_together_and_are_kept_in_order(tmp_path):
    names = ["vtensor", "fa3"]
    plan = contestants.Plan(tmp_path, 400, 4096, 8192)
    suite = Rounds(names, {}, plan, {"commit": "0123456789ab"}, tmp_path / "rows.json")
    suite.barrier = threading.Barrier(2, timeout=30)
    suite.at_once(["conversation"], range(4, 6))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["round"], row["contestant"], row["tokens_per_second"]) for row in rows] == [
        (round_, name, 100.0 * len(name)) for round_ in (4, 5) for name in names
    ]
    assert rounds.whole(rows) == rows


@pytest.mark.parametrize(("text", "alone"), [("0", False), ("0,1,2", False), ("0,1", True)])
def test_each_contestant_needs_a_gpu_of_its_own(text, alone):
    with pytest.raises(typer.BadParameter, match="a GPU for each of vtensor, fa3"):
        prefix.devices_of(text, ["vtensor", "fa3"], alone=alone)


def test_devices_are_named_in_the_order_of_the_contestants():
    assert prefix.devices_of("3,1", ["vtensor", "fa3"], alone=False) == ("3", "1")
    assert prefix.devices_of("", ["vtensor", "fa3"], alone=True) == ()
