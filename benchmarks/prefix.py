"""The prefix-caching suite: whole servers, one after another on one machine, driven by one client.

    python -m benchmarks.prefix --workloads chat,agent --compare fa3,triton
    python -m benchmarks.prefix --quick                   the host backend and a small model: does the suite run?

Every workload is a closed loop of conversations, except `trace`, which arrives by the clock of a production trace.
Requests are token ids with forced lengths. Each start of a server runs a workload once to warm up, flushed before, and
`--rounds` times for the clock, each time with other tokens. Runs of single workloads are merged into prefix.json; a
ratio is only ever taken between servers of one run.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import requests
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.serving import CONFIG, CONTESTANTS, VOCABULARY, server, session, stream

console = Console(width=170)
CONTEXT = 65_536
GPU_CONTESTANTS = CONTESTANTS | {
    f"{name}-nocache": [*args, "--disable-radix-cache"] for name, args in CONTESTANTS.items()
}
#: Ours, where decode reads what requests share once for each of them.
GPU_CONTESTANTS["vtensor-plain"] = [*CONTESTANTS["vtensor"], "--vtensor-shared-decode", "off"]
HOST_CONTESTANTS = {"vtensor": ["--kv-backend", "vtensor"], "torch_native": ["--attention-backend", "torch_native"]}
#: After a flush, so that a round does not begin with what it left to do.
SETTLE_SECONDS = 1.0
#: What our server counted in a round.
COUNTED = (
    "adoptions",
    "partial_copies",
    "tails_continued",
    "prefix_maps_on_continue",
    "awaited_prefixes",
    "extends_by_pages",
    "maps",
    "maps_behind",
    "unmaps",
    "pages_created",
    "pages_released",
    "worker_seconds",
    "decode_steps_shared",
    "decode_steps_plain",
    "shared_bytes_saved",
)


@dataclass
class Answer:
    """One request: seconds since the start of the run, and tokens."""

    sent: float
    first: float
    last: float
    prompt: int
    cached: int
    new: int


@dataclass
class Client:
    """Requests by token ids, streamed; remembers what each took."""

    url: str
    vocabulary: int
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> list[int]:
        """The new tokens. Raises `aiohttp.ClientResponseError` if the server refuses."""
        said = await stream(http, self.url, tokens, new)
        self.answers.append(Answer(said.sent, said.first, said.last, len(tokens), said.meta["cached_tokens"], new))
        return said.tokens

    def stats(self) -> dict[str, Any]:
        state = requests.get(f"{self.url}/server_info", timeout=30).json()["internal_states"][0]
        stats: dict[str, Any] = state.get("vtensor", {})
        return stats

    def flush(self) -> None:
        requests.post(f"{self.url}/flush_cache", timeout=30).raise_for_status()

    def words(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(6, self.vocabulary) for _ in range(count)]

    def drive(self, workload: Workload, seed: int) -> float:
        """Do the workload. Returns seconds; `answers` are what came of it."""
        self.answers = []
        start = time.perf_counter()
        asyncio.run(workload(self, random.Random(seed)))
        return time.perf_counter() - start

    def run(self, workload: Workload, seed: int) -> dict[str, Any]:
        """One round, from an empty cache: a row of the results."""
        self.flush()
        time.sleep(SETTLE_SECONDS)
        before = self.stats()
        seconds = self.drive(workload, seed)
        after = self.stats()
        measured = row(self.answers, seconds) | {"mapping_share": 0.0}
        if after:
            waited = after["scheduling_seconds"] - before["scheduling_seconds"]
            measured |= {"mapping_share": round(waited / seconds, 5), "backed_bytes": after["backed_bytes"]}
            measured |= {key: after[key] - before[key] for key in COUNTED}
        return measured


def row(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Throughput, times to the first token and between tokens (ms), and how much of the prompts was cached."""
    first = sorted(1000 * (answer.first - answer.sent) for answer in answers)
    between = sorted(1000 * (answer.last - answer.first) / (answer.new - 1) for answer in answers if answer.new > 1)
    prompt, new = sum(answer.prompt for answer in answers), sum(answer.new for answer in answers)

    def at(values: list[float], share: float) -> float:
        return round(values[int(share * (len(values) - 1))], 2) if values else 0.0

    return {
        "seconds": round(seconds, 3),
        "requests": len(answers),
        "requests_per_second": round(len(answers) / seconds, 3),
        "tokens_per_second": round((prompt + new) / seconds, 1),
        "output_tokens_per_second": round(new / seconds, 1),
        "ttft_median_ms": at(first, 0.5),
        "ttft_p99_ms": at(first, 0.99),
        "tpot_median_ms": at(between, 0.5),
        "tpot_p99_ms": at(between, 0.99),
        "cached_share": round(sum(answer.cached for answer in answers) / prompt, 4),
    }


Workload = Callable[[Client, random.Random], Coroutine[Any, Any, None]]


async def gather(calls: list[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*calls)


def conversations(count: int, turns: int, system: int, own: int, said: int, answered: int) -> Workload:
    """`count` conversations of `turns`: all begin with `system` tokens, each with `own` more; then every turn says
    `said` tokens and is answered with `answered`, which the next one has in its history."""

    async def run(client: Client, rng: random.Random) -> None:
        shared = client.words(rng, system)
        texts = [
            (shared + client.words(rng, own), [client.words(rng, said) for _ in range(turns)]) for _ in range(count)
        ]

        async def converse(http: aiohttp.ClientSession, history: list[int], questions: list[list[int]]) -> None:
            for question in questions:
                history = history + question
                history = history + await client.ask(http, history, answered)

        async with session() as http:
            await gather([converse(http, *text) for text in texts])

    return run


def documents(count: int, length: int, questions: int, said: int, answered: int, at_once: int) -> Workload:
    """Questions on shared documents, in random order, `at_once` at a time."""

    async def run(client: Client, rng: random.Random) -> None:
        texts = [client.words(rng, length) for _ in range(count)]
        prompts = [text + client.words(rng, said) for text in texts for _ in range(questions)]
        rng.shuffle(prompts)
        gate = asyncio.Semaphore(at_once)

        async def one(http: aiohttp.ClientSession, prompt: list[int]) -> None:
            async with gate:
                await client.ask(http, prompt, answered)

        async with session() as http:
            await gather([one(http, prompt) for prompt in prompts])

    return run


def tree(branches: int, twigs: int, level: int, answered: int) -> Workload:
    """Few-shot and self-consistency: a stem, `branches` from it, `twigs` from each; `level` tokens a level. The stem is
    asked first, then the branches, then all twigs at once."""

    async def run(client: Client, rng: random.Random) -> None:
        stem = client.words(rng, level)
        grown = [stem + client.words(rng, level) for _ in range(branches)]
        leaves = [branch + client.words(rng, level) for branch in grown for _ in range(twigs)]

        async def one(http: aiohttp.ClientSession, prompt: list[int]) -> None:
            await client.ask(http, prompt, answered)

        async with session() as http:
            for prompts in ([stem], grown, leaves):
                await gather([one(http, prompt) for prompt in prompts])

    return run


def independent(count: int, length: int, answered: int, at_once: int) -> Workload:
    """Nothing is shared: what reuse costs where there is none."""
    return documents(count, length, 1, 1, answered, at_once)


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: when it comes (seconds), its blocks of 512 tokens by id, and its lengths."""

    at: float
    blocks: list[int]
    prompt: int
    new: int


BLOCK = 512
#: How much of a trace is replayed: requests of up to 16,000 tokens, 600,000 in all.
TRACE_REQUESTS = 100
#: Workloads that take so long, for every contestant, that they are done once a start.
LONG = ("agent", "trace")


def read_trace(path: Path, count: int, longest: int, speed: float, *, most_new: int = 1 << 20) -> list[Arrival]:
    """The first `count` requests of a Mooncake trace whose input and output fit `longest` tokens, `speed` times as
    fast, with outputs cut to `most_new`. Raises `ValueError` if there is none."""
    arrivals: list[Arrival] = []
    start = None
    with path.open() as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["input_length"] + entry["output_length"] > longest:
                continue
            start = entry["timestamp"] if start is None else start
            at = (entry["timestamp"] - start) / 1000 / speed
            arrivals.append(
                Arrival(at, entry["hash_ids"], entry["input_length"], min(entry["output_length"], most_new))
            )
            if len(arrivals) == count:
                break
    if not arrivals:
        raise ValueError(f"{path} has no request of up to {longest} tokens")
    return arrivals


def replay(arrivals: list[Arrival]) -> Workload:
    """Requests by their arrival time. Equal block ids are equal tokens, others differ."""

    async def run(client: Client, rng: random.Random) -> None:
        salt = rng.randrange(1 << 30)
        blocks = {b: client.words(random.Random(salt + b), BLOCK) for arrival in arrivals for b in arrival.blocks}

        async def one(http: aiohttp.ClientSession, arrival: Arrival) -> None:
            await asyncio.sleep(arrival.at)
            tokens = [token for block in arrival.blocks for token in blocks[block]][: arrival.prompt]
            await client.ask(http, tokens, arrival.new)

        async with session() as http:
            await gather([one(http, arrival) for arrival in arrivals])

    return run


def workloads(quick: bool, trace: Path | None, speed: float) -> dict[str, Workload]:
    """By name. `trace` is there where its file is given."""
    if quick:
        made = {
            "chat": conversations(4, 3, 100, 0, 24, 8),
            "agent": conversations(2, 3, 0, 300, 40, 4),
            "documents": documents(2, 250, 4, 10, 4, 4),
            "tree": tree(2, 3, 50, 4),
            "random": independent(6, 60, 8, 4),
        }
        arrivals = read_trace(trace, 12, 1500, speed, most_new=8) if trace else []
    else:
        made = {
            "chat": conversations(64, 4, 2048, 0, 512, 128),
            "agent": conversations(8, 6, 0, 32_768, 2048, 32),
            "documents": documents(8, 16_384, 32, 64, 64, 256),
            "tree": tree(8, 8, 512, 64),
            "random": independent(192, 1024, 512, 64),
        }
        arrivals = read_trace(trace, TRACE_REQUESTS, 16_000, speed) if trace else []
    if arrivals:
        made["trace"] = replay(arrivals)
    return made


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of throughput, each within the run that measured the workload; and the worst of what must be low."""

    def middle(contestant: str, kind: str, key: str) -> float | None:
        values = [row[key] for row in rows if row["contestant"] == contestant and row["workload"] == kind]
        return statistics.median(values) if values else None

    kinds = list(dict.fromkeys(row["workload"] for row in rows))
    summary: dict[str, float] = {}
    against_triton, waits = [], []
    for kind in kinds:
        ours = middle("vtensor", kind, "tokens_per_second")
        for other in dict.fromkeys(row["contestant"] for row in rows if row["workload"] == kind):
            theirs = middle(other, kind, "tokens_per_second")
            if other != "vtensor" and ours and theirs:
                summary[f"{kind}_vs_{other}"] = ours / theirs
        if f"{kind}_vs_triton" in summary and kind != "random":
            against_triton.append(summary[f"{kind}_vs_triton"])
        theirs, mine = middle("fa3", kind, "ttft_p99_ms"), middle("vtensor", kind, "ttft_p99_ms")
        if theirs and mine:
            waits.append(theirs / mine)
    if against_triton:
        summary["geomean_vs_triton"] = statistics.geometric_mean(against_triton)
        summary["max_vs_triton"] = max(against_triton)
    if waits:
        summary["ttft_p99_vs_fa3_worst"] = min(waits)
    ours_rows = [row for row in rows if row["contestant"] == "vtensor"]
    if ours_rows:
        summary["mapping_share_worst"] = max(row["mapping_share"] for row in ours_rows)
        summary["worker_share_worst"] = round(max(row["worker_seconds"] / row["seconds"] for row in ours_rows), 4)
        summary["prefix_maps_on_continue"] = sum(row["prefix_maps_on_continue"] for row in ours_rows)
    return summary


def merged(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """These rows, and those of other workloads that the results file has."""
    kept = results.read(name)
    kinds = {row["workload"] for row in rows}
    return [row for row in (kept["rows"] if kept else []) if row["workload"] not in kinds] + rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        "workload",
        "contestant",
        "req/s",
        "tokens/s",
        "TTFT",
        "p99",
        "TPOT",
        "p99",
        "cached",
        "mapping",
        "worker",
        box=None,
    )
    for one in rows:
        shown.add_row(
            one["workload"],
            one["contestant"],
            f"{one['requests_per_second']:.2f}",
            f"{one['tokens_per_second']:,.0f}",
            *(f"{one[key]:.1f}" for key in ("ttft_median_ms", "ttft_p99_ms", "tpot_median_ms", "tpot_p99_ms")),
            f"{one['cached_share']:.1%}",
            f"{one['mapping_share']:.2%}",
            f"{one.get('worker_seconds', 0.0) / one['seconds']:.1%}",
        )
    return shown


def main(
    kinds: Annotated[str, typer.Option("--workloads", help="With commas; all of them by default.")] = "",
    compare: Annotated[str, typer.Option(help="Contestants beside ours, with commas.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    starts: Annotated[int, typer.Option(min=1)] = 1,
    trace: Annotated[Path | None, typer.Option(exists=True, help="A Mooncake trace, for the workload trace.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster than recorded the trace is replayed.")] = 1.0,
    quick: Annotated[
        bool, typer.Option(help="A small model on the host backend, written to prefix_quick.json.")
    ] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here too.")] = None,
) -> None:
    """Measure, print, and merge into the results."""
    known = HOST_CONTESTANTS if quick else GPU_CONTESTANTS
    names = ["vtensor", *(compare.split(",") if compare else [] if quick else ["fa3", "triton"])]
    made = workloads(quick, trace, speed)
    chosen = kinds.split(",") if kinds else list(made)
    for name in (set(names) - set(known)) | (set(chosen) - set(made)):
        have = "trace needs --trace FILE" if name == "trace" else f"there are {', '.join([*known, *made])}"
        raise typer.BadParameter(f"{name!r} is unknown: {have}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder))
        run = {
            "commit": results.commit(),
            "device": results.device()[0],
            "run": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}",
        }
        for start in range(starts):
            for name in names if start % 2 == 0 else names[::-1]:
                log = Path(folder) / f"{name}.log"
                with server(name, model, log, arguments=known[name], host=quick) as (url, seconds):
                    console.print(f"{name}: up in {seconds:.1f} s")
                    client = Client(url, vocabulary)
                    for kind in chosen:
                        client.run(made[kind], seed=0)
                        for number in range(1 if kind in LONG else rounds):
                            measured = client.run(made[kind], seed=1 + start * rounds + number)
                            rows.append({"workload": kind, "contestant": name, "start": start} | run | measured)
                        if rows_file is not None:  # what a run that is cut off has measured is not lost
                            rows_file.write_text(json.dumps(rows, indent=1))
    console.print(table(rows))
    name = "prefix_quick" if quick else "prefix"
    rows = merged(rows, name)
    summary = summarize(rows)
    console.print(summary)
    if write:
        console.print(f"written to {results.write(name, summary, rows)}")


def large_model(folder: Path) -> tuple[Path, int]:
    """Llama-3-8B's geometry, with room for the agents' contexts."""
    config = CONFIG | {"max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, VOCABULARY


def small_model(folder: Path) -> tuple[Path, int]:
    from sglang_vtensor import tiny_model

    return tiny_model.build(folder / "model"), 400


if __name__ == "__main__":
    typer.run(main)
