"""The benchmark of several servers: what it makes of its rows, what it counts as failed, and when it asks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import pytest

from benchmarks import contestants, memory, report, servers
from benchmarks.contestants import Answer
from benchmarks.servers import Patient, Sizes, gaps, intermittent, peak, summarize

SIZES = Sizes(prompt=3, answer=2, rate=100.0, seconds=30.0, every=45.0, quiet=1.0)


def two(turn, rate, changed=0, failed=0):
    values = {"turn": turn, "tokens_per_second": rate, "changed_hands_bytes": changed, "failed": failed}
    return {"part": "two", "what": "vtensor"} | values


def test_the_worst_peak_counts_but_for_the_first_which_finds_all_memory_free():
    alone = [{"part": "alone", "what": "vtensor", "tokens_per_second": rate, "failed": 0} for rate in (90.0, 110.0)]
    summary = summarize([*alone, two(0, 10.0), two(1, 95.0, 7, 1), two(2, 91.0, 8), two(3, 99.0)])
    assert summary == {
        "two_short_vs_alone": pytest.approx(0.91),
        "two_short_changed_hands_bytes": 15,
        "requests_failed": 1,
    }


def test_failures_of_ours_count_in_every_part_once():
    """Three servers have a row each, and one for all; SGLang's own failures are not ours."""
    rows = [{"part": "three", "what": "vtensor", "failed": 1, "ttft_p99_ms": 9.0} for _ in range(3)]
    rows += [{"part": "three", "what": "vtensor, all", "failed": 3, "ttft_p99_ms": 100.0}]
    rows += [{"part": "static", "what": what, "failed": 5, "ttft_p99_ms": 250.0} for what in ("fa3", "fa3, all")]
    rows += [{"part": "killed", "what": "vtensor", "failed": 2}]
    assert summarize(rows) == {"three_ttft_p99_vs_static": 2.5, "requests_failed": 5}


def test_a_start_that_reads_from_the_disk_first_does_not_count():
    def cold(name, first, full, counts=True):
        return {"part": "cold", "what": name, "first_answer_s": first, "full_speed_s": full, "counts": counts}

    rows = [cold("fa3", 300.0, 300.0, False), cold("vtensor", 70.0, 85.0), cold("fa3", 62.0, 62.0)]
    assert summarize(rows) == {"cold_start_extra_s": 8.0, "cold_full_speed_extra_s": 23.0}
    rows = [{"part": "idle", "what": name, "without_pool_bytes": size} for name, size in (("fa3", 10), ("vtensor", 11))]
    assert summarize(rows) == {"idle_footprint": 1.1}


@pytest.mark.parametrize("left", [0, 2])
def test_a_cold_start_that_leaves_kernels_uncompiled_ends_and_does_not_count(tmp_path, monkeypatch, left):
    @contextlib.contextmanager
    def up(bench, names, tokens, home):
        (tmp_path / f"{names[0]}-0.log").touch()
        yield [Patient(f"http://{names[0]}", 400)], [60.0]

    monkeypatch.setattr(servers.Bench, "servers", up)
    monkeypatch.setattr(servers.precompile, "wait", lambda url: left if url == "http://vtensor" else 1 / 0)
    monkeypatch.setattr(servers, "large_model", lambda folder: (folder, 400))
    bench = servers.Bench(tmp_path, False, SIZES, None)
    bench.cold()
    told = [(row["what"], row["counts"], row["kernels_left"]) for row in bench.rows]
    assert told == [("fa3", False, 0), ("vtensor", not left, left), ("fa3", True, 0)]
    assert ("cold_full_speed_extra_s" in summarize(bench.rows)) is (not left)


def test_a_neighbour_is_killed_when_it_gives_and_not_when_it_is_idle(tmp_path, monkeypatch):
    asked, killed = threading.Event(), threading.Event()

    class First(Patient):
        def measure(self, workload, seed):
            asked.set()
            assert killed.wait(30)
            return {}

        def stats(self):
            return {"backed_bytes": 0}

    class Second(Patient):
        looks = 0

        def measure(self, workload, seed):
            return {}

        def stats(self):
            """Free pages go back after a few looks, and what is cached when the first one asks for it."""
            self.looks += 1
            held = 60 if asked.is_set() else 100 if self.looks < 3 else 80
            return {"backed_bytes": held, "pages_backed": held}

    @contextlib.contextmanager
    def up(bench, names, tokens):
        yield (First("", 400), Second("", 400)), [1.0, 1.0]

    monkeypatch.setattr(servers.Bench, "servers", up)
    monkeypatch.setattr(servers.Bench, "warm_up", lambda bench, clients: None)
    monkeypatch.setattr(servers, "kill", lambda url: killed.set())
    monkeypatch.setattr(servers, "small_model", lambda folder: (folder, 400))
    monkeypatch.setattr(memory, "STEADY_SECONDS", 0.5)
    bench = servers.Bench(tmp_path, True, SIZES, None)
    bench.killed()
    (row,) = bench.rows
    assert (row["cached_bytes"], row["given_bytes"]) == (80, 20)


def drive(workload, monkeypatch, waits=0.0, error=None):
    """Ask a server that answers at once, by a clock that runs as fast as it can. Yields the client, and when it was
    asked."""
    asked = []
    clock = [0.0]

    async def sleep(seconds):
        asked.append(seconds)

    async def ask(client, http, tokens, new):
        if error is not None:
            raise error
        client.answers.append(Answer(clock[0], clock[0] + waits, clock[0] + waits, len(tokens), 0, new))
        return [0] * new

    monkeypatch.setattr(servers.asyncio, "sleep", sleep)
    monkeypatch.setattr(contestants.Client, "ask", ask)
    client = Patient("http://nowhere", 400)
    asyncio.run(workload(client, random.Random(1)))
    return client, asked


def test_a_request_that_waits_longer_than_a_minute_has_failed(monkeypatch):
    client, _ = drive(peak(5, SIZES), monkeypatch, waits=59.0)
    assert (len(client.answers), client.failures) == (5, [])
    client, _ = drive(peak(5, SIZES), monkeypatch, waits=61.0)
    assert client.failures == ["waited 61 s for the first token"] * 5
    told = client.told(1.0)
    assert (told["requests"], told["failed"]) == (5, 5)


@pytest.mark.parametrize(
    "error", [RuntimeError("3 tokens where 5 were wanted"), KeyError("output_ids"), TimeoutError()]
)
def test_a_request_with_an_error_has_failed_and_others_go_on(monkeypatch, error):
    client, _ = drive(peak(5, SIZES), monkeypatch, error=error)
    assert client.failures == [repr(error)] * 5
    assert client.told(1.0) == {"requests": 0, "failed": 5, "failures": client.failures}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_peak_is_at_its_turn_and_quiet_requests_are_at_all_times(monkeypatch, number):
    _, asked = drive(intermittent(number, 3, SIZES), monkeypatch)
    assert asked == sorted(asked)
    begin, end = 45.0 * number, 45.0 * number + 30.0
    inside = [at for at in asked if begin <= at < end]
    assert 100 * 30 * 0.9 < len(inside) < 100 * 30 * 1.1
    assert inside[0] < begin + 1
    others = [at for at in asked if not begin <= at < end]
    assert 90 * 0.6 < len(others) < 90 * 1.4, "one a second in the 90 s that are left of 120"
    assert asked[-1] < 2 * 45.0 + 30.0 + 1


def test_the_longest_pauses_of_a_log_come_first():
    log = """[2026-11-29 23:59:50 TP0] one
    without a time
[2026-11-29 23:59:52 TP0] two
[2026-11-30 00:00:22] three
[2026-11-30 00:00:22] four
"""
    assert gaps(log) == [(30, "three"), (2, "two"), (0, "four")]
    assert gaps(log, most=1) == [(30, "three")]
    assert gaps("") == []


def test_the_page_says_what_was_measured_and_no_more():
    record = {"command": "c", "commit": "0", "date": "d", "device": "GPU", "versions": {"sglang": "1", "torch": "2"}}
    record |= {"rows": [], "summary": {"two_short_vs_alone": 0.95, "requests_failed": 0}}
    said = report.servers(record).splitlines()
    assert said[:3] == [
        "- 0.950 times the throughput of a server alone, at the worst peak of two that take turns",
        "- 0 requests failed",
        "",
    ]
    record["rows"] = [{"part": "killed"}]
    assert (
        report.servers(record).splitlines()[2]
        == "- a neighbour was killed as it gave memory, and its death is counted in"
    )
