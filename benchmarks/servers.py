"""Several servers on one GPU: peaks in turn and at once, intermittent peaks of three, one that comes up beside others,
a stranger, a neighbour that is killed, idle, and cold.

    python -m benchmarks.servers --parts alone,two                     on a GPU, servers with Llama-3-8B's geometry
    python -m benchmarks.servers --parts three --rounds 1 --first 2    one round more of a part that has rounds
    python -m benchmarks.servers --quick                               the host backend and a small model: does it run?

Parts, each of which runs by itself, and the results file that it is merged into. Those with rounds have 3 of them:

    alone      servers         peaks of one server that has the GPU to itself
    two        servers         the same peaks of two servers in turn, which need 1.5 times the memory that there is
    both       servers_both    rounds: a peak of both servers at once, and what each of them holds meanwhile
    three      servers_three   rounds: three servers, each with quiet requests all the time and a peak of its own
    static     servers_three   the same of SGLang as it ships, where each server has a third of the memory for good
    kvcached   --name          the same of SGLang with kvcached, to be installed with an SGLang that it supports
    third      servers_third   rounds: a server that comes up beside two that hold everything and have requests
    stranger   servers_third   rounds: peaks, while a process that knows nothing of them takes what is free for a while
    killed     servers_killed  a peak, for which a neighbour gives what it has cached until it is killed (SIGKILL)
    idle       servers_idle    what a server holds when it is idle, beside SGLang's own without its KV pool
    cold       servers_cold    rounds: a start of each with no kernel compiled: the first answer, and when all are

A start takes one to three minutes, a round of three servers two and a half, and others up to five: a call that may not
last so long does one round.

A request has failed if it waits longer than a minute, for its first token or between two chunks of its stream, if its
answer takes five minutes, and if it has an error or too few tokens. Among the times to a first token, one that failed
counts as a minute at least. A part ends with an error if a request fails while a server warms up, or if its neighbour
is not killed as it gives.

kvcached's are measured beside the static thirds of its SGLang: `--parts static,kvcached --name servers_kvcached`. So is
what it holds when it is idle: `kvcached_idle`. It sizes its servers itself; the others are told their room. Rows have
what all requests of a server's peak need (`demand_bytes`), and what there is for all servers (`kv_bytes`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import ROUND_TOKENS, START_SECONDS, capacity, compiled
from benchmarks.geometries import GIB, LLAMA
from benchmarks.memory import HOST_CONTESTANTS, RETURN_SECONDS
from benchmarks.memory import device_bytes as device_reader
from benchmarks.peaks import (
    WAIT_SECONDS,
    Patient,
    Sizes,
    drive_at_once,
    held_between,
    held_now,
    held_while_all_ask,
    intermittent,
    looking,
    peak,
    steady,
)
from benchmarks.prefix import large_model, small_model
from benchmarks.serving import CONTESTANTS, command, end_with_servers, parts_of, started
from benchmarks.stranger import Stranger
from sglang_vtensor import precompile
from sglang_vtensor.demo import free_port
from sglang_vtensor.memory import QUIET_SECONDS

console = Console(width=150)
#: Where the rows of a part go, unless `--name` says.
FILES = {"alone": "servers", "two": "servers", "both": "servers_both", "three": "servers_three"}
FILES |= {"static": "servers_three", "third": "servers_third", "stranger": "servers_third"}
FILES |= {"killed": "servers_killed", "idle": "servers_idle", "cold": "servers_cold"}
PARTS = tuple(FILES)
#: What runs only where it is asked for, by name.
MORE_PARTS = ("kvcached", "kvcached_idle")
#: What one of these servers holds beside its KV cache at a peak: two of ours held 107.8 GB for their caches then, of
#: 150.8 GB that the device has. Idle, SGLang's own holds 19.9 GB without its pool (`idle`).
SERVER_BYTES = 20 * GIB
#: A stranger takes all but this; so long after a peak began, and for so long.
LEFT_BYTES, BEFORE_SECONDS, TAKEN_SECONDS = 256 << 20, 5.0, 15.0
#: What one of two servers needs at its peak, and what it may hold, of the memory that there is for both.
NEEDED, ALLOWED = 0.75, 0.8
#: A cold start has none of what these name; all else that is kept is below HOME.
CACHES = ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR")

QUICK = Sizes(prompt=40, answer=8, rate=2.0, seconds=2.0, every=2.0, quiet=0.5)
QUICK_TOKENS = 2048


class Bench:
    """Starts servers, drives them, and keeps rows: `(part, what, ...)`."""

    def __init__(self, folder: Path, quick: bool, sizes: Sizes, rows_file: Path | None, rounds: range) -> None:
        self.folder, self.quick, self.sizes, self.rows_file, self.rounds = folder, quick, sizes, rows_file, rounds
        self.model, self.vocabulary = small_model(folder) if quick else large_model(folder)
        self.run = {"commit": results.commit(), "run": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"}
        self.rows: list[dict[str, Any]] = []
        self.used, self.device_bytes = device_reader()

    def note(self, part: str, what: str, **values: Any) -> None:
        """A row, which is written at once."""
        one = {"part": part, "what": what, "device_bytes": self.device_bytes} | self.run | values
        self.rows.append(one)
        console.print({key: value for key, value in one.items() if key not in self.run})
        results.keep(self.rows_file, self.rows)

    def room(self, servers: int) -> int:
        """KV tokens that the device has for so many servers, all together."""
        if self.quick:
            return servers * QUICK_TOKENS
        return servers * capacity(int(self.device_bytes), servers, server_bytes=SERVER_BYTES)

    def bytes_of(self, tokens: int) -> int:
        return tokens * LLAMA.token_bytes

    @contextlib.contextmanager
    def servers(
        self, names: list[str], tokens: int | None, home: Path | None = None
    ) -> Iterator[tuple[list[Patient], list[float]]]:
        """Contestants that start at the same time, each with room for so many tokens; None: as it ships. Yields who
        asks them, and the seconds until each answered. `home` is where what they compile is kept."""
        table = HOST_CONTESTANTS if self.quick else CONTESTANTS | {"kvcached": CONTESTANTS["fa3"]}
        environment = dict(os.environ)
        if self.quick:
            environment["VTENSOR_HOST_DEVICE"] = f"benchmark-{os.getpid()}"
        if home is not None:
            environment = {key: value for key, value in environment.items() if key not in CACHES}
            environment |= {"HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
        with contextlib.ExitStack() as stack:
            waits, clients, ports = [], [], set[int]()
            for name in names:
                ports.add(port := free_port(ports))
                arguments = list(table[name])
                if tokens is not None:
                    arguments += ["--max-total-tokens", str(tokens)]
                    arguments += [] if self.quick else ["--mem-fraction-static", "0.98"]
                own = environment | (kvcached_environment(port) if name == "kvcached" else {})
                what = command(self.model, port, arguments, own, host=self.quick)
                url = f"http://127.0.0.1:{port}"
                waits.append(stack.enter_context(started(name, what, url, self.log(url), own, patience=START_SECONDS)))
                clients.append(Patient(url, self.vocabulary))
            seconds = [wait() for wait in waits]
            if home is None:  # else it is measured how long that takes
                for name, client in zip(names, clients, strict=True):
                    compiled(name, client.url)
            console.print(f"{', '.join(names)}: up after {', '.join(f'{one:.1f}' for one in seconds)} s")
            if tokens is not None and not self.quick:
                for client in clients:
                    if abs(client.kv_tokens() - tokens) > ROUND_TOKENS:
                        raise RuntimeError(f"a server has room for {client.kv_tokens()} tokens, and not for {tokens}")
            yield clients, seconds

    def log(self, url: str) -> Path:
        """What the server at `url` says."""
        return self.folder / f"{url.rpartition(':')[2]}.log"

    def warm_up(self, clients: list[Patient]) -> None:
        """What is compiled, captured or made at first use; and then everything is given back. Raises `RuntimeError` if
        a request fails."""
        for client in clients:
            self._all_answered(client, client.measure(peak(4, self.sizes), seed=0))
            client.flush()
        time.sleep(RETURN_SECONDS)

    @staticmethod
    def _all_answered(client: Patient, told: dict[str, Any]) -> None:
        if told["failed"]:
            raise RuntimeError(f"{told['failed']} requests failed as {client.url} warmed up: {told['failures']}")

    def one_of_two(self) -> dict[str, int]:
        """The peak of one of two servers."""
        count = max(2, int(NEEDED * self.room(2)) // self.sizes.tokens)
        return {"requests": count, "tokens": max(int(ALLOWED * self.room(2)), count * self.sizes.tokens)}

    def needs(self, requests: int, servers: int) -> dict[str, int]:
        """What stands in a row: what all requests of a server's peak need, and what there is for all servers."""
        demand = self.bytes_of(requests * self.sizes.tokens)
        return {"demand_bytes": demand, "kv_bytes": self.bytes_of(self.room(servers))}

    # The parts.

    def alone(self) -> None:
        one = self.one_of_two()
        with self.servers(["vtensor"], one["tokens"]) as ((client,), _):
            self.warm_up([client])
            for turn in range(3):
                client.flush()
                measured = client.measure(peak(one["requests"], self.sizes), seed=10 + turn)
                self.note("alone", "vtensor", round=turn, **self.needs(one["requests"], 2), **measured)

    def two(self) -> None:
        one = self.one_of_two()
        with self.servers(["vtensor"] * 2, one["tokens"]) as (clients, _):
            self.warm_up(clients)
            for turn in range(4):
                client, other = clients[turn % 2], clients[1 - turn % 2]
                before = other.stats()["cached_bytes"]  # what it has ready beside that, it gives back by itself
                measured = client.measure(peak(one["requests"], self.sizes), seed=20 + turn)
                held = held_now([client, other])
                given = before - other.stats()["cached_bytes"]
                measured |= {"backed_bytes": held, "changed_hands_bytes": max(0, given)}
                self.note("two", "vtensor", round=turn, **self.needs(one["requests"], 2), **measured)

    def both(self) -> None:
        """Of as many tokens as in turn, but answers are half as long: two at once decode half as fast, and what there
        is no room for waits until the first answers end."""
        one, sizes = self.one_of_two(), self.sizes.with_shorter_answers()
        with self.servers(["vtensor"] * 2, one["tokens"]) as (clients, _):
            self.warm_up(clients)
            for turn in self.rounds:
                for client in clients:
                    client.flush()
                with looking(partial(held_while_all_ask, clients)) as saw:
                    seconds = drive_at_once(clients, [peak(one["requests"], sizes)] * 2, seed=60 + turn)
                needs = self.needs(one["requests"], 2) | {"round": turn}
                self.note_each("both", "vtensor", clients, seconds, needs, **saw())

    def three(self) -> None:
        self._three("three", "vtensor", int(0.9 * self.room(3)))

    def static(self) -> None:
        self._three("static", "fa3", self.room(3) // 3)

    def kvcached(self) -> None:
        """Its servers take what they find, and need no size."""
        self._three("kvcached", "kvcached", None)

    def _three(self, part: str, name: str, tokens: int | None) -> None:
        count = 2 if self.quick else 3
        with self.servers([name] * count, tokens) as (clients, _):
            self.warm_up(clients)
            needs = self.needs(int(self.sizes.rate * self.sizes.seconds), count) | {"tokens_each": tokens}
            for turn in self.rounds:
                for client in clients:
                    client.flush()
                work = [intermittent(n, count, self.sizes) for n in range(count)]
                look = partial(held_between, clients) if name == "vtensor" else nothing
                with looking(look) as saw:
                    seconds = drive_at_once(clients, work, seed=30 + 1000 * turn)
                self.note_each(part, name, clients, seconds, needs | {"round": turn}, **saw())

    def note_each(
        self, part: str, name: str, clients: list[Patient], seconds: float, values: dict[str, Any], **of_all: Any
    ) -> None:
        """A row of each client, and one of all; `values` stand in each of them, and `of_all` in the last one."""
        everything = Patient("", self.vocabulary)
        for number, client in enumerate(clients):
            everything.answers += client.answers
            everything.failures += client.failures
            everything.given_up += client.given_up
            self.note(part, name, model=number, **values, **client.told(seconds))
        self.note(part, f"{name}, all", **values, **of_all, **everything.told(seconds))

    def third(self) -> None:
        """Two servers have cached all that there is, and have requests all the time, for a third of that. The one that
        comes up has random weights, and a file of the size of real ones: by that it knows what it needs."""
        requests = max(2, self.room(2) // 2 // self.sizes.tokens)
        with self.servers(["vtensor"] * 2, int(ALLOWED * self.room(2))) as (clients, _), self._weights():
            self.warm_up(clients)
            for turn in self.rounds:
                for client in clients:
                    self._all_answered(client, client.measure(peak(requests, self.sizes), seed=70 + 3 * turn))
                before, done = held_now(clients), threading.Event()
                with ThreadPoolExecutor(1) as beside:
                    busy = beside.submit(drive_at_once, clients, [steady(requests // 3, self.sizes, done)] * 2, turn)
                    try:
                        with self.servers(["vtensor"], self.room(3) // 3) as ((third,), (up,)):
                            told = third.measure(peak(max(2, requests // 3), self.sizes), seed=72 + 3 * turn)
                            after = held_now(clients)
                    finally:
                        done.set()
                    seconds = busy.result()
                values = {"round": turn, "first_answer_s": up, "held_before_bytes": before, "held_after_bytes": after}
                self.note_each("third", "vtensor", clients, seconds, values)
                self.note("third", "vtensor", model=len(clients), **values, **told)

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        if self.quick:  # which has real ones
            yield
            return
        file = self.model / "model.safetensors"
        file.touch()
        os.truncate(file, LLAMA.weights * GIB)
        try:
            yield
        finally:
            file.unlink()

    def stranger(self) -> None:
        """A peak before, one with the stranger there, and one behind that."""
        one = self.one_of_two()
        with contextlib.ExitStack() as stack:
            (client,), _ = stack.enter_context(self.servers(["vtensor"], one["tokens"]))
            self.warm_up([client])
            stranger = None if self.quick else stack.enter_context(contextlib.closing(Stranger()))
            for turn in self.rounds:
                for when in ("before", "beside", "behind"):
                    client.flush()
                    shortages = client.stats()["shortages"]
                    with contextlib.ExitStack() as taking, looking(partial(held_between, [client])) as saw:
                        taken = None
                        if stranger is not None and when == "beside":  # on the host nothing is short
                            taken = taking.enter_context(self._taking(stranger))
                        told = client.measure(peak(one["requests"], self.sizes), seed=80 + turn)
                    values = {"round": turn, "when": when, "shortages": client.stats()["shortages"] - shortages}
                    if taken is not None:
                        values["taken_bytes"] = taken()
                        if not values["shortages"]:
                            raise RuntimeError(f"the server never ran short beside a stranger: {values}")
                    self.note("stranger", "vtensor", **values, **saw(), **told)

    @contextlib.contextmanager
    def _taking(self, stranger: Stranger) -> Iterator[Callable[[], int]]:
        """It has all that is free for a while, from a little later on. What is yielded says how much that was, behind
        this, or raises what the stranger raised."""

        def take() -> int:
            time.sleep(BEFORE_SECONDS)
            try:
                taken = stranger.take(LEFT_BYTES)
                time.sleep(TAKEN_SECONDS)
            finally:
                stranger.let_go()
            return taken

        with ThreadPoolExecutor(1) as beside:
            yield beside.submit(take).result

    def killed(self) -> None:
        """The second server has cached a peak, and gives of that to the first one, until it is killed."""
        one = self.one_of_two()
        with self.servers(["vtensor"] * 2, one["tokens"]) as ((first, second), _):
            self.warm_up([first, second])
            earlier = second.measure(peak(one["requests"], self.sizes), seed=40)
            cached = second.stats()["cached_bytes"]  # what it has ready beside that, it gives back by itself

            def kill_it_as_it_gives() -> dict[str, int]:
                seconds = 2.0 if self.quick else WAIT_SECONDS
                deadline = time.monotonic() + seconds
                while (left := second.stats()["cached_bytes"]) >= cached and time.monotonic() < deadline:
                    time.sleep(0.02)
                if left >= cached and not self.quick:  # the host has memory for both
                    raise RuntimeError(f"the neighbour gave nothing of {cached} bytes within {seconds:.0f} s")
                kill(second.url)
                return {"cached_bytes": cached, "left_bytes": left, "given_bytes": cached - left}

            with ThreadPoolExecutor(1) as beside:
                killing = beside.submit(kill_it_as_it_gives)
                measured = first.measure(peak(one["requests"], self.sizes), seed=41)
                said = killing.result()
            measured["failed"] += earlier["failed"]
            measured["failures"] = [*earlier["failures"], *measured["failures"]]
            held = first.stats()["backed_bytes"]
            self.note("killed", "vtensor", backed_bytes=held, **said, **self.needs(one["requests"], 2), **measured)

    def idle(self) -> None:
        self._idle("idle", "vtensor")

    def kvcached_idle(self) -> None:
        self._idle("kvcached_idle", "kvcached")

    def _idle(self, part: str, name: str) -> None:
        """Of SGLang and of this one: first with what it has cached, and then without."""
        before = self.used()
        for one in ("fa3", name):
            with self.servers([one], None) as ((client,), _):
                told = client.measure(peak(4, self.sizes), seed=50)
                time.sleep(QUIET_SECONDS + 2 * RETURN_SECONDS)
                cached = self.used() - before
                client.flush()
                time.sleep(2 * RETURN_SECONDS)
                pool = self.bytes_of(client.kv_tokens()) if one == "fa3" else 0
                held = self.used() - before
                values = {"held_bytes": held, "held_with_cache_bytes": cached, "pool_bytes": pool}
                failed = {key: told[key] for key in ("failed", "failures")}
                self.note(part, one, without_pool_bytes=held - pool, **values, **failed)

    def cold(self) -> None:
        """Both in each round, and another one first each time. A start that leaves kernels uncompiled counts for
        nothing."""
        for turn in self.rounds:
            for name in ("fa3", "vtensor")[:: 1 if turn % 2 == 0 else -1]:
                with (
                    tempfile.TemporaryDirectory() as home,
                    self.servers([name], None, Path(home)) as ((client,), (up,)),
                ):
                    start = time.perf_counter()
                    left = precompile.wait(client.url) if name == "vtensor" else 0
                    full = up + time.perf_counter() - start
                    log = self.log(client.url).read_text(errors="replace")
                values = {"first_answer_s": up, "full_speed_s": full, "kernels_left": left}
                self.note("cold", name, round=turn, counts=not left, **values)
                for seconds, line in gaps(log):
                    console.print(f"  {seconds:3d} s until: {line[:120]}", markup=False, highlight=False)


def nothing(done: threading.Event) -> dict[str, Any]:
    """What is seen of servers that do not tell what they hold."""
    return {}


def kvcached_environment(port: int) -> dict[str, str]:
    """What has kvcached replace SGLang's memory, by its README; the segment in /dev/shm where one server counts its
    memory has a name of its own."""
    return {"ENABLE_KVCACHED": "true", "KVCACHED_AUTOPATCH": "1", "KVCACHED_IPC_NAME": f"benchmark-{port}"}


def gaps(log: str, most: int = 8) -> list[tuple[int, str]]:
    """Where the time went: the longest pauses between two lines of a server's log that have the time, in seconds, each
    with the line that ended it."""
    lines = re.findall(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] (.*)$", log, re.MULTILINE)
    times = [datetime.strptime(at, "%Y-%m-%d %H:%M:%S") for at, _ in lines]
    pauses = [
        (int((b - a).total_seconds()), line) for a, b, (_, line) in zip(times, times[1:], lines[1:], strict=False)
    ]
    return sorted(pauses, key=lambda pause: -pause[0])[:most]


def kill(url: str) -> None:
    """SIGKILL to the server at `url`, with all its children."""
    port = url.rsplit(":", 1)[1]
    (server,) = (child for child in psutil.Process().children() if port in child.cmdline())
    os.killpg(server.pid, signal.SIGKILL)


def compare(rows: list[dict[str, Any]], theirs: tuple[str, str], ours: tuple[str, str], key: str) -> list[float]:
    """Theirs over ours, of the rounds that both have; each is a part, and who in it. Rows of before there were rounds
    are of one."""
    values: dict[tuple[str, str], dict[int, float]] = {theirs: {}, ours: {}}
    for one in rows:
        if (one["part"], one["what"]) in values:
            values[one["part"], one["what"]][one.get("round", 0)] = one[key]
    return [value / values[ours][turn] for turn, value in sorted(values[theirs].items()) if turn in values[ours]]


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the parts that were measured. Ratios above 1 are in our favour, but for those of `idle`."""
    summary: dict[str, float] = {}

    def of(part: str, what: str, key: str) -> list[Any]:
        return [one[key] for one in rows if one["part"] == part and one["what"] == what and one.get("counts", True)]

    alone, beside = of("alone", "vtensor", "tokens_per_second"), of("two", "vtensor", "tokens_per_second")
    if alone and beside:
        later = beside[1:]  # the first peak finds all memory free
        summary["two_short_vs_alone"] = min(later) / statistics.median(alone)
    if beside:  # in the first peak nobody has anything cached yet
        summary["two_short_changed_hands_bytes"] = sum(of("two", "vtensor", "changed_hands_bytes")[1:])
    shares = [min(held) / max(held) for held in of("both", "vtensor, all", "held_bytes")]
    if shares:
        summary["both_share"] = statistics.median(shares)
    for part, name in (("three", "vtensor"), ("kvcached", "kvcached")):
        ratios = compare(rows, ("static", "fa3, all"), (part, f"{name}, all"), "ttft_p99_ms")
        if ratios:
            key = f"{part}_ttft_p99_vs_static"
            summary |= {key: statistics.median(ratios), f"{key}_least": min(ratios), f"{key}_most": max(ratios)}
    for part, name in (("idle", "vtensor"), ("kvcached_idle", "kvcached")):
        idle = {one["what"]: one["without_pool_bytes"] for one in rows if one["part"] == part}
        if len(idle) == 2:
            summary[f"{part}_footprint"] = idle[name] / idle["fa3"]
    came = of("third", "vtensor, all", "first_answer_s")
    if came:
        summary["third_first_answer_s"] = statistics.median(came)
    peaks = {
        when: [one["tokens_per_second"] for one in rows if one["part"] == "stranger" and one["when"] == when]
        for when in ("before", "behind")
    }
    if all(peaks.values()):
        summary["behind_a_stranger"] = statistics.median(peaks["behind"]) / statistics.median(peaks["before"])
    cold = {name: of("cold", name, "first_answer_s") for name in ("vtensor", "fa3")}
    if all(cold.values()):
        theirs = statistics.median(cold["fa3"])
        summary["cold_start_extra_s"] = statistics.median(cold["vtensor"]) - theirs
        summary["cold_full_speed_extra_s"] = statistics.median(of("cold", "vtensor", "full_speed_s")) - theirs
    failed = [one["failed"] for one in rows if one["what"] == "vtensor" and "failed" in one]
    if failed:
        summary["requests_failed"] = sum(failed)
    return summary


def main(
    parts: Annotated[str, typer.Option(help="With commas; all of them by default.")] = "",
    rate: Annotated[float, typer.Option(help="Requests a second at a peak of three servers.")] = Sizes.rate,
    name: Annotated[str, typer.Option(help="One results file for all: results/NAME.json.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Of the parts that have rounds.")] = 3,
    first: Annotated[int, typer.Option(min=1, help="The number of the first round.")] = 1,
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here.")] = None,
) -> None:
    """Measure, print, and merge into the results file."""
    end_with_servers()
    chosen = parts_of(parts, [*PARTS, *MORE_PARTS], PARTS)
    if not (name or quick) and set(chosen) & set(MORE_PARTS):
        raise typer.BadParameter(f"give --name too: {', '.join(MORE_PARTS)} has no results file of its own")
    with tempfile.TemporaryDirectory() as folder:
        turns = range(first - 1, first if quick else first - 1 + rounds)
        bench = Bench(Path(folder), quick, QUICK if quick else Sizes(rate=rate), rows_file, turns)
        for part in chosen:
            before = len(bench.rows)
            getattr(bench, part)()
            if not quick:  # what comes next may fail
                rows = bench.rows[before:]
                path, _, dropped = results.add_parts(name or FILES[part], rows, part_and_round, summarize)
                console.print(results.written(path, dropped))
    console.print(summarize(bench.rows))


def part_and_round(row: dict[str, Any]) -> tuple[str, int | None]:
    """What is measured anew replaces rows that are equal in these."""
    return row["part"], row.get("round")


if __name__ == "__main__":
    typer.run(main)
