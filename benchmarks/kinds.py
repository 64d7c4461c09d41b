"""Models with layers of two kinds: how many requests run at once, how fast they are served, and how memory moves from
one kind to the other.

    python -m benchmarks.kinds --parts admitted --contestants vtensor    on a GPU, with gpt-oss-20b's geometry
    python -m benchmarks.kinds --model qwen3-next       with Qwen3-Next-80B-A3B's: linear attention, and half its layers
    python -m benchmarks.kinds --quick --model ...      the host backend and a small Gemma 3 or Qwen3.5: does it run?

Weights are random. Each of these parts runs by itself and is merged into kinds.json; so does each contestant, as all of
them take a quarter of an hour:

    admitted   the most requests that ran at once, by SGLang's own log (`#running-req` of decode batches): contexts of
               32k, 2k and 512 tokens, nothing shared, more than have room, all answered. SGLang at its defaults, and
               with --enable-unified-memory, beside ours; one server at a time, with the memory that each takes
    served     the workload chat of the prefix suite, two servers side by side with as many bytes, rounds in turn. Where
               SGLang's own split of its bytes may not suit that, another pair has one that does, and the better one
               counts (`benchmarks.kind_models` says how SGLang divides). Two servers of Qwen3-Next have a third of its
               layers, as more do not fit
    moved      ours alone: short contexts, then long ones, then short ones again, in a cache that either fills. Of what
               has gone from one kind to the other in a load (the median from its 5th second on), the share that was
               there 5 s after its begin (the median of the second until then)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import KEEP, START_SECONDS, Client, Workload, compiled
from benchmarks.geometries import Geometry
from benchmarks.kind_models import CONTESTANTS, HOST_CONTESTANTS, MODELS, Model
from benchmarks.memory import device_bytes as device_reader
from benchmarks.rounds import Spread, rotated, spread
from benchmarks.serving import command, end_with_servers, parts_of, session, started
from benchmarks.workloads import workloads
from sglang_vtensor.demo import free_port

console = Console(width=150)
PARTS = ("admitted", "served", "moved")
RUNNING = re.compile(r"Decode batch.*?#running-req: (\d+)")
#: Which kernels a server has for linear attention, as it says when it starts.
KERNELS = re.compile(r"GDN kernel dispatcher: (.*)")
MOVED_SECONDS, SAMPLE_SECONDS = 5.0, 0.1
#: When, and what owners hold of each kind.
Sample = tuple[float, list[int]]
#: Of `admitted`, and the context that is published by itself and is no part of the mean.
ADMITTED, SHORTEST = ("sglang", "unified", "vtensor"), 512


@dataclass
class Bench:
    """The parts, and the rows that they made. `only` has the contestants that are measured; none: all of a part's."""

    folder: Path
    model: Model
    quick: bool
    rounds: int
    only: list[str]
    rows_file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arguments: dict[str, list[str]] = HOST_CONTESTANTS if self.quick else CONTESTANTS
        if self.quick:
            self.model = self.model.on_host(self.folder / "small")
        self.sizes = self.model.sizes

    def contestants(self, part: str) -> list[str]:
        """Those of a part that are measured. In `served` they are servers of SGLang, and ours is beside each."""
        of = {"admitted": ADMITTED, "served": self.model.beside, "moved": ("vtensor",)}[part]
        return [name for name in of if name in self.arguments and (not self.only or name in self.only)]

    def check(self, parts: list[str]) -> None:
        """Raises `typer.BadParameter` for a contestant that no part has, and for a part without one."""
        for part in parts:
            if not self.contestants(part):
                raise typer.BadParameter(f"{part} has none of the contestants {', '.join(self.only)}")
        if unknown := set(self.only).difference(["vtensor"], *map(self.contestants, parts)):
            raise typer.BadParameter(f"{', '.join(sorted(unknown))} unknown in {', '.join(parts)}")

    def note(self, part: str, what: str, **measured: Any) -> None:
        row = {"model": self.model.name, "part": part, "what": what} | {
            key: round(value, 4) if isinstance(value, float) else value for key, value in measured.items()
        }
        self.rows.append(row)
        console.print(row)
        results.keep(self.rows_file, self.rows)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kernels(self, name: str) -> dict[str, str]:
        found = KERNELS.search(self.log(name))
        return {} if found is None else {"kernels": found[1]}

    @contextlib.contextmanager
    def servers(self, geometry: Geometry, arguments: dict[str, list[str]]) -> Iterator[dict[str, Client]]:
        """Servers by name, which start at once and stand side by side. Raises `RuntimeError` if one does not start."""
        config = self.folder / f"{geometry.config['num_hidden_layers']} layers" / "config.json"
        if not self.quick and not config.exists():
            config.parent.mkdir()
            config.write_text(json.dumps(geometry.config))
        model = self.folder / "small" if self.quick else config.parent
        with contextlib.ExitStack() as stack:
            clients, waits = {}, []
            ports: set[int] = set()
            for name, more in arguments.items():
                ports.add(port := free_port(ports))
                environment, url = dict(os.environ), f"http://127.0.0.1:{port}"
                if self.quick:
                    environment["SGLANG_MAMBA_CONV_DTYPE"] = "float32"  # as the small model computes
                what = command(model, port, [*self.arguments[name], *more], environment, host=self.quick)
                log = self.folder / f"{name}.log"
                waits.append(stack.enter_context(started(name, what, url, log, environment, patience=START_SECONDS)))
                clients[name] = Client(url, geometry.vocabulary)
            for wait in waits:
                wait()
            for name, client in clients.items():
                compiled(name, client.url)
            yield clients

    def admitted(self) -> None:
        geometry, sizes = self.model.alone, self.sizes
        more = ["--decode-log-interval", "1", "--context-length", str(max(sizes.admitted) + 1024)]
        more += ["--max-running-requests", "64" if self.quick else "4096"]
        for name in self.contestants("admitted"):
            room: list[str] = []
            if self.quick:
                room = self.model.room(name, geometry, sizes.admitted_tokens * geometry.token_bytes)
                room += ["--chunked-prefill-size", str(sizes.chunk)]
            try:
                with self.servers(geometry, {name: [*more, *room]}) as clients:
                    for length, count in sizes.admitted.items():
                        self._admit(name, clients[name], length, count)
            except RuntimeError as error:
                if name != "unified":
                    raise
                lines = [line for line in str(error).splitlines() if line.strip()]
                self.note("admitted", name, failed=lines[-1][-300:])

    def _admit(self, name: str, client: Client, length: int, count: int) -> None:
        """So many requests at once, more than have room; where all of them had, the row counts for nothing."""
        client.flush()
        before = len(self.log(name))
        seconds = client.drive(all_at_once(length, count, self.sizes.answer), length)
        running = [int(found) for found in RUNNING.findall(self.log(name)[before:])]
        retracted = self.log(name)[before:].count("Retract requests")
        if max(running) == count:
            self.note("admitted", name, context=length, failed=f"all {count} requests ran at once: send more")
            return
        self.note(
            "admitted",
            name,
            context=length,
            requests=count,
            answered=len(client.answers),
            most_running=max(running),
            retracted_batches=retracted,
            seconds=seconds,
            kv_tokens=client.kv_tokens(),
            **self.kernels(name),
        )

    def served(self) -> None:
        geometry, tokens = self.model.pair, self.sizes.served_tokens
        device = 0 if tokens else int(device_reader()[1])
        nbytes = tokens * geometry.token_bytes or (device - 2 * geometry.server_bytes) // 2
        chat = workloads(self.quick, None, 1.0)["chat"]
        for beside in self.contestants("served"):
            more = {
                name: ["--mem-fraction-static", "0.98", *self.model.room(name, geometry, nbytes)]
                for name in (beside, "vtensor")
            }
            more["vtensor"] += KEEP  # SGLang keeps its pool between rounds, too
            with self.servers(geometry, more) as clients:
                for client in clients.values():
                    client.run(chat, 0)  # compiles
                for number in range(self.rounds):
                    for name in rotated(list(clients), number):
                        measured = clients[name].run(chat, 1 + number)
                        self.note("served", name, beside=beside, round=number, **measured, **self.kernels(name))

    def moved(self) -> None:
        sizes, kinds = self.sizes, ("all tokens", self.model.second)
        more = ["--max-total-tokens", str(sizes.tokens), "--chunked-prefill-size", str(sizes.chunk)]
        more += ["--max-running-requests", "64"] if self.quick else []
        with self.servers(self.model.alone, {"vtensor": more}) as clients:
            client = clients["vtensor"]
            for length in {length for length, _ in sizes.loads}:
                client.drive(all_at_once(length, 2, sizes.load_answer), length)  # compiles
            client.flush()
            before: list[int] | None = None
            for number, (length, count) in enumerate(sizes.loads):
                samples = self._load(client, length, count, seed=number)
                after = held(samples, MOVED_SECONDS, sizes.load_seconds)
                if before is not None:
                    lost = [a - b for a, b in zip(before, after, strict=True)]
                    side = max(range(2), key=lambda n: lost[n])
                    moved = min(lost[side], -lost[1 - side])
                    if moved <= 0:
                        raise RuntimeError(f"nothing moved: the kinds lost {lost} bytes. Send more requests")
                    soon = held(samples, MOVED_SECONDS - 1, MOVED_SECONDS)[1 - side] - before[1 - side]
                    self.note(
                        "moved",
                        f"{kinds[side]} to {kinds[1 - side]}",
                        lost_bytes=lost[side],
                        gained_bytes=-lost[1 - side],
                        gained_soon_bytes=soon,
                        share=min(1.0, soon / moved),
                    )
                before = after

    def _load(self, client: Client, length: int, count: int, seed: int) -> list[Sample]:
        """Requests of so many tokens, `count` of them at all times."""
        over = threading.Event()

        async def run(client: Client, rng: random.Random) -> None:
            async with session() as http:

                async def one_after_another() -> None:
                    while not over.is_set():
                        await client.ask(http, client.words(rng, length), self.sizes.load_answer)

                await asyncio.gather(*(one_after_another() for _ in range(count)))

        thread = threading.Thread(target=client.drive, args=(run, seed))
        start, samples = time.perf_counter(), []
        thread.start()
        while (at := time.perf_counter() - start) < self.sizes.load_seconds:
            stats = client.stats()
            second = stats[f"{self.model.second}_owned_bytes"]
            samples.append((at, [stats["owned_bytes"] - second, second]))
            time.sleep(SAMPLE_SECONDS)
        over.set()
        thread.join()
        return samples


def held(samples: list[Sample], start: float, end: float) -> list[int]:
    """Of each kind, the median of that time: requests come and go together."""
    found = [held for at, held in samples if start <= at <= end]
    return [int(statistics.median(kind)) for kind in zip(*found, strict=True)]


def all_at_once(length: int, count: int, answer: int) -> Workload:
    """So many requests, nothing shared."""

    async def run(client: Client, rng: random.Random) -> None:
        prompts = [client.words(rng, length) for _ in range(count)]
        async with session() as http:
            await asyncio.gather(*(client.ask(http, prompt, answer) for prompt in prompts))

    return run


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the parts that were measured. Ratios above 1 are in our favour."""
    summary: dict[str, float] = {}
    for model in MODELS.values():
        of = [row for row in rows if row["model"] == model.name]
        summary |= _admitted(model, [row for row in of if row["part"] == "admitted"])
        summary |= _served(model, [row for row in of if row["part"] == "served"])
    if shares := [row["share"] for row in rows if row["part"] == "moved"]:
        summary["side_moved_share"] = min(shares)
    return summary


def _admitted(model: Model, rows: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    most = {(row["what"], row["context"]): row["most_running"] for row in rows if "most_running" in row}
    contexts = sorted({context for name, context in most if name == "vtensor"}, reverse=True)
    for other in ADMITTED[:-1]:
        key = f"{model.prefixes[0]}_admitted_vs_{other}"
        ratios = {n: most["vtensor", n] / most[other, n] for n in contexts if (other, n) in most}
        if long := [ratio for context, ratio in ratios.items() if context != SHORTEST]:
            summary[key] = statistics.geometric_mean(long)
        if ratios:
            summary |= {f"{key}_{context}": ratio for context, ratio in ratios.items()}
    return summary


def _served(model: Model, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Beside the server of SGLang that ours is the least ahead of. Nothing before ours was measured beside all."""
    found: list[Spread] = []
    for beside in model.beside:
        ours, theirs = (
            [row["output_tokens_per_second"] for row in rows if (row["beside"], row["what"]) == (beside, name)]
            for name in ("vtensor", beside)
        )
        if not ours:
            return {}
        found.append(spread([a / b for a, b in zip(ours, theirs, strict=True)]))
    least, key = min(found, key=lambda one: one.median), f"{model.prefixes[1]}_served_vs_sglang"
    return {key: least.median, f"{key}_least": least.least, f"{key}_most": least.most}


def which(row: dict[str, Any]) -> tuple[str | None, ...]:
    """What a row measures, which a later one may measure anew. How memory moves is one measurement, whatever it is
    called."""
    return row["model"], row["part"], None if row["part"] == "moved" else row["what"], row.get("beside")


def main(
    parts: Annotated[str, typer.Option(help="With commas; all of them by default.")] = "",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = next(iter(MODELS)),
    contestants: Annotated[
        str, typer.Option(help="With commas; all of them by default. In served, whom ours stands beside.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Of the part served.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here.")] = None,
) -> None:
    """Measure, print, and merge into kinds.json."""
    end_with_servers()
    chosen = parts_of(parts, PARTS)
    if model not in MODELS:
        raise typer.BadParameter(f"--model {model!r} is unknown: there are {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory() as folder:
        only = contestants.split(",") if contestants else []
        bench = Bench(Path(folder), MODELS[model], quick, rounds, only, rows_file)
        bench.check(chosen)
        for part in chosen:
            getattr(bench, part)()
    rows = bench.rows
    if not quick:
        path, rows, dropped = results.add_parts("kinds", rows, which, summarize)
        console.print(results.written(path, dropped))
    console.print(summarize(rows))


if __name__ == "__main__":
    typer.run(main)
