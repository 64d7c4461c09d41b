"""How much of a Mooncake trace is found in the cache, by simulation: our tree and SGLang's, at several sizes of a page
and of the cache. No GPU, no model.

    python -m benchmarks.hit_rates --trace FILE             all 12,031 requests: a quarter of an hour
    python -m benchmarks.hit_rates --trace FILE --requests 1000 --no-write

The real trees and pools (`benchmarks.turns`, `benchmarks.unified`) are given the requests in the order of the trace,
one after another: a request is matched, gets its memory, for which the tree evicts, and is inserted with its answer. So
what is running beside it, and what waits, is left out. A block of the trace (512 tokens) is the same tokens wherever it
stands, and an answer is tokens that stand nowhere else: the trace does not say which of them come back in the next
prompt. So what a tree finds inside a page is found in the last block of a prompt only.

A cache has room for as many tokens as a server has beside Llama-3-8B on an H200 (`contestants.capacity`), alone and as
one of two and three; or for everything.
"""

from __future__ import annotations

import multiprocessing
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import capacity
from benchmarks.turns import Ours
from benchmarks.unified import Side, Stock, turn
from benchmarks.workloads import BLOCK, Arrival, read_trace

console = Console(width=120)
H200_BYTES = 143_771 << 20
#: By name: the tree, and the tokens of its pages.
TREES: dict[str, tuple[type[Ours] | type[Stock], int]] = {
    "vtensor": (Ours, 128),
    "sglang-page1": (Stock, 1),
    "sglang-page64": (Stock, 64),
    "sglang-page128": (Stock, 128),
}
#: Ids of answers, behind those of all blocks.
ANSWERS = 1 << 30


def rooms(arrivals: list[Arrival]) -> dict[str, int]:
    """Tokens that a cache has room for; for everything, with a page more for each request."""
    shares = {1: "an H200", 2: "half an H200", 3: "a third of an H200"}
    rooms = {name: capacity(H200_BYTES, servers) for servers, name in shares.items()}
    return rooms | {"everything": sum(arrival.prompt + arrival.new + 128 for arrival in arrivals)}


def texts(arrivals: list[Arrival]) -> Iterator[tuple[array[int], int]]:
    """Yields the tokens of each request with its answer, and how many are its prompt's."""
    answered = ANSWERS
    for arrival in arrivals:
        text = array("q")
        for block in arrival.blocks:
            text.extend(range(block * BLOCK, (block + 1) * BLOCK))
        if len(text) < arrival.prompt:
            raise ValueError(f"a request of {arrival.prompt} tokens has only {len(arrival.blocks)} blocks of {BLOCK}")
        del text[arrival.prompt :]
        text.extend(range(answered, answered + arrival.new))
        answered += arrival.new
        yield text, arrival.prompt


def simulate(name: str, room: int, arrivals: list[Arrival]) -> dict[str, Any]:
    """One tree, with room for so many tokens: a row."""
    torch.set_num_threads(1)
    tree, page = TREES[name]
    longest = max(arrival.prompt + arrival.new for arrival in arrivals) + 1
    side: Side = tree(room // page, 1, longest, page=page)
    asked = found = 0
    for number, (text, prompt) in enumerate(texts(arrivals)):
        asked, found = asked + prompt, found + turn(side, text, number, prompt=prompt).matched
    return {
        "tree": name,
        "page_tokens": page,
        "room_tokens": room,
        "requests": len(arrivals),
        "prompt_tokens": asked,
        "found_tokens": found,
        "hit_rate": round(found / asked, 5),
    }


def main(
    trace: Annotated[Path, typer.Option(exists=True, help="A Mooncake trace.")],
    requests: Annotated[int, typer.Option(min=1, help="So many of its first ones.")] = 1 << 20,
    trees: Annotated[str, typer.Option(help="With commas.")] = ",".join(TREES),
    jobs: Annotated[int, typer.Option(min=1, help="Simulations at once.")] = 1,
    write: Annotated[bool, typer.Option(help="Write hit_rates.json.")] = True,
) -> None:
    """Simulate, print and write hit_rates.json."""
    if unknown := set(trees.split(",")) - set(TREES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} unknown: there are {', '.join(TREES)}")
    arrivals = read_trace(trace, requests, 1 << 30, 1.0)
    cases = [(name, what, room) for what, room in rooms(arrivals).items() for name in trees.split(",")]
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        of = [pool.submit(partial(simulate, name, room, arrivals)) for name, _, room in cases]
        for (_, what, _), one in zip(cases, of, strict=True):
            rows.append({"room": what} | one.result())
            console.print(rows[-1])
    summary = {f"{row['tree']} in {row['room']}": row["hit_rate"] for row in rows}
    if write:
        console.print(f"written to {results.write('hit_rates', summary, rows)}")


if __name__ == "__main__":
    typer.run(main)
