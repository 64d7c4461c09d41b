"""Whole servers on a GPU: ours against SGLang's own KV cache, in turn on one machine, driven by one client.

    python -m benchmarks.serving --workload chat,random --compare fa3,triton

Llama-3-8B's geometry with random weights: the real kernels, no tokenizer. Every contestant is started `--starts` times,
in turn, so that neither profits from what the other compiled; each start runs each workload once to warm up and
`--rounds` times for the clock. The last start counts for the start-up time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import requests
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.geometries import LLAMA
from sglang_vtensor.demo import answers, end_with_parent, free_port, stop

VOCABULARY, CONFIG = LLAMA.vocabulary, LLAMA.config
CONTESTANTS = {
    "vtensor": ["--kv-backend", "vtensor"],
    "fa3": ["--attention-backend", "fa3"],
    "fa3-page128": ["--attention-backend", "fa3", "--page-size", "128"],
    "triton": ["--attention-backend", "triton"],
}
#: The first token is sent at once, and then every so many: 256 streams of single tokens keep SGLang's HTTP server, and
#: the client, busier than the GPU.
STREAM_INTERVAL = 16
console = Console(width=130)


@dataclass
class Round:
    """One run of a workload."""

    seconds: float
    tokens: int
    first: list[float]
    mapping: float
    worker: float

    def row(self) -> dict[str, float]:
        first = sorted(self.first)
        return {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "ttft_median_ms": round(1000 * statistics.median(first), 1),
            "ttft_p99_ms": round(1000 * first[int(0.99 * (len(first) - 1))], 1),
            "mapping_share": round(self.mapping / self.seconds, 5),
            "worker_share": round(self.worker / self.seconds, 5),
        }


@dataclass
class Said:
    """One answer: when it was asked for, began and ended (`time.perf_counter`), the longest time between two of its
    chunks (seconds), its tokens, and SGLang's account."""

    sent: float
    first: float
    last: float
    gap: float
    tokens: list[int]
    meta: dict[str, Any]


async def stream(http: aiohttp.ClientSession, url: str, tokens: list[int], new: int, temperature: float = 0.0) -> Said:
    """Ask for exactly `new` tokens. Raises `aiohttp.ClientResponseError` if the server refuses."""
    body = {
        "input_ids": tokens,
        "stream": True,
        "sampling_params": {
            "temperature": temperature,
            "max_new_tokens": new,
            "ignore_eos": True,
            "stream_interval": STREAM_INTERVAL,
        },
    }
    sent = time.perf_counter()
    times, last = [], b""
    async with http.post(f"{url}/generate", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                last = line
    times.append(time.perf_counter())
    said = json.loads(last[6:])
    return Said(sent, times[0], times[-1], longest(times), said["output_ids"][-new:], said["meta_info"])


def longest(times: list[float]) -> float:
    """The longest time between two that follow each other."""
    return max((after - before for before, after in pairwise(times)), default=0.0)


class Client:
    """Requests by token ids, streamed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.first: list[float] = []

    async def ask(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> list[int]:
        said = await stream(http, self.url, tokens, new)
        self.first.append(said.first - said.sent)
        return said.tokens

    def run(self, workload: str, seed: int) -> Round:
        self.first = []
        before = self.memory_seconds()
        start = time.perf_counter()
        tokens = asyncio.run(WORKLOADS[workload](self, random.Random(seed)))
        seconds = time.perf_counter() - start
        mapping, worker = (now - then for now, then in zip(self.memory_seconds(), before, strict=True))
        return Round(seconds, tokens, self.first, mapping, worker)

    def memory_seconds(self) -> tuple[float, float]:
        """What memory cost the scheduling thread so far, and what its worker was busy for; 0 for SGLang's own."""
        state = requests.get(f"{self.url}/server_info", timeout=30).json()["internal_states"][0]
        told = state.get("vtensor", {})
        return float(told.get("scheduling_seconds", 0.0)), float(told.get("worker_seconds", 0.0))


def session() -> aiohttp.ClientSession:
    """For as many requests at a time as are asked: each is an open file. A connection that nobody uses is closed before
    SGLang's server does that, which takes 5 s: a request that is sent just then fails."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600), connector=connector, read_bufsize=1 << 20)


async def chat(client: Client, rng: random.Random) -> int:
    """64 conversations of 4 turns: a 2048-token system prompt for all, 512 tokens in, 128 out. Returns tokens out."""
    system = words(rng, 2048)
    questions = [[words(rng, 512) for _ in range(4)] for _ in range(64)]

    async def converse(http: aiohttp.ClientSession, turns: list[list[int]]) -> None:
        history = list(system)
        for question in turns:
            history += question
            history += await client.ask(http, history, 128)

    async with session() as http:
        await asyncio.gather(*(converse(http, turns) for turns in questions))
    return 64 * 4 * 128


async def without_reuse(client: Client, rng: random.Random) -> int:
    """192 requests of 1024 tokens in and 512 out, 64 at a time, nothing shared. Returns tokens out."""
    prompts = [words(rng, 1024) for _ in range(192)]
    gate = asyncio.Semaphore(64)

    async def one(http: aiohttp.ClientSession, prompt: list[int]) -> None:
        async with gate:
            await client.ask(http, prompt, 512)

    async with session() as http:
        await asyncio.gather(*(one(http, prompt) for prompt in prompts))
    return 192 * 512


WORKLOADS = {"chat": chat, "random": without_reuse}


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def end_with_servers() -> None:
    """Who ends this process from now on ends its servers, which would else keep the GPU's memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def parts_of(text: str, known: Iterable[str], default: Iterable[str] | None = None) -> list[str]:
    """The parts of a benchmark that `text` names, with commas; if it is empty, `default`, or all. Raises
    `typer.BadParameter` for one that is not `known`."""
    chosen = text.split(",") if text else list(known if default is None else default)
    if unknown := set(chosen) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)} unknown: there are {', '.join(known)}")
    return chosen


def command(
    model: Path, port: int, arguments: list[str], environment: dict[str, str], *, host: bool = False, text: bool = False
) -> list[str]:
    """The command of a server of SGLang's with these arguments; on the `host` backend `environment` says so. With
    `text` it reads and writes text, by the tokenizer in the model's folder."""
    start = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    start += ["--host", "127.0.0.1", "--port", str(port), "--random-seed", "0"]
    start += ["--sampling-backend", "pytorch", *([] if text else ["--skip-tokenizer-init"])]
    if host:
        start += ["--dtype", "float32", "--max-total-tokens", "8192", "--max-running-requests", "16"]
        environment["SGLANG_PLATFORM"] = "vtensor_host"
    else:
        start += ["--dtype", "bfloat16", "--load-format", "dummy"]
    return start + arguments


@contextlib.contextmanager
def started(
    name: str,
    command: list[str],
    url: str,
    log: Path,
    environment: dict[str, str],
    *,
    health: str = "/health_generate",
    folder: Path | None = None,
    patience: float = 300,
) -> Iterator[Callable[[], float]]:
    """Start a server, in `folder`, and end it afterwards with all its children. Yields a function that waits until it
    answers `health` and returns the seconds since the start; it raises `RuntimeError` after `patience` seconds, or if
    the server ended."""
    start = time.perf_counter()

    def wait() -> float:
        while True:
            if process.poll() is not None or time.perf_counter() - start > patience:
                raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')[-4000:]}")
            if answers(process, url + health):
                return time.perf_counter() - start
            time.sleep(0.2)

    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            yield wait
        finally:
            stop(process)
            with contextlib.suppress(ProcessLookupError):  # a child that outlives its server would hold the GPU
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def server(
    name: str, model: Path, log: Path, *, arguments: list[str] | None = None, host: bool = False
) -> Iterator[tuple[str, float]]:
    """Start a contestant (with other `arguments` than the table's; on the `host` backend). Yields its URL and the
    seconds until it answered."""
    port, environment = free_port(), dict(os.environ)
    what = command(model, port, CONTESTANTS[name] if arguments is None else arguments, environment, host=host)
    url = f"http://127.0.0.1:{port}"
    with started(name, what, url, log, environment) as wait:
        yield url, wait()


def main(
    workload: Annotated[str, typer.Option(help="chat, random, or both with a comma.")] = "chat,random",
    compare: Annotated[str, typer.Option(help="Contestants beside ours, with commas.")] = "fa3,triton",
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    starts: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure, print and write serving.json. Workloads that it has of the same commit and device are kept in it."""
    names = [*compare.split(","), "vtensor"]
    workloads = workload.split(",")
    rows: list[dict[str, Any]] = []
    startup: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        for turn in range(starts):
            for name in names if turn % 2 == 0 else names[::-1]:
                with server(name, Path(folder), Path(folder) / f"{name}.log") as (url, seconds):
                    startup[name] = seconds
                    client = Client(url)
                    for kind in workloads:
                        client.run(kind, seed=0)
                        for number in range(rounds):
                            row = client.run(kind, seed=1 + turn * rounds + number).row()
                            rows.append({"contestant": name, "workload": kind, "start": turn} | row)
                            console.print(rows[-1])
                    console.print(f"{name}: up in {seconds:.1f} s")
    summary: dict[str, float] = {}
    table = Table(
        "workload", "contestant", "tokens/s", "TTFT median", "TTFT p99", "mapping", "worker", "ours / theirs", box=None
    )
    for kind in workloads:
        for name in names:
            mine = [row for row in rows if row["contestant"] == name and row["workload"] == kind]
            middle = {key: statistics.median(row[key] for row in mine) for key in Round(1, 1, [0.0], 0, 0).row()}
            ours = statistics.median(
                row["tokens_per_second"] for row in rows if row["contestant"] == "vtensor" and row["workload"] == kind
            )
            ratio = ours / middle["tokens_per_second"]
            if name != "vtensor":
                summary[f"{kind}_vs_{name}"] = ratio
            table.add_row(
                kind,
                name,
                f"{middle['tokens_per_second']:,.0f}",
                f"{middle['ttft_median_ms']:.0f} ms",
                f"{middle['ttft_p99_ms']:.0f} ms",
                f"{middle['mapping_share']:.2%}",
                f"{middle['worker_share']:.2%}",
                f"{ratio:.3f}",
            )
    kept, before = results.read("serving"), ""
    if kept is not None and (kept["commit"], kept["device"]) == (results.commit(), results.device()[0]):
        others = [row for row in kept["rows"] if row["workload"] not in workloads]
        before = kept["command"] if others else ""
        rows = others + rows
        summary = kept["summary"] | summary
    summary["mapping_share"] = max(row["mapping_share"] for row in rows if row["contestant"] == "vtensor")
    summary["startup_extra_s"] = startup["vtensor"] - startup[names[0]]
    console.print(table)
    console.print(summary)
    console.print(f"written to {results.write('serving', summary, rows, after=before)}")


if __name__ == "__main__":
    typer.run(main)
