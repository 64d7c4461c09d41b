"""The workloads of the prefix suite: who asks what, and when.

Every workload is a closed loop of conversations, except `trace`, which arrives by the clock of a production trace.
Requests are token ids with forced lengths.

`TOKENS` is what each workload needs to hold at once: the prefixes that it comes back to and the requests that run. A
server with less room would evict a prefix that is still wanted, which is another measurement.

    chat        165,888   2,048 for all, and 64 conversations of 4 turns of 512 + 128
    agent       361,984   8 contexts of 32,768, and 6 turns of 2,048 + 32
    documents   163,840   8 documents of 16,384, and 256 requests of 64 + 64
    tree         41,472   1 + 8 + 64 levels of 512, and 64 answers of 64
    random       98,368   64 requests of 1,025 + 512 at a time; what is over is never asked for again
    trace             0   it has no set that it comes back to; requests of 600,000 tokens in all

`FULL` are chat and agent with lengths that are no multiple of 128 tokens, in a cache with room for half of what they
touch: it is always full, and what was evicted is what the next ones need.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.contestants import Client, Workload
from benchmarks.serving import session

TOKENS = {
    "chat": 2048 + 64 * 4 * (512 + 128),
    "agent": 8 * (32_768 + 6 * (2048 + 32)),
    "documents": 8 * 16_384 + 256 * (64 + 64),
    "tree": 512 * (1 + 8 + 64) + 64 * 64,
    "random": 64 * (1024 + 1 + 512),
    "trace": 0,
}
#: Tokens that they touch. Their servers have room for half of it.
FULL = {
    "chat_full": 2000 + 64 * 4 * (500 + 125),
    "agent_full": 8 * (32_700 + 6 * (2040 + 30)),
}


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
            "chat_full": conversations(4, 3, 90, 0, 21, 7),
        }
        arrivals = read_trace(trace, 12, 1500, speed, most_new=8) if trace else []
    else:
        made = {
            "chat": conversations(64, 4, 2048, 0, 512, 128),
            "agent": conversations(8, 6, 0, 32_768, 2048, 32),
            "documents": documents(8, 16_384, 32, 64, 64, 256),
            "tree": tree(8, 8, 512, 64),
            "random": independent(192, 1024, 512, 64),
            "chat_full": conversations(64, 4, 2000, 0, 500, 125),
            "agent_full": conversations(8, 6, 0, 32_700, 2040, 30),
        }
        arrivals = read_trace(trace, TRACE_REQUESTS, 16_000, speed) if trace else []
    if arrivals:
        made["trace"] = replay(arrivals)
    return made
