"""The prefix-caching suite: whole servers side by side on one GPU, driven in turn by one client.

    python -m benchmarks.prefix --workloads chat,tree --compare fa3,fa3-page128 --rounds 3 --rows chat.json
    python -m benchmarks.prefix --workloads chat --compare fa3,vllm --vllm-boot boot-vllm --rows vllm.json
    python -m benchmarks.merge chat.json vllm.json        runs of one commit, device and versions, as prefix.json
    python -m benchmarks.prefix --quick                   the host backend and a small model: does the suite run?

For each workload every contestant warms up for one round. Then rounds alternate: in each, every contestant is given the
same requests, from an empty cache, while the others do nothing; who goes first rotates, so that with as many rounds as
contestants, or a multiple, each goes first equally often. Rows are written as they come, so that a run that is cut off
loses one round at most. `--first` goes on with the numbers of an earlier call, and so adds rounds to it.

All contestants have room for the same number of tokens. By default that is what so many servers leave each other on
this device (`contestants.capacity`): on an H200 for three about 190,000 tokens, and for two 380,000; `workloads.TOKENS`
says what each workload needs. So chat, documents, tree and random run with three side by side, and agent with two.
Where the contestants do not fit together, or with `--in-turn`, each is started anew for each round, warms up and has
the GPU to itself; then, too, who goes first rotates.

A ratio is only ever taken between contestants of one round.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.contestants import (
    GPU,
    HOST,
    HOST_TOKENS,
    ROUND_TOKENS,
    Client,
    Plan,
    Staged,
    Workload,
    capacity,
    servers,
)
from benchmarks.geometries import GEOMETRIES, LLAMA, Geometry
from benchmarks.rounds import Row, compare, rotated, summarize, whole
from benchmarks.workloads import FULL, TOKENS, workloads

console = Console(width=190)
CONTEXT = 65_536


class Suite:
    """One run: measures rounds, and keeps and shows them."""

    def __init__(
        self, names: list[str], made: Mapping[str, Workload | Staged], plan: Plan, head: Row, file: Path | None
    ) -> None:
        self.names, self.made, self.plan, self.head, self.file = names, made, plan, head, file
        self.rows: list[Row] = []
        self.label = ""
        self._run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"

    def side_by_side(self, kinds: list[str], numbers: range) -> None:
        """All servers are up; rounds of the contestants alternate."""
        with self._up(self.names) as clients:
            for kind in kinds:
                for name in self.names:
                    clients[name].run(self.made[kind], seed=0)
                for number in numbers:
                    for place, name in enumerate(rotated(self.names, number)):
                        self._measure(kind, number, place, name, clients)

    def in_turn(self, kinds: list[str], numbers: range) -> None:
        """One server is up; each contestant is started once a round."""
        for number in numbers:
            for place, name in enumerate(rotated(self.names, number)):
                with self._up([name]) as clients:
                    for kind in kinds:
                        clients[name].run(self.made[kind], seed=0)
                        self._measure(kind, number, place, name, clients)

    def _measure(self, kind: str, number: int, place: int, name: str, clients: dict[str, Client]) -> None:
        """One round of one contestant, and what the workers of our servers did beside it."""
        beside = [client for other, client in clients.items() if other != name and other.startswith("vtensor")]
        before = sum(client.stats()["worker_seconds"] for client in beside)
        measured = clients[name].run(self.made[kind], seed=number)
        after = sum(client.stats()["worker_seconds"] for client in beside)
        row: Row = {
            "workload": self.label + kind,
            "contestant": name,
            "among": ",".join(sorted(self.names)),
            "run": self._run,
        }
        row |= {"round": number, "place": place, "servers_up": len(clients), "kv_tokens": clients[name].kv_tokens()}
        self.rows.append(self.head | row | measured | {"worker_seconds_beside": round(after - before, 4)})
        if self.file is not None:
            self.file.write_text(json.dumps(self.rows, indent=1))
        console.print(
            f"{kind} {number} {name}: {measured['tokens_per_second']:,.0f} tokens/s in {measured['seconds']:.1f} s"
        )

    @contextlib.contextmanager
    def _up(self, names: list[str]) -> Iterator[dict[str, Client]]:
        """Servers, while the context lasts. Their versions go into the head of the run."""
        with servers(names, self.plan) as (clients, seconds):
            for name, client in clients.items():
                self.head["versions"] |= client.versions()
                console.print(f"{name}: up in {seconds[name]:.1f} s, with room for {client.kv_tokens():,} tokens")
            yield clients


def table(rows: list[Row]) -> Table:
    """What `rounds.compare` says; all ratios are ours over the contestant's."""
    shown = Table("workload", "contestant", "rounds", "first", "tokens/s", "least", "most", box=None)
    for column in ("TTFT", "p99", "TPOT", "cached", "mapping", "worker", "vtensor / it", "least", "most"):
        shown.add_column(column)
    for one in compare(rows):
        ratio = [f"{one[key]:.3f}" for key in ("ratio", "ratio_least", "ratio_most")] if "ratio" in one else []
        shown.add_row(
            one["workload"],
            one["contestant"],
            *(str(one[key]) for key in ("rounds", "first")),
            *(f"{one[key]:,.0f}" for key in ("tokens_per_second", "least", "most")),
            *(f"{one[key]:.1f}" for key in ("ttft_median_ms", "ttft_p99_ms", "tpot_median_ms")),
            f"{one['cached_share']:.1%}",
            f"{one['mapping_share']:.2%}",
            f"{one['worker_share']:.1%}",
            *ratio,
        )
    return shown


def main(
    kinds: Annotated[str, typer.Option("--workloads", help="With commas; all of them by default.")] = "",
    compare_with: Annotated[str, typer.Option("--compare", help="Contestants beside ours, with commas.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    first: Annotated[int, typer.Option(min=1, help="The number of the first round.")] = 1,
    in_turn: Annotated[bool, typer.Option("--in-turn", help="One server at a time, even where all fit.")] = False,
    tokens: Annotated[int, typer.Option(help="KV tokens of each server; 0 for what the device has room for.")] = 0,
    trace: Annotated[Path | None, typer.Option(exists=True, help="A Mooncake trace, for the workload trace.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster than recorded the trace is replayed.")] = 1.0,
    vllm_boot: Annotated[
        Path | None,
        typer.Option(exists=True, envvar="VTENSOR_VLLM_BOOT", help="A shell file, sourced before vLLM is started."),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of all servers. For fp8_e4m3, rows are of fp8_<workload>, and the file is fp8.json.")
    ] = "auto",
    geometry_name: Annotated[
        str, typer.Option("--model", help="A geometry; rows of another than the first are in models.json.")
    ] = next(iter(GEOMETRIES)),
    quick: Annotated[
        bool, typer.Option(help="A small model on the host backend, written to prefix_quick.json.")
    ] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here too.")] = None,
) -> None:
    """Measure, print, and merge into the results."""
    # Who ends this ends its servers, which would else keep the GPU's memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if geometry_name not in GEOMETRIES:
        raise typer.BadParameter(f"--model {geometry_name!r} is unknown: there are {', '.join(GEOMETRIES)}")
    known, geometry = HOST if quick else GPU, GEOMETRIES[geometry_name]
    file = "prefix"
    names = ["vtensor", *(compare_with.split(",") if compare_with else [] if quick else ["fa3", "fa3-page128"])]
    made = workloads(quick, trace, speed)
    chosen = kinds.split(",") if kinds else [kind for kind in made if quick or kind not in FULL]
    for name in (set(names) - set(known)) | (set(chosen) - set(made)):
        have = "trace needs --trace FILE" if name == "trace" else f"there are {', '.join([*known, *made])}"
        raise typer.BadParameter(f"{name!r} is unknown: {have}")
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"each contestant takes part once, and vtensor always does: not {', '.join(names)}")
    if full := FULL.keys() & set(chosen):
        if len(chosen) > 1 and not quick:
            raise typer.BadParameter(f"{', '.join(sorted(full))} fill a cache of their own size: run each alone")
        tokens = tokens or (0 if quick else FULL[chosen[0]] // 2 // ROUND_TOKENS * ROUND_TOKENS)
    needed = 0 if quick or full else max(TOKENS[kind] for kind in chosen)
    room = tokens or (HOST_TOKENS if quick else capacity(device_bytes(), len(names), geometry))
    if not tokens and room < needed and len(names) > 1:
        console.print(f"{len(names)} servers would have room for {room:,} tokens each; {needed:,} are needed: in turn")
        in_turn = True
    if in_turn and not tokens and not quick:
        room = capacity(device_bytes(), 1, geometry)
    if room < needed:
        console.print(f"room for {room:,} tokens is less than the {needed:,} that {', '.join(chosen)} come back to")
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder), geometry)
        plan = Plan(model, vocabulary, CONTEXT, room, quick, vllm_boot, kv_cache_dtype, geometry)
        suite = Suite(names, made, plan, results.head(), rows_file)
        if geometry.label:
            suite.label, file = geometry.label, "models"
        if kv_cache_dtype.startswith("fp8"):
            suite.label, file = f"fp8_{geometry.label}", "fp8"
        measure: Callable[[list[str], range], None] = suite.in_turn if in_turn else suite.side_by_side
        measure(chosen, range(first, first + rounds))
    console.print(table(suite.rows))
    console.print(summarize(whole(suite.rows)))
    if write:
        path, dropped = results.add_rounds("prefix_quick" if quick else file, [suite.rows])
        console.print(f"written to {path}", *([f"; dropped what it had: {dropped}"] if dropped else []))


def device_bytes() -> int:
    """The memory of the GPU that the servers will have."""
    import pynvml

    pynvml.nvmlInit()
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(int(gpu))).total)


def large_model(folder: Path, geometry: Geometry = LLAMA) -> tuple[Path, int]:
    """A geometry, with room for the agents' contexts."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(geometry.config | {"max_position_embeddings": CONTEXT}))
    return model, geometry.vocabulary


def small_model(folder: Path) -> tuple[Path, int]:
    from sglang_vtensor import tiny_model

    return tiny_model.build(folder / "model"), 400


if __name__ == "__main__":
    typer.run(main)
