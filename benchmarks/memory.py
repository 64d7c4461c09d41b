"""What a server holds of the GPU: idle, in a conversation, in a burst, after it, and beside another server.

    python -m benchmarks.memory                     on a GPU, Llama-3-8B's geometry
    python -m benchmarks.memory --quick             the host backend and a small model: does it run?

Parts, each of which runs by itself and is merged into memory.json:

    held       device memory over time, SGLang as it ships and ours
    live       what ours holds over what its tokens take, in 64 conversations and, with --trace FILE, in the prefix
               suite's slice of a trace
    returned   what a burst freed, 5 s after it; prefixes are given up after a second here, so that it frees anything
    backed     throughput, and times to the first token after a trim, beside the same server with everything backed
    two        two servers on one GPU, peaks taking turns
    pair       the same pair of SGLang as it ships
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import Client, Workload, compiled
from benchmarks.contestants import row as latencies
from benchmarks.prefix import large_model, small_model
from benchmarks.serving import CONTESTANTS, end_with_servers, parts_of, server
from benchmarks.workloads import conversations, workloads

console = Console(width=150)
PARTS = ("held", "live", "returned", "backed", "two", "pair")
HOST_CONTESTANTS = {"vtensor": ["--kv-backend", "vtensor"], "fa3": ["--attention-backend", "torch_native"]}
SAMPLE_SECONDS = 0.1
#: After this long what a burst freed is to be back.
RETURN_SECONDS = 5.0
#: Longer than free pages are kept.
STEADY_SECONDS = 5.0


class Meter:
    """Samples `read()` in a thread: `(seconds, value)` since it began, and by phase."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self.read = read
        self.points: list[tuple[float, float]] = []
        self.phases: list[tuple[float, str]] = []
        self._start = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        value = self.read()
        if value is not None:
            self.points.append((round(time.perf_counter() - self._start, 2), value))

    def phase(self, name: str) -> None:
        self.phases.append((round(time.perf_counter() - self._start, 2), name))
        self._sample()

    def worst(self, name: str) -> float:
        """The highest value in a phase."""
        start = next(at for at, phase in self.phases if phase == name)
        end = next((at for at, _ in self.phases if at > start), float("inf"))
        return max(value for at, value in self.points if start <= at <= end)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def device_bytes() -> tuple[Callable[[], float], float]:
    """How to read what is taken of this GPU, by all processes, and its size; on a machine without one, what the
    servers have resident, and the machine's size."""
    import torch

    if not torch.cuda.is_available():
        import psutil

        def resident() -> float:
            total = 0.0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            return total

        return resident, float(psutil.virtual_memory().total)
    import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    gpu = pynvml.nvmlDeviceGetHandleByIndex(int(first))
    return lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used), float(pynvml.nvmlDeviceGetMemoryInfo(gpu).total)


def wait_until_steady(client: Client) -> None:
    """Until no page was created or given back for longer than free ones are kept."""
    last, since = -1, time.perf_counter()
    while time.perf_counter() - since < STEADY_SECONDS:
        pages = client.stats()["pages_backed"]
        if pages != last:
            last, since = pages, time.perf_counter()
        time.sleep(0.2)


#: What is noted of the server at the moment when it held the most.
OF_WORST = ("requests", "tree_tokens", "live_tokens", "kept_tokens", "pages_backed", "pages_owned", "pages_kept")


class OverLive:
    """Reads what a server holds over what its tokens and its reserve take; remembers when that was the most."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.most = 0.0
        self.worst: dict[str, float] = {}

    def __call__(self) -> float | None:
        """None while nothing runs."""
        with contextlib.suppress(requests.RequestException, KeyError):
            rank = requests.get(f"{self.url}/server_info", timeout=10).json()["internal_states"][0]["vtensor"]
            tokens = rank["tree_tokens"] + rank["live_tokens"] + rank["kept_tokens"]
            # The padding page is always there.
            needed = tokens * rank["token_bytes"] + rank["reserve_bytes"] + rank["page_bytes"]
            if rank["requests"]:
                ratio = float(rank["backed_bytes"] / needed)
                if ratio > self.most:
                    self.most = ratio
                    self.worst = {key: rank[key] for key in OF_WORST}
                    self.worst["reserve_pages"] = rank["reserve_bytes"] // rank["page_bytes"]
                return ratio
        return None


class Bench:
    """Starts servers and drives them. Rows are `(part, what, ...)`."""

    def __init__(self, folder: Path, quick: bool, trace: Path | None, speed: float) -> None:
        self.folder, self.quick = folder, quick
        self.trace = workloads(quick, trace, speed)["trace"] if trace else None
        self.model, self.vocabulary = small_model(folder) if quick else large_model(folder)
        self.run = {"commit": results.commit(), "run": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"}
        self.rows: list[dict[str, Any]] = []
        self.used, self.size = device_bytes()

    @contextlib.contextmanager
    def server(self, name: str, *arguments: str, log: str = "") -> Iterator[Client]:
        table = HOST_CONTESTANTS if self.quick else CONTESTANTS
        path = self.folder / f"{log or name}.log"
        with server(name, self.model, path, arguments=[*table[name], *arguments], host=self.quick) as (url, seconds):
            console.print(f"{log or name}: up in {seconds:.1f} s")
            compiled(name, url)
            yield Client(url, self.vocabulary)

    def note(self, part: str, what: str, **values: Any) -> None:
        row = {"part": part, "what": what, "device_bytes": self.size} | self.run | values
        self.rows.append(row)
        console.print({key: value for key, value in row.items() if key not in ("points", *self.run)})

    def burst(self, count: int) -> Workload:
        """So many conversations of four turns under one system prompt."""
        return conversations(count, 2, 100, 0, 24, 8) if self.quick else conversations(count, 4, 2048, 0, 512, 128)

    def drive(self, client: Client, count: int, seed: int, *, flush: bool = False) -> dict[str, Any]:
        """A burst, on a cache as it is, or an empty one: its latencies and throughput."""
        if flush:
            client.flush()
        seconds = client.drive(self.burst(count), seed)
        return latencies(client.answers, seconds)

    @property
    def many(self) -> int:
        return 6 if self.quick else 64

    # The parts.

    def held(self) -> None:
        for name in ("fa3", "vtensor"):
            with self.server(name) as client, Meter(self.used) as meter:
                self.drive(client, self.many, seed=0)  # what is compiled and captured on first use
                client.flush()
                time.sleep(RETURN_SECONDS + 1)
                meter.phase("idle")
                time.sleep(2)
                meter.phase("one conversation")
                self.drive(client, 1, seed=1)
                meter.phase(f"{self.many} conversations")
                self.drive(client, self.many, seed=2)
                meter.phase("after")
                time.sleep(RETURN_SECONDS)
                used = {phase: meter.worst(phase) for _, phase in meter.phases[:3]} | {"after": self.used()}
            points = [[at, round(value / (1 << 20))] for at, value in meter.points]
            self.note("held", name, used=used, phases=meter.phases, points=points)

    def live(self) -> None:
        with self.server("vtensor") as client:
            self.drive(client, self.many, seed=0)
            drives = {"chat": self.burst(self.many)} | ({"trace": self.trace} if self.trace else {})
            for kind, workload in drives.items():
                client.flush()
                time.sleep(RETURN_SECONDS)
                with Meter(read := OverLive(client.url)) as meter:
                    client.drive(workload, seed=1)
                values = [value for _, value in meter.points]
                middle = statistics.median(values) if values else 0.0
                self.note("live", kind, over_live=read.most, median=middle, samples=len(values), worst=read.worst)

    def returned(self) -> None:
        options = ("--vtensor-cache-idle-seconds", "1", "--vtensor-idle-seconds", "1")
        with self.server("vtensor", *options) as client:
            self.drive(client, self.many, seed=0)
            time.sleep(RETURN_SECONDS)
            idle = client.stats()["backed_bytes"]
            with Meter(lambda: float(client.stats()["backed_bytes"])) as meter:
                meter.phase("burst")
                self.drive(client, self.many, seed=1)
            peak = meter.worst("burst")
            start, back = time.perf_counter(), None
            while time.perf_counter() - start < RETURN_SECONDS:
                held = client.stats()["backed_bytes"]
                if back is None and peak - held >= 0.95 * (peak - idle):
                    back = time.perf_counter() - start
                time.sleep(0.05)
            share = (peak - held) / (peak - idle) if peak > idle else 0.0
            self.note("returned", "vtensor", idle=idle, peak=peak, left=held, share=share, seconds=back)

    def backed(self, rounds: int = 3) -> None:
        """One after the other, as both at once would share the GPU. All that the burst touches is backed after the
        first one, and stays so where free pages are kept for an hour."""
        for name, options in {"grown": (), "all backed": ("--vtensor-idle-seconds", "3600")}.items():
            with self.server("vtensor", *options, log=name) as client:
                wait_until_steady(client)
                self.drive(client, self.many, seed=0)
                for number in range(rounds):
                    for temperature in ("trimmed", "warm") if name == "grown" else ("warm",):
                        client.flush()
                        if temperature == "trimmed":
                            wait_until_steady(client)  # as after an hour without a request
                        before = client.stats()["pages_created"]
                        measured = self.drive(client, self.many, seed=1 + number)
                        created = client.stats()["pages_created"] - before
                        self.note("backed", name, temperature=temperature, pages_created=created, **measured)

    def two(self) -> None:
        with self.server("vtensor", log="first") as first:
            self.drive(first, self.many, seed=0)
            rate = [self.drive(first, self.many, seed=n, flush=True)["tokens_per_second"] for n in (1, 2)]
            self.note("two", "vtensor alone", tokens_per_second=statistics.median(rate))
            with self.server("vtensor", log="second") as second:
                self.drive(second, self.many, seed=0)
                for client in (first, second):
                    client.flush()
                for turn in range(4):
                    client = (first, second)[turn % 2]
                    measured = self.drive(client, self.many, seed=20 + turn)
                    held = [one.stats()["backed_bytes"] for one in (first, second)]
                    self.note("two", "vtensor beside another", turn=turn, backed_bytes=held, **measured)

    def pair(self) -> None:
        with self.server("fa3", log="fa3 first"):
            try:
                with self.server("fa3", log="fa3 second"):
                    said = "started"
            except RuntimeError as error:
                lines = [line for line in str(error).splitlines() if "memory" in line.lower()]
                # What it tried, and what there was; what follows is advice.
                said = ". ".join(lines[-1].strip().split(". ")[:3]) if lines else "did not start"
            self.note("pair", "a second server of SGLang as it ships", said=said)


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the GPU's memory and ratios; of the parts that were measured."""
    summary: dict[str, float] = {}
    held = {row["what"]: row for row in rows if row["part"] == "held"}
    if len(held) == 2:
        for phase, name in (("idle", "freed_share_idle"), ("one conversation", "freed_share_one")):
            freed = held["fa3"]["used"][phase] - held["vtensor"]["used"][phase]
            summary[name] = freed / held["vtensor"]["device_bytes"]
    live = [row["over_live"] for row in rows if row["part"] == "live"]
    if live:
        summary["bytes_over_live_worst"] = max(live)
    for row in rows:
        if row["part"] == "returned":
            summary["returned_share_5s"] = row["share"]

    def middle(what: str, temperature: str, key: str) -> float | None:
        values = [
            row[key]
            for row in rows
            if row["part"] == "backed" and row["what"] == what and row["temperature"] == temperature
        ]
        return statistics.median(values) if values else None

    grown, backed = (middle(what, "warm", "tokens_per_second") for what in ("grown", "all backed"))
    if grown and backed:
        summary["throughput_vs_backed"] = grown / backed
    trimmed, warm = (middle("grown", temperature, "ttft_p99_ms") for temperature in ("trimmed", "warm"))
    if trimmed and warm:
        summary["ttft_after_trim_vs_warm"] = trimmed / warm
    alone = [row["tokens_per_second"] for row in rows if row["what"] == "vtensor alone"]
    beside = [row["tokens_per_second"] for row in rows if row["what"] == "vtensor beside another"]
    if alone and beside:
        summary["two_servers_vs_alone"] = statistics.median(beside) / alone[0]
    return summary


def main(
    parts: Annotated[str, typer.Option(help="With commas; all of them by default.")] = "",
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
    trace: Annotated[Path | None, typer.Option(exists=True, help="A Mooncake trace, for the part live.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster than recorded the trace is replayed.")] = 8.0,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here.")] = None,
) -> None:
    """Measure, print, and merge into memory.json."""
    end_with_servers()
    # Two servers on the host would each have the machine to itself.
    chosen = parts_of(parts, PARTS, [part for part in PARTS if not (quick and part in ("two", "pair"))])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick, trace, speed)
        for part in chosen:
            getattr(bench, part)()
            results.keep(rows_file, bench.rows)
    rows = bench.rows
    if not quick:
        path, rows, dropped = results.add_parts("memory", rows, lambda row: row["part"], summarize)
        console.print(results.written(path, dropped))
    console.print(summarize(rows))


if __name__ == "__main__":
    typer.run(main)
