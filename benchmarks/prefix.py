"""The prefix-caching suite: whole servers side by side on one GPU, driven in turn by one client.

    python -m benchmarks.prefix --workloads chat,tree --compare fa3,fa3-page128 --rounds 3 --rows chat.json
    python -m benchmarks.prefix --workloads chat --compare fa3,vllm --vllm-boot boot-vllm --rows vllm.json
    python -m benchmarks.merge chat.json vllm.json        runs of one commit, device and versions, as prefix.json
    python -m benchmarks.prefix --quick                   the host backend and a small model: does the suite run?

For each workload every contestant warms up for one round, or for the first turns of one that takes minutes. Then rounds
alternate: in each, every contestant is given the same requests, from an empty cache, while the others do nothing; who
goes first rotates, so that with as many rounds as contestants, or a multiple, each goes first equally often. Rows are
written as they come, so that a run that is cut off loses one round at most. `--first` goes on with the numbers of an
earlier call, and so adds rounds to it.

All contestants have room for the same number of tokens. By default that is what so many servers leave each other on
this device (`contestants.capacity`): on an H200 for three about 190,000 tokens, and for two 380,000; `workloads.TOKENS`
says what each workload needs. So chat, documents, tree and random run with three side by side, and agent with two.
Where the contestants do not fit together, or with `--in-turn`, each is started anew for each round, warms up and has
the GPU to itself; then, too, who goes first rotates. With `--devices` each has a GPU of one host to itself, and with
`--at-once` all do their rounds at the same time: for what takes long, and comes by the clock.

    python -m benchmarks.prefix --trace FILE --requests 300 --speed 100 --workloads conversation --devices 0,1,2 \\
        --at-once --rounds 1 --no-write                   which speed does each sustain?
    python -m benchmarks.prefix --trace FILE --speed SUSTAINED --workloads conversation,conversation_fast \\
        --devices 0,1,2 --at-once --rounds 3

A ratio is only ever taken between contestants of one round.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from benchmarks.serving import end_with_servers
from benchmarks.workloads import CONVERSATION_REQUESTS, FULL, TOKENS, WARM, Replay, Targets, workloads

console = Console(width=190)
CONTEXT = 65_536
#: Within which a request of a trace is to be answered, to count as good. The choice is ours.
TTFT_TARGET_MS, TPOT_TARGET_MS = 2000.0, 100.0


class Suite:
    """One run: measures rounds, and keeps and shows them."""

    def __init__(
        self, names: list[str], made: Mapping[str, Workload | Staged], plan: Plan, head: Row, file: Path | None
    ) -> None:
        self.names, self.made, self.plan, self.head, self.file = names, made, plan, head, file
        self.rows: list[Row] = []
        self.label = ""
        self.targets = Targets(TTFT_TARGET_MS, TPOT_TARGET_MS)
        self._run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"

    def side_by_side(self, kinds: list[str], numbers: range) -> None:
        """All servers are up; rounds of the contestants alternate."""
        with self._up(self.names) as clients:
            for kind in kinds:
                for name in self.names:
                    self.warm_up(kind, name, clients[name])
                for number in numbers:
                    for place, name in enumerate(rotated(self.names, number)):
                        self._measure(kind, number, place, name, clients)

    def in_turn(self, kinds: list[str], numbers: range) -> None:
        """One server is up; each contestant is started once a round."""
        for number in numbers:
            for place, name in enumerate(rotated(self.names, number)):
                with self._up([name]) as clients:
                    for kind in kinds:
                        self.warm_up(kind, name, clients[name])
                        self._measure(kind, number, place, name, clients)

    def at_once(self, kinds: list[str], numbers: range) -> None:
        """All servers are up, and all contestants do the same round at the same time."""
        with self._up(self.names) as clients, ThreadPoolExecutor(len(clients)) as pool:
            for kind in kinds:
                list(pool.map(lambda item, kind=kind: self.warm_up(kind, *item), clients.items()))
                for number in numbers:
                    of = {name: pool.submit(self.once, kind, number, name, clients[name]) for name in self.names}
                    for name, measured in of.items():
                        self._keep(kind, number, 0, name, clients, measured.result())

    def warm_up(self, kind: str, name: str, client: Client) -> None:
        """A round that does not count; of a trace only its start, and of what takes minutes only the first turns."""
        workload = WARM.get(kind, self.made[kind])
        client.run(workload.short() if isinstance(workload, Replay) else workload, seed=0)

    def once(self, kind: str, number: int, name: str, client: Client) -> Row:
        """One round of a workload: what of its row was measured."""
        workload = self.made[kind]
        measured = client.run(workload, seed=number)
        if isinstance(workload, Replay):
            measured |= workload.told(client.answers, measured["seconds"], self.targets)
        return measured

    def _measure(self, kind: str, number: int, place: int, name: str, clients: dict[str, Client]) -> None:
        """One round of one contestant, and what the workers of our servers did beside it."""
        beside = [client for other, client in clients.items() if other != name and other.startswith("vtensor")]
        before = sum(client.stats()["worker_seconds"] for client in beside)
        measured = self.once(kind, number, name, clients[name])
        after = sum(client.stats()["worker_seconds"] for client in beside)
        measured["worker_seconds_beside"] = round(after - before, 4)
        self._keep(kind, number, place, name, clients, measured)

    def _keep(self, kind: str, number: int, place: int, name: str, clients: dict[str, Client], measured: Row) -> None:
        """A row, which is written at once."""
        row: Row = {
            "workload": self.label + kind,
            "contestant": name,
            "among": ",".join(sorted(self.names)),
            "run": self._run,
        }
        row |= {"round": number, "place": place, "servers_up": len(clients), "kv_tokens": clients[name].kv_tokens()}
        self.rows.append(self.head | row | measured)
        results.keep(self.file, self.rows)
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
            f"{one['cached_share']:.1%}" if "cached_share" in one else "not told",
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
    requests: Annotated[int, typer.Option(min=1, help="Of conversation.")] = CONVERSATION_REQUESTS,
    ttft_target: Annotated[float, typer.Option(help="Of a request of a trace, ms.")] = TTFT_TARGET_MS,
    tpot_target: Annotated[float, typer.Option(help="The same, ms a token.")] = TPOT_TARGET_MS,
    devices: Annotated[str, typer.Option(help="With commas, a GPU for each contestant, ours first.")] = "",
    at_once: Annotated[bool, typer.Option("--at-once", help="With --devices: rounds at the same time.")] = False,
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
    end_with_servers()
    if geometry_name not in GEOMETRIES:
        raise typer.BadParameter(f"--model {geometry_name!r} is unknown: there are {', '.join(GEOMETRIES)}")
    known, geometry = HOST if quick else GPU, GEOMETRIES[geometry_name]
    file = "prefix"
    names = ["vtensor", *(compare_with.split(",") if compare_with else [] if quick else ["fa3", "fa3-page128"])]
    made = workloads(quick, trace, speed, requests)
    chosen = kinds.split(",") if kinds else [kind for kind in made if quick or kind not in FULL]
    for name in (set(names) - set(known)) | (set(chosen) - set(made)):
        have = "it needs --trace FILE" if name in TOKENS else f"there are {', '.join([*known, *made])}"
        raise typer.BadParameter(f"{name!r} is unknown: {have}")
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"each contestant takes part once, and vtensor always does: not {', '.join(names)}")
    on = devices_of(devices, names, alone=in_turn or quick)
    if at_once and not (on or quick):
        raise typer.BadParameter("servers that work at once need a GPU each: --devices")
    if full := FULL.keys() & set(chosen):
        if len(chosen) > 1 and not quick:
            raise typer.BadParameter(f"{', '.join(sorted(full))} fill a cache of their own size: run each alone")
        tokens = tokens or (0 if quick else FULL[chosen[0]] // 2 // ROUND_TOKENS * ROUND_TOKENS)
    needed = 0 if quick or full else max(TOKENS[kind] for kind in chosen)
    if quick:
        room = tokens or HOST_TOKENS
    else:
        room, in_turn = room_for(1 if on else len(names), tokens, needed, in_turn, geometry)
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder), geometry)
        plan = Plan(model, vocabulary, CONTEXT, room, quick, vllm_boot, kv_cache_dtype, geometry, devices=on)
        suite = Suite(names, made, plan, results.head(), rows_file)
        suite.targets = Targets(ttft_target, tpot_target)
        if geometry.label:
            suite.label, file = geometry.label, "models"
        if kv_cache_dtype.startswith("fp8"):
            suite.label, file = f"fp8_{geometry.label}", "fp8"
        side_by_side: Callable[[list[str], range], None] = suite.at_once if at_once else suite.side_by_side
        (suite.in_turn if in_turn else side_by_side)(chosen, range(first, first + rounds))
    console.print(table(suite.rows))
    console.print(summarize(whole(suite.rows)))
    if write:
        path, dropped = results.add_rounds("prefix_quick" if quick else file, [suite.rows])
        console.print(results.written(path, dropped))


def devices_of(text: str, names: list[str], *, alone: bool) -> tuple[str, ...]:
    """A GPU for each of these contestants; none if nothing is said. Raises `typer.BadParameter` if they are not as
    many, or if the servers are not up together on GPUs (`alone`)."""
    on = tuple(text.split(",")) if text else ()
    if on and (len(on) != len(names) or alone):
        raise typer.BadParameter(f"--devices names a GPU for each of {', '.join(names)}, which then run side by side")
    return on


def room_for(
    servers: int, tokens: int, needed: int, in_turn: bool = False, geometry: Geometry = LLAMA
) -> tuple[int, bool]:
    """KV tokens of each of so many servers on one device: `tokens` unless that is 0. And whether they run in turn,
    which they also do if they have no room for what is `needed` beside each other. Says so where the room is less."""
    room = tokens or capacity(device_bytes(), servers, geometry)
    if not tokens and room < needed and servers > 1:
        console.print(f"{servers} servers would have room for {room:,} tokens each; {needed:,} are needed: in turn")
        in_turn = True
    if in_turn and not tokens:
        room = capacity(device_bytes(), 1, geometry)
    if room < needed:
        console.print(f"room for {room:,} tokens is less than the {needed:,} that the requests come back to")
    return room, in_turn


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
