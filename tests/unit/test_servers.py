"""The benchmark of several servers: what it makes of its rows, what it counts as failed, and when it asks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import threading
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import contestants, peaks, report, server_tables, servers, serving
from benchmarks.contestants import Answer
from benchmarks.peaks import Patient, Sizes, held_between, held_while_all_ask, intermittent, peak
from benchmarks.servers import gaps, summarize
from tests.waiting import SECONDS

SIZES = Sizes(prompt=3, answer=2, rate=100.0, seconds=30.0, every=45.0, quiet=1.0)


def two(turn, rate, changed=0, failed=0):
    values = {"round": turn, "tokens_per_second": rate, "changed_hands_bytes": changed, "failed": failed}
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
    spread = {f"three_ttft_p99_vs_static{of}": 2.5 for of in ("", "_least", "_most")}
    assert summarize(rows) == spread | {"requests_failed": 5}
    for number in (1, 2):
        rows += [{"part": "three", "what": "vtensor, all", "round": number, "ttft_p99_ms": 100.0}]
        rows += [{"part": "static", "what": "fa3, all", "round": number, "ttft_p99_ms": 100.0 * number}]
    summary = summarize(rows)
    assert [summary[f"three_ttft_p99_vs_static{of}"] for of in ("", "_least", "_most")] == [2.0, 1.0, 2.5]
    rows += [{"part": "static", "what": "fa3, all", "round": 3, "ttft_p99_ms": 9000.0}]
    assert summarize(rows)["three_ttft_p99_vs_static_most"] == 2.5, "ours has no fourth round"


def test_a_start_that_does_not_count_is_not_in_the_summary():
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
        url = f"http://{names[0]}:{len(names[0])}"
        bench.log(url).touch()
        yield [Patient(url, 400)], [60.0]

    monkeypatch.setattr(servers.Bench, "servers", up)
    monkeypatch.setattr(servers.precompile, "wait", lambda url: left if url == "http://vtensor:7" else 1 / 0)
    monkeypatch.setattr(servers, "large_model", lambda folder: (folder, 400))
    bench = servers.Bench(tmp_path, False, SIZES, None, range(2))
    bench.cold()
    told = [(row["what"], row["round"], row["counts"], row["kernels_left"]) for row in bench.rows]
    ours = ("vtensor", 0, not left, left), ("vtensor", 1, not left, left)
    assert told == [("fa3", 0, True, 0), *ours, ("fa3", 1, True, 0)]
    assert ("cold_full_speed_extra_s" in summarize(bench.rows)) is (not left)


def bench_with(folder, monkeypatch, *clients, quick=False):
    """A bench whose servers are these."""

    @contextlib.contextmanager
    def up(bench, names, tokens):
        yield clients, [1.0] * len(clients)

    monkeypatch.setattr(servers.Bench, "servers", up)
    monkeypatch.setattr(servers, "large_model", lambda folder: (folder, 400))
    monkeypatch.setattr(servers, "small_model", lambda folder: (folder, 400))
    monkeypatch.setattr(servers, "RETURN_SECONDS", 0.0)
    monkeypatch.setattr(servers, "QUIET_SECONDS", 0.0)
    return servers.Bench(folder, quick, SIZES, None, range(1))


class Told(Patient):
    """Tells of each peak that so many requests failed, and holds so many bytes."""

    failed, held = 0, 100

    def measure(self, workload, seed):
        return {"failed": self.failed, "failures": ["late"] * self.failed}

    def stats(self):
        return {"backed_bytes": self.held + 20, "cached_bytes": self.held}

    def flush(self):
        pass

    def kv_tokens(self):
        return 0


def test_a_neighbour_is_killed_when_it_gives_and_not_when_it_is_idle(tmp_path, monkeypatch):
    asked, killed = threading.Event(), threading.Event()

    class First(Told):
        failed = 2

        def measure(self, workload, seed):
            asked.set()
            assert killed.wait(SECONDS)
            return super().measure(workload, seed)

    class Second(Told):
        failed, looks = 1, 0

        def stats(self):
            """What it has ready goes back after a few looks, and what is cached when the first one asks for it."""
            self.looks += 1
            cached = 60 if asked.is_set() and self.looks > 20 else 80
            return {"backed_bytes": cached + (20 if self.looks < 10 else 0), "cached_bytes": cached}

    monkeypatch.setattr(servers.Bench, "warm_up", lambda bench, clients: None)
    monkeypatch.setattr(servers, "kill", lambda url: killed.set())
    bench = bench_with(tmp_path, monkeypatch, First("", 400), Second("", 400))
    bench.killed()
    (row,) = bench.rows
    assert (row["cached_bytes"], row["given_bytes"]) == (80, 20)
    assert row["failed"] == len(row["failures"]) == 3, "at the peak of the one that is killed, too"


@pytest.mark.parametrize("what", ["gives nothing", "does not answer"])
def test_a_neighbour_that_is_not_killed_as_it_gives_ends_the_part(tmp_path, monkeypatch, what):
    class Second(Told):
        looks = 0

        def stats(self):
            self.looks += 1
            if what == "does not answer" and self.looks > 5:
                raise TimeoutError(what)
            return super().stats()

    killed = []
    monkeypatch.setattr(servers, "kill", killed.append)
    monkeypatch.setattr(servers, "WAIT_SECONDS", 1.0)
    bench = bench_with(tmp_path, monkeypatch, Told("", 400), Second("", 400))
    with pytest.raises((RuntimeError, TimeoutError), match=f"gave nothing of 100 bytes within 1 s|{what}"):
        bench.killed()
    assert bench.rows == killed == []


def test_a_warm_up_that_fails_ends_the_part_and_a_request_of_an_idle_server_is_counted(tmp_path, monkeypatch):
    client = Told("http://s", 400)
    client.failed = 1
    bench = bench_with(tmp_path, monkeypatch, client)
    bench.used = itertools.count().__next__
    with pytest.raises(RuntimeError, match=r"1 requests failed as http://s warmed up: \['late'\]"):
        bench.alone()
    bench.idle()
    assert [(row["what"], row["failed"]) for row in bench.rows] == [("fa3", 1), ("vtensor", 1)]
    assert summarize(bench.rows)["requests_failed"] == 1


def test_what_goes_back_by_itself_does_not_change_hands(tmp_path, monkeypatch):
    class Idle(Told):
        """Of what it holds, less is ready at each look, and the same is cached; but at the second turn it gives 30."""

        looks, cached = 0, 70

        def stats(self):
            self.looks += 1
            return {"backed_bytes": 100 - self.looks, "cached_bytes": self.cached}

    class Taking(Idle):
        def measure(self, workload, seed):
            first.cached = 40
            return super().measure(workload, seed)

    first = Idle("a", 400)
    monkeypatch.setattr(servers.Bench, "warm_up", lambda bench, clients: None)
    bench = bench_with(tmp_path, monkeypatch, first, Taking("b", 400))
    bench.two()
    assert [row["changed_hands_bytes"] for row in bench.rows] == [0, 30, 0, 0]


def test_a_request_that_was_given_up_counts_among_those_that_waited_longest():
    answers = [Answer(0.0, 0.1, 5.0, 0.1, 10, 0, 10)] * 90
    client = Patient("", 400, answers=answers, failures=["TimeoutError()"] * 10, given_up=[300.0] * 10)
    told = client.told(400.0)
    assert (told["requests"], told["failed"], told["ttft_p99_ms"]) == (90, 10, 300_000.0)


def test_kvcached_is_measured_beside_the_static_thirds_of_its_own_sglang():
    rows = [{"part": "static", "what": "fa3, all", "ttft_p99_ms": 900.0}]
    rows += [{"part": "kvcached", "what": "kvcached, all", "ttft_p99_ms": 300.0}]
    assert summarize(rows)["kvcached_ttft_p99_vs_static"] == 3.0
    names = {servers.kvcached_environment(port)["KVCACHED_IPC_NAME"] for port in (1, 2)}
    assert len(names) == 2, "each server counts its own memory"


class Asked(Patient):
    """Answers each request after some seconds, and holds so many bytes more at each look."""

    seconds, more, looks = 0.0, 0, 0

    def stats(self):
        self.looks += 1
        return {"backed_bytes": self.looks * self.more}

    def flush(self):
        pass


def answer_after_a_while(monkeypatch):
    async def ask(client, http, tokens, new):
        await asyncio.sleep(client.seconds)
        client.answers.append(Answer(0.0, client.seconds, client.seconds, 0.0, len(tokens), 0, new))
        return [0] * new

    monkeypatch.setattr(contestants.Client, "ask", ask)
    monkeypatch.setattr(servers.Bench, "warm_up", lambda bench, clients: None)


def test_two_peaks_at_once_tell_what_each_server_holds(tmp_path, monkeypatch):
    answer_after_a_while(monkeypatch)
    monkeypatch.setattr(servers, "held_while_all_ask", lambda clients, done: {"held_bytes": [5.0, 10.0]})
    bench = bench_with(tmp_path, monkeypatch, Asked("a", 400), Asked("b", 400), quick=True)
    bench.both()
    first, second, both = bench.rows
    assert [row["what"] for row in bench.rows] == ["vtensor", "vtensor", "vtensor, all"]
    assert both["held_bytes"] == [5.0, 10.0]
    assert (first["requests"], both["requests"]) == (second["requests"], 2 * first["requests"])
    assert first["demand_bytes"] == both["demand_bytes"] == bench.bytes_of(first["requests"] * SIZES.tokens)
    assert summarize(bench.rows) == {"both_share": 0.5, "requests_failed": 0}


class Looks:
    """An event that is set when it has been waited for once for each of `unanswered`: what each client then has."""

    def __init__(self, clients, unanswered):
        self.clients, self.unanswered = clients, iter(unanswered)

    def wait(self, _):
        now = next(self.unanswered, None)
        for client, count in zip(self.clients, now or (), strict=bool(now)):
            client.unanswered = count
        return now is None


def test_what_servers_hold_is_looked_at_while_all_of_them_are_asked():
    clients = one, two = Asked("a", 400), Asked("b", 400)
    one.more, two.more = 10, 20
    assert held_while_all_ask(clients, Looks(clients, [(1, 0), (2, 1), (2, 2), (1, 5), (0, 5)])) == {
        "held_bytes": [20, 40]
    }
    assert one.looks == two.looks == 3, "nobody looks when only one of them is busy"
    with pytest.raises(RuntimeError, match="not at the same time"):
        held_while_all_ask(clients, Looks(clients, [(1, 0), (0, 1)]))
    one.looks = two.looks = 0
    assert held_between(clients, Looks(clients, [(0, 0), (1, 0)])) == {
        "held_least_bytes": [10, 20],
        "held_most_bytes": [30, 60],
        "held_together_bytes": 90,
    }


@pytest.mark.parametrize("part", ["three", "static"])
def test_each_of_several_servers_has_its_demand_in_its_row(tmp_path, monkeypatch, part):
    answer_after_a_while(monkeypatch)
    bench = bench_with(tmp_path, monkeypatch, Asked("a", 400), Asked("b", 400), quick=True)
    bench.sizes = Sizes(prompt=3, answer=2, rate=10.0, seconds=0.5, every=0.5, quiet=1.0)
    bench.rounds = range(1, 3)
    getattr(bench, part)()
    assert [row.get("round") for row in bench.rows] == [1, 1, 1, 2, 2, 2]
    assert {row["demand_bytes"] for row in bench.rows} == {bench.bytes_of(5 * 5)}
    assert {row["kv_bytes"] for row in bench.rows} == {bench.bytes_of(bench.room(2))}


def drive(workload, monkeypatch, waits=0.0, gap=0.0, error=None):
    """Ask a server that answers at once, by a clock that runs as fast as it can. Yields the client, and when it was
    asked."""
    asked = []
    clock = [0.0]

    async def sleep(seconds):
        asked.append(seconds)

    async def ask(client, http, tokens, new):
        if error is not None:
            raise error
        client.answers.append(Answer(clock[0], clock[0] + waits, clock[0] + waits + gap, gap, len(tokens), 0, new))
        return [0] * new

    monkeypatch.setattr(peaks.asyncio, "sleep", sleep)
    monkeypatch.setattr(contestants.Client, "ask", ask)
    client = Patient("http://nowhere", 400)
    asyncio.run(workload(client, random.Random(1)))
    return client, asked


def test_a_request_that_waits_longer_than_a_minute_has_failed(monkeypatch):
    client, _ = drive(peak(5, SIZES), monkeypatch, waits=59.0, gap=59.0)
    told = client.told(1.0)
    assert (told["requests"], told["failed"]) == (5, 0)
    for waits in ({"waits": 61.0}, {"gap": 61.0}):
        client, _ = drive(peak(5, SIZES), monkeypatch, **waits)
        told = client.told(1.0)
        assert (told["requests"], told["failed"], told["failures"]) == (5, 5, ["waited 61 s"] * 5)


def test_a_client_knows_how_long_a_stream_stood_still(monkeypatch):
    """Asked at 10, it hears something at 11, 12 and 70, and the stream ends at 71."""

    async def stream(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for count in (1, 2, 3):
            said = {"output_ids": list(range(count)), "meta_info": {"cached_tokens": 0}}
            await response.write(f"data: {json.dumps(said)}\n\n".encode())
        return response

    async def ask():
        app = web.Application()
        app.router.add_post("/generate", stream)
        async with TestServer(app) as server, aiohttp.ClientSession() as http:
            client = contestants.Client(str(server.make_url("")).rstrip("/"), 400)
            times = iter([10.0, 11.0, 12.0, 70.0, 71.0])
            monkeypatch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: next(times)))
            await client.ask(http, [1, 2], 3)
            return client.answers[0]

    answer = asyncio.run(ask())
    assert (answer.sent, answer.first, answer.last) == (10.0, 11.0, 71.0)
    assert answer.gap == answer.waited == 58.0


@pytest.mark.parametrize(
    "error", [RuntimeError("3 tokens where 5 were wanted"), KeyError("output_ids"), TimeoutError()]
)
def test_a_request_with_an_error_has_failed_and_others_go_on(monkeypatch, error):
    client, _ = drive(peak(5, SIZES), monkeypatch, error=error)
    assert client.failures == [repr(error)] * 5
    told = client.told(1.0)
    assert (told["requests"], told["failed"], told["failures"]) == (0, 5, client.failures)
    assert told["ttft_median_ms"] == 60_000.0, "who fails at once is not answered sooner"


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
        "- The worst peak of two that take turns has 0.950 times the throughput of a server alone.",
        "- 0 requests failed.",
        "",
    ]
    killed = "- Among them are those of a server whose neighbour was killed as it gave memory."
    for given in (0, 1):
        record["rows"] = [{"part": "killed", "given_bytes": given}]
        assert (killed in report.servers(record).splitlines()) is (given > 0)
    told = {"requests": 9, "failed": 1, "ttft_median_ms": 5.0, "tpot_median_ms": 2.0, "tokens_per_second": 1e4}
    peaks = [{"ttft_p99_ms": 10.0}, {"ttft_p99_ms": 1234.0}, {"ttft_p99_ms": 900.0}]
    record["rows"] = [
        {"part": "static", "what": what, "round": number} | told | peak
        for number in (0, 1)
        for what, peak in zip(("fa3", "fa3", "fa3, all"), peaks, strict=True)
    ]
    said = [line for line in report.servers(record).splitlines() if line.startswith("| three of SGLang")]
    assert said[1] == "| three of SGLang, static thirds | 2 | 9 | 1 | 900 ms (10, 1,234) | 5 ms | 2.0 ms | 10,000 |"
    assert len(said) == 2


def test_kvcached_stands_beside_ours_where_both_were_measured(monkeypatch):
    record = {"command": "c", "commit": "0", "date": "d", "device": "GPU", "versions": {"sglang": "1", "torch": "2"}}
    record |= {"rows": [], "summary": {"kvcached_ttft_p99_vs_static": 4.0}}
    line = "- Over static thirds of its own SGLang, ours gains 2.50 times what kvcached does."
    for ours, there in (
        (None, False),
        ({"summary": {}}, False),
        ({"summary": {"three_ttft_p99_vs_static": 10.0}}, True),
    ):
        monkeypatch.setattr(server_tables.results, "read", lambda name, ours=ours: ours)
        assert (line in report.servers(record).splitlines()) is there


class Beside(Asked):
    """Has run short once more at each look."""

    def stats(self):
        return super().stats() | {"shortages": self.looks}


def of_each_start(tmp_path, monkeypatch, quick, *starts):
    """A bench whose servers are those of `starts`, one start after another."""
    bench, left = bench_with(tmp_path, monkeypatch, quick=quick), iter(starts)

    @contextlib.contextmanager
    def up(bench, names, tokens):
        clients = next(left)
        assert len(names) == len(clients)
        yield clients, [7.0] * len(clients)

    monkeypatch.setattr(servers.Bench, "servers", up)
    answer_after_a_while(monkeypatch)
    bench.room, bench.sizes = lambda count: 40 * count, SIZES
    return bench


def test_a_third_server_comes_up_beside_two_that_are_busy_until_it_is_done(tmp_path, monkeypatch):
    two, third = [Asked("a", 400), Asked("b", 400)], Asked("c", 400)
    two[0].seconds = two[1].seconds = 0.01
    bench = of_each_start(tmp_path, monkeypatch, True, two, [third])
    answer = contestants.Client.ask

    async def ask(client, http, tokens, new):
        async with asyncio.timeout(SECONDS):
            while client is third and len(two[0].answers) < 12:
                await asyncio.sleep(0.01)
        return await answer(client, http, tokens, new)

    monkeypatch.setattr(contestants.Client, "ask", ask)
    bench.third()
    assert [row["what"] for row in bench.rows] == ["vtensor", "vtensor", "vtensor, all", "vtensor"]
    busy, came = bench.rows[0], bench.rows[-1]
    assert busy["requests"] > 2 * came["requests"], "they are asked again and again meanwhile"
    assert summarize(bench.rows) == {"third_first_answer_s": 7.0, "requests_failed": 0}


@pytest.mark.parametrize("fails", [False, True])
def test_a_stranger_takes_memory_at_the_second_of_three_peaks(tmp_path, monkeypatch, fails):
    did = []

    class Stranger:
        def take(self, leave_bytes):
            did.append("take")
            if fails:
                raise RuntimeError("no answer")
            return 5

        def let_go(self):
            did.append("let go")

        def close(self):
            did.append("close")

    monkeypatch.setattr(servers, "Stranger", Stranger)
    monkeypatch.setattr(servers, "BEFORE_SECONDS", 0.0)
    monkeypatch.setattr(servers, "TAKEN_SECONDS", 0.0)
    bench = of_each_start(tmp_path, monkeypatch, False, [Beside("a", 400)])
    if fails:
        with pytest.raises(RuntimeError, match="no answer"):
            bench.stranger()
        assert did == ["take", "let go", "close"]
        return
    bench.stranger()
    assert did == ["take", "let go", "close"]
    assert [(row["when"], row.get("taken_bytes")) for row in bench.rows] == [
        *[("before", None), ("beside", 5), ("behind", None)]
    ]
    assert "behind_a_stranger" in summarize(bench.rows)
