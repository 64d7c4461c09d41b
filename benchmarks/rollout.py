"""Rollouts of reinforcement learning: many samples of few prompts, and memory that is lent to a trainer.

    python -m benchmarks.rollout --cases rollout_8k --compare fa3 --rows fa3.json    two servers side by side
    python -m benchmarks.rollout --cases rollout_8k --compare fa3-page128 --rows page128.json
    python -m benchmarks.rollout --cases rollout_8k --compare vllm --vllm-boot boot-vllm --rows vllm.json
    python -m benchmarks.merge --name rollout fa3.json page128.json vllm.json    of one commit, device and versions
    python -m benchmarks.rollout --release --write                      what a release frees, and how long it takes
    python -m benchmarks.rollout --quick                                the host backend and a small model: does it run?

A case is groups of samples. Each prompt is asked for one token first, on all sides alike; that takes `prompt_seconds`.
Then the clock starts, and all samples are asked for at once, at temperature 1. Of the `_uneven` cases answers differ in
length: they are drawn once, and the longest is four times the median. Rounds are those of `benchmarks.prefix`.

`--release` starts ours and SGLang's FlashAttention-3, each with torch_memory_saver, one after the other. In each of 20
turns something is computed, the KV cache released, and resumed. `freed_share` is what the device had more free then, of
what the cache held: in the first turn that is nearly all of its capacity. Its rows are merged as those of cases are.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import requests
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import GPU, HOST, HOST_TOKENS, Client, Plan, Staged, capacity, servers
from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.memory import device_bytes as device_reader
from benchmarks.prefix import CONTEXT, Suite, device_bytes, large_model, small_model, table
from benchmarks.rounds import Row, of_releases, summarize, whole
from benchmarks.serving import end_with_servers, session
from benchmarks.workloads import gather

console = Console(width=190)
TURNS = 20
#: The largest page of a contestant.
PAGE = 128
#: Of what a case takes, how much room there is to be.
MORE = 1.03
#: Of the capacity, what the first turn fills.
FILLED = 0.9


@dataclass(frozen=True)
class Case:
    """`groups` prompts of `prompt` tokens, with `samples` answers each: of `new` tokens, or, if `uneven`, of lengths
    whose median is half of that, and whose longest is twice of it."""

    prompt: int
    new: int
    groups: int
    samples: int
    uneven: bool = False

    def lengths(self) -> list[int]:
        """Of the answers, group by group; the same in every round."""
        count = self.groups * self.samples
        if not self.uneven:
            return [self.new] * count
        # Evenly spread on a scale of factors, from a quarter of the median to four times of it.
        median = self.new // 2
        spread = [max(2, round(median * 4 ** (2 * n / (count - 1) - 1))) for n in range(count)]
        return random.Random(0).sample(spread, count)

    @property
    def tokens(self) -> int:
        """What it needs room for, in pages of `PAGE`: prompts, and what each answer has behind the prompt's last full
        page. Servers get a little more: where a cache is full to its last page, a request waits until others end."""
        own = [-(-(self.prompt + new) // PAGE) - self.prompt // PAGE for new in self.lengths()]
        return int(MORE * PAGE * (self.groups * -(-self.prompt // PAGE) + sum(own)))

    def prompts(self, client: Client, rng: random.Random) -> list[list[int]]:
        return [client.words(rng, self.prompt) for _ in range(self.groups)]

    def staged(self) -> Staged:
        async def compute(client: Client, rng: random.Random) -> None:
            async with session() as http:
                await gather([_ask(client, http, prompt, 1) for prompt in self.prompts(client, rng)])

        async def answer(client: Client, rng: random.Random) -> None:
            asked = [prompt for prompt in self.prompts(client, rng) for _ in range(self.samples)]
            async with session() as http:
                pairs = zip(asked, self.lengths(), strict=True)
                await gather([_ask(client, http, prompt, new) for prompt, new in pairs])

        return Staged(compute, answer)


async def _ask(client: Client, http: aiohttp.ClientSession, prompt: list[int], new: int) -> None:
    await client.ask(http, prompt, new)


def with_uneven(cases: dict[str, Case]) -> dict[str, Case]:
    return cases | {f"{name}_uneven": replace(case, uneven=True) for name, case in cases.items()}


CASES = with_uneven(
    {
        "rollout_8k": Case(8192, 1000, 8, 16),
        "rollout_2k": Case(2000, 1000, 16, 8),
        "rollout_256": Case(256, 4000, 16, 8),
        "rollout_32k": Case(32_000, 1000, 2, 16),
    }
)
QUICK = with_uneven({"rollout_8k": Case(200, 24, 2, 4), "rollout_256": Case(20, 40, 2, 2)})


# Memory that is lent.


def used_bytes(client: Client, host: bool) -> int:
    """What the device's processes hold; on the host, what our KV cache does."""
    return int(client.stats()["backed_bytes"] if host else device_reader()[0]())


def post(client: Client, what: str, **body: Any) -> float:
    """Returns seconds. Raises `requests.HTTPError` if the server refuses."""
    start = time.perf_counter()
    answer = requests.post(f"{client.url}/{what}", json=body, timeout=300)
    answer.raise_for_status()
    return time.perf_counter() - start


def turns(name: str, client: Client, plan: Plan, length: int, count: int = TURNS) -> list[Row]:
    """Compute, release, resume; the first turn fills the cache with prompts of `length`, and the others have one."""
    rows = []
    for turn in range(count):
        prompts = int(FILLED * plan.tokens / length) if turn == 0 else 1

        async def fill(client: Client, rng: random.Random, prompts: int = prompts) -> None:
            async with session() as http:
                await gather([_ask(client, http, client.words(rng, length), 2) for _ in range(prompts)])

        client.drive(fill, seed=turn)
        # SGLang holds all of its capacity, whatever it caches.
        held = int(client.stats().get("backed_bytes", plan.tokens * plan.geometry.token_bytes))
        before = used_bytes(client, plan.host)
        post(client, "pause_generation", mode="abort")
        released = post(client, "release_memory_occupation", tags=["kv_cache"])
        after = used_bytes(client, plan.host)
        resumed = post(client, "resume_memory_occupation", tags=["kv_cache"])
        post(client, "continue_generation")
        row = {"contestant": name, "turn": turn, "held_bytes": held, "freed_bytes": before - after}
        rows.append(row | {"used_bytes": after, "release_seconds": released, "resume_seconds": resumed})
    return rows


# Everything.


def room_for(needed: int, names: list[str], geometry: Geometry) -> tuple[int, bool]:
    """KV tokens for each server, and whether they have to take turns. Raises `typer.BadParameter` if one alone has not
    so much room."""
    device = device_bytes()
    together, alone = (capacity(device, count, geometry) for count in (len(names), 1))
    if together >= needed:
        return together, False
    if alone < needed:
        raise typer.BadParameter(f"these cases need room for {needed:,} tokens, and this device has it for {alone:,}")
    return alone, True


def main(
    chosen: Annotated[str, typer.Option("--cases", help="With commas; all of them by default.")] = "",
    compare_with: Annotated[str, typer.Option("--compare", help="Contestants beside ours, with commas.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    first: Annotated[int, typer.Option(min=1, help="The number of the first round.")] = 1,
    in_turn: Annotated[bool, typer.Option("--in-turn", help="One server at a time, even where all fit.")] = False,
    release: Annotated[bool, typer.Option("--release", help="Measure releases, and no case.")] = False,
    tokens: Annotated[int, typer.Option(help="KV tokens of each server that releases.")] = 262_144,
    vllm_boot: Annotated[
        Path | None,
        typer.Option(exists=True, envvar="VTENSOR_VLLM_BOOT", help="A shell file, sourced before vLLM is started."),
    ] = None,
    geometry_name: Annotated[str, typer.Option("--model", help="A geometry.")] = next(iter(GEOMETRIES)),
    quick: Annotated[bool, typer.Option(help="A small model on the host backend, cases and releases.")] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = False,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON.")] = None,
) -> None:
    """Measure and print; merge into the results if asked to."""
    end_with_servers()
    if geometry_name not in GEOMETRIES:
        raise typer.BadParameter(f"--model {geometry_name!r} is unknown: there are {', '.join(GEOMETRIES)}")
    geometry, known, cases = GEOMETRIES[geometry_name], HOST if quick else GPU, QUICK if quick else CASES
    names = ["vtensor", *(compare_with.split(",") if compare_with else [] if quick else ["fa3", "fa3-page128"])]
    kinds = chosen.split(",") if chosen else list(cases)
    for name in (set(names) - set(known)) | (set(kinds) - set(cases)):
        raise typer.BadParameter(f"{name!r} is unknown: there are {', '.join([*known, *cases])}")
    head = results.head()
    rows: list[Row] = []
    released: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder), geometry)
        plan = Plan(model, vocabulary, CONTEXT, HOST_TOKENS, quick, vllm_boot, "auto", geometry, temperature=1.0)
        if not release:
            if not quick:
                room, must = room_for(max(cases[kind].tokens for kind in kinds), names, geometry)
                plan, in_turn = replace(plan, tokens=room), in_turn or must
            made = {kind: cases[kind].staged() for kind in kinds}
            suite = Suite(names, made, plan, head, rows_file)
            suite.label = geometry.label
            (suite.in_turn if in_turn else suite.side_by_side)(kinds, range(first, first + rounds))
            rows = suite.rows
            console.print(table(rows))
            console.print(summarize(whole(rows)))
        if release or quick:
            if not quick:
                plan = replace(plan, tokens=tokens)
            for name in ["vtensor"] if quick else ["vtensor-saver", "fa3-saver"]:
                with servers([name], plan) as (clients, _):
                    length = 512 if quick else 8192
                    count = 3 if quick else TURNS
                    released += [head | row for row in turns(name, clients[name], plan, length, count)]
                results.keep(rows_file, rows + released)
            console.print(of_releases(released))
    if write:
        path, dropped = results.add_rounds("rollout_quick" if quick else "rollout", [rows + released])
        console.print(results.written(path, dropped))


if __name__ == "__main__":
    typer.run(main)
