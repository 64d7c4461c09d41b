"""The workloads of the prefix suite: who asks what, and when.

Every workload is a closed loop of conversations, except `trace` and `conversation`, which arrive by the clock of a
production trace. Requests are token ids with forced lengths.

`TOKENS` is what each workload needs to hold at once: the prefixes that it comes back to and the requests that run. A
server with less room would evict a prefix that is still wanted, which is another measurement.

    chat        165,888   2,048 for all, and 64 conversations of 4 turns of 512 + 128
    agent       361,984   8 contexts of 32,768, and 6 turns of 2,048 + 32
    documents   163,840   8 documents of 16,384, and 256 requests of 64 + 64
    tree         41,472   1 + 8 + 64 levels of 512, and 64 answers of 64
    random       98,368   64 requests of 1,025 + 512 at a time; what is over is never asked for again
    trace             0   it has no set that it comes back to; requests of 600,000 tokens in all
    conversation 540,000   45 requests that run at a time, of 12,000 in the mean

`FULL` are chat and agent with lengths that are no multiple of 128 tokens, in a cache with room for half of what they
touch: it is always full, and what was evicted is what the next ones need.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.contestants import Answer, Client, Workload
from benchmarks.serving import session

TOKENS = {
    "chat": 2048 + 64 * 4 * (512 + 128),
    "agent": 8 * (32_768 + 6 * (2048 + 32)),
    "documents": 8 * 16_384 + 256 * (64 + 64),
    "tree": 512 * (1 + 8 + 64) + 64 * 64,
    "random": 64 * (1024 + 1 + 512),
    "trace": 0,
    "conversation": 45 * 12_000,
    "conversation_fast": 45 * 12_000,
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
#: How much of a trace `trace` replays: requests of up to 16,000 tokens, 600,000 in all.
TRACE_REQUESTS = 100
#: And `conversation`: 11.3 million tokens of prompts in all, which came in 342 s.
CONVERSATION_REQUESTS, CONVERSATION_LONGEST = 1000, 64_000
#: Of the sustained speed, for `conversation_fast`.
FASTER = 1.5
#: Requests that warm a server up for a trace.
WARM_REQUESTS = 32


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


@dataclass(frozen=True)
class Targets:
    """What a request is to be answered within, to count as good: ms to its first token, and ms a token behind that."""

    ttft_ms: float
    tpot_ms: float

    def met(self, answer: Answer) -> bool:
        between = 1000 * (answer.last - answer.first) / max(1, answer.new - 1)
        return 1000 * (answer.first - answer.sent) <= self.ttft_ms and between <= self.tpot_ms


@dataclass(frozen=True)
class Replay:
    """Requests by their arrival time, `speed` times as fast as recorded. Equal block ids are equal tokens, others
    differ."""

    arrivals: list[Arrival]
    speed: float

    async def __call__(self, client: Client, rng: random.Random) -> None:
        salt = rng.randrange(1 << 30)
        which = {block for arrival in self.arrivals for block in arrival.blocks}
        blocks = {block: self._words(client, salt + block) for block in which}

        async def one(http: aiohttp.ClientSession, arrival: Arrival) -> None:
            await asyncio.sleep(arrival.at)
            tokens = [token for block in arrival.blocks for token in blocks[block]][: arrival.prompt]
            await client.ask(http, tokens, arrival.new)

        async with session() as http:
            await gather([one(http, arrival) for arrival in self.arrivals])

    @staticmethod
    def _words(client: Client, seed: int) -> list[int]:
        """Of one block. There are thousands, and the clock runs."""
        words: list[int] = np.random.default_rng(seed).integers(6, client.vocabulary, BLOCK).tolist()
        return words

    def short(self) -> Replay:
        """Its first requests, all at once."""
        return Replay([replace(arrival, at=0.0) for arrival in self.arrivals[:WARM_REQUESTS]], self.speed)

    def told(self, answers: list[Answer], seconds: float, targets: Targets) -> dict[str, float]:
        """What stands in a row beside what stands in every row: how much of what came was good, and the speed that a
        server has which takes so many `seconds` for all. Where it is slower than `speed`, it does not sustain that."""
        good = sum(map(targets.met, answers))
        return {
            "speed": self.speed,
            "sustained_speed": round(self.arrivals[-1].at * self.speed / seconds, 4),
            "ttft_target_ms": targets.ttft_ms,
            "tpot_target_ms": targets.tpot_ms,
            "goodput_requests_per_second": round(good / seconds, 4),
            "goodput_share": round(good / len(answers), 4),
        }


#: What warms a server up where a round takes minutes: the first turns, which fill its cache already.
WARM: dict[str, Workload] = {"agent_full": conversations(8, 1, 0, 32_700, 2040, 30)}


def replay(trace: Path, count: int, longest: int, speed: float, *, most_new: int = 1 << 20) -> Replay:
    """Of a Mooncake trace, as `read_trace` reads it."""
    return Replay(read_trace(trace, count, longest, speed, most_new=most_new), speed)


def workloads(
    quick: bool, trace: Path | None, speed: float, requests: int = CONVERSATION_REQUESTS
) -> dict[str, Workload]:
    """By name. Those that replay a trace are there where its file is given: the two of `conversation` with so many
    requests."""
    if quick:
        made = {
            "chat": conversations(4, 3, 100, 0, 24, 8),
            "agent": conversations(2, 3, 0, 300, 40, 4),
            "documents": documents(2, 250, 4, 10, 4, 4),
            "tree": tree(2, 3, 50, 4),
            "random": independent(6, 60, 8, 4),
            "chat_full": conversations(4, 3, 90, 0, 21, 7),
        }
        if trace:
            made["trace"] = replay(trace, 12, 1500, speed, most_new=8)
            made["conversation"] = replay(trace, 12, 3000, speed, most_new=8)
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
        if trace:
            made["trace"] = replay(trace, TRACE_REQUESTS, 16_000, speed)
            made["conversation"] = replay(trace, requests, CONVERSATION_LONGEST, speed)
            made["conversation_fast"] = replay(trace, requests, CONVERSATION_LONGEST, FASTER * speed)
    return made
