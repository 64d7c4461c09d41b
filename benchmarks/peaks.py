"""What `benchmarks.servers` asks several servers, and what it takes for a failure."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from benchmarks.contestants import Client, Workload, row
from benchmarks.serving import session

#: Seconds without a chunk, or for a whole answer, beyond which a request has failed.
WAIT_SECONDS, WHOLE_SECONDS = 60.0, 300.0
#: Between two looks at what servers hold.
SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class Sizes:
    """Tokens of a request at a peak; with three servers, a peak's requests a second and seconds, the seconds between
    the starts of two peaks, and the quiet requests a second of each server."""

    prompt: int = 3072
    answer: int = 1024
    rate: float = 2.5
    seconds: float = 30.0
    every: float = 45.0
    quiet: float = 0.3

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer

    def with_shorter_answers(self) -> Sizes:
        """Requests of as many tokens, of which half as many are answers."""
        answer = self.answer // 2
        return replace(self, prompt=self.tokens - answer, answer=answer)


@dataclass
class Patient(Client):
    """Goes on after a request that failed, and keeps why. Knows how many requests are not answered yet."""

    failures: list[str] = field(default_factory=list)
    #: Seconds until it gave a request up, or until it would have where the server refused it at once.
    given_up: list[float] = field(default_factory=list)
    unanswered: int = 0

    async def ask(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> list[int]:
        self.unanswered += 1
        start = time.perf_counter()
        try:
            return await asyncio.wait_for(super().ask(http, tokens, new), WHOLE_SECONDS)
        except (aiohttp.ClientError, TimeoutError, RuntimeError, ValueError, LookupError) as error:
            self.failures.append(repr(error)[:200])
            self.given_up.append(max(WAIT_SECONDS, time.perf_counter() - start))
            return []
        finally:
            self.unanswered -= 1

    def measure(self, workload: Workload, seed: int) -> dict[str, Any]:
        self.failures, self.given_up = [], []
        return self.told(self.drive(workload, seed))

    def told(self, seconds: float) -> dict[str, Any]:
        """A row of what came of the requests."""
        measured = row(self.answers, seconds, self.given_up)
        late = [answer.waited for answer in self.answers if answer.waited > WAIT_SECONDS]
        failures = [*self.failures, *(f"waited {waited:.0f} s" for waited in late)]
        return measured | {"failed": len(failures), "failures": failures[:5]}


def peak(requests: int, sizes: Sizes) -> Workload:
    """So many requests at once, which have nothing in common."""

    async def run(client: Client, rng: random.Random) -> None:
        prompts = [client.words(rng, sizes.prompt) for _ in range(requests)]
        async with session() as http:
            await asyncio.gather(*(client.ask(http, prompt, sizes.answer) for prompt in prompts))

    return run


def steady(requests: int, sizes: Sizes, done: threading.Event) -> Workload:
    """So many requests, and again as soon as all have been answered, until `done` is set."""

    async def run(client: Client, rng: random.Random) -> None:
        while not done.is_set():
            await peak(requests, sizes)(client, rng)

    return run


def intermittent(number: int, of: int, sizes: Sizes) -> Workload:
    """What server `number` of so many is asked: quiet requests all the time, and at its turn a peak. All by the clock,
    whether or not earlier ones have been answered."""

    async def run(client: Client, rng: random.Random) -> None:
        begin, end = number * sizes.every, (of - 1) * sizes.every + sizes.seconds
        times, now = [], 0.0
        while now < end:
            times.append(now)
            now += rng.expovariate(sizes.rate if begin <= now < begin + sizes.seconds else sizes.quiet)
            if times[-1] < begin < now:
                now = begin  # so that a peak does not begin late by a long pause before it
        prompts = [client.words(rng, sizes.prompt) for _ in times]

        async def one(http: aiohttp.ClientSession, at: float, prompt: list[int]) -> None:
            await asyncio.sleep(at)
            await client.ask(http, prompt, sizes.answer)

        async with session() as http:
            await asyncio.gather(*map(one, [http] * len(times), times, prompts))

    return run


def drive_at_once(clients: list[Patient], workloads: list[Workload], seed: int) -> float:
    """Do a workload of each client, all of them at the same time. Returns seconds; each client has its `answers` and
    `failures`."""
    for client in clients:
        client.answers, client.failures, client.given_up = [], [], []

    async def together() -> None:
        rngs = [random.Random(seed + number) for number in range(len(clients))]
        asked = [workload(client, rng) for workload, client, rng in zip(workloads, clients, rngs, strict=True)]
        await asyncio.gather(*asked)

    start = time.perf_counter()
    asyncio.run(together())
    return time.perf_counter() - start


def held_now(clients: list[Patient]) -> list[int]:
    """The bytes that the KV cache of each server holds."""
    return [client.stats()["backed_bytes"] for client in clients]


def held_while_all_ask(clients: list[Patient], done: threading.Event) -> dict[str, Any]:
    """The median of the bytes that each server holds while all of them have requests, which wait or run. Raises
    `RuntimeError` if they never have at once until `done` is set."""
    held = []
    while not done.wait(SAMPLE_SECONDS):
        if all(client.unanswered for client in clients):
            held.append(held_now(clients))
    if not held:
        raise RuntimeError("the servers' peaks were not at the same time")
    return {"held_bytes": [statistics.median(of_one) for of_one in zip(*held, strict=True)]}


def held_between(clients: list[Patient], done: threading.Event) -> dict[str, Any]:
    """The least and the most bytes that each server held until `done` is set, and the most that all held at once."""
    held = [held_now(clients)]
    while not done.wait(SAMPLE_SECONDS):
        held.append(held_now(clients))
    each = list(zip(*held, strict=True))
    return {
        "held_least_bytes": [min(of_one) for of_one in each],
        "held_most_bytes": [max(of_one) for of_one in each],
        "held_together_bytes": max(map(sum, held)),
    }


@contextlib.contextmanager
def looking(look: Callable[[threading.Event], dict[str, Any]]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run `look` in a thread beside what happens within. Behind that, what is yielded says what it saw."""
    done = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        saw = beside.submit(look, done)
        try:
            yield saw.result
        finally:
            done.set()
