"""What an FP8 KV cache is worth in the same memory: live tokens, and times to the first token under load.

    python -m benchmarks.live_tokens             two of our servers side by side on a GPU, bf16 and FP8
    python -m benchmarks.live_tokens --quick     the host backend and a small model, float32 and FP8: does it run?

- Live tokens: more requests than have room are sent to one server at once; each says its prompt once and answers for
  long. Live tokens are what requests and the tree hold, asked for ten times a second; the most before SGLang's log says
  that it retracts counts.
- Load: requests that need 1.5 times the room of the first cache are sent at once, to one server after the other. The
  servers take turns at going first, and each round has prompts of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import requests
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import KEEP, START_SECONDS, Client
from benchmarks.prefix import large_model, small_model
from benchmarks.rounds import rotated
from benchmarks.serving import command, end_with_servers, session, started
from benchmarks.workloads import independent
from sglang_vtensor.demo import free_port

console = Console(width=150)
#: The caches that are compared, and how many tokens each has in the same memory.
CACHES = {"bf16": ("bfloat16", 163_840), "fp8": ("fp8_e4m3", 327_680)}
PROMPT, ANSWER = 1024, 3072
#: Tokens of a prompt and of an answer of the load.
LOAD = (2048, 512)
#: On the host, where the same memory has room for four times as many tokens in FP8 as in float32.
QUICK_CACHES = {"float32": ("auto", 1024), "fp8": ("fp8_e4m3", 4096)}
QUICK_PROMPT, QUICK_ANSWER, QUICK_LOAD = 16, 60, (40, 8)
#: The load takes so many times what the first cache has room for.
OVER = 1.5
#: SGLang counts on answers that end early, and admits more than there is room for.
EAGER = ["--schedule-conservativeness", "0.2"]
#: And so much of an answer as it counts when a request begins.
EAGER_ENVIRONMENT = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "256"}
RETRACTS = "#retracted_reqs"
TOLD_EVERY_SECONDS = 10.0


async def one(http: aiohttp.ClientSession, url: str, prompt: list[int], new: int) -> None:
    """An answer as a whole: SGLang sends all tokens so far with each part of a stream, which thousands of tokens for
    hundreds of requests are too many for."""
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}}
    with contextlib.suppress(aiohttp.ClientError):  # those that are cut off when it is known
        async with http.post(f"{url}/generate", json=body) as answer:
            await answer.read()


def fill(client: Client, log: Path, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Send these requests; what there was before the first was retracted. Raises `RuntimeError` if none was."""
    done = threading.Event()

    async def everybody() -> None:
        async with session() as http:
            tasks = [asyncio.create_task(one(http, client.url, prompt, new)) for prompt in prompts]
            while not done.is_set() and not all(task.done() for task in tasks):
                await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(everybody()))
    thread.start()
    most, retracted, told = 0.0, False, time.monotonic()
    try:
        while thread.is_alive() and not retracted:
            stats = client.stats()
            retracted = RETRACTS in log.read_text(errors="replace")
            if not retracted:
                most = max(most, stats["live_tokens"] + stats["tree_tokens"])
            if time.monotonic() - told > TOLD_EVERY_SECONDS:
                told = time.monotonic()
                console.print(f"{stats['requests']} requests run, {most:,.0f} tokens live at most")
            time.sleep(0.1)
    finally:
        done.set()
        thread.join()
    if not retracted:
        raise RuntimeError(f"{len(prompts)} requests were not enough to fill the cache: send more")
    return {"live_tokens": most, "page_bytes": stats["page_bytes"], "capacity_pages": stats["pages_capacity"]}


def stop_all(client: Client) -> None:
    """Until nothing runs or waits."""
    requests.post(f"{client.url}/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()
    while client.stats()["requests"]:
        time.sleep(0.1)


def main(
    count: Annotated[int, typer.Option(help="Requests that are sent at once, until one is retracted.")] = 600,
    rounds: Annotated[int, typer.Option(min=1, help="Of the load.")] = 3,
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
) -> None:
    """Measure, print and write live_tokens.json."""
    end_with_servers()
    rows: list[dict[str, Any]] = []
    caches = QUICK_CACHES if quick else CACHES
    length, new = (QUICK_PROMPT, QUICK_ANSWER) if quick else (PROMPT, ANSWER)
    prompt, answer = QUICK_LOAD if quick else LOAD
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model, vocabulary = small_model(folder) if quick else large_model(folder)
        clients, waits = {}, []
        for cache, (dtype, tokens) in caches.items():
            arguments = ["--kv-backend", "vtensor", *KEEP, *EAGER, "--kv-cache-dtype", dtype]
            arguments += ["--max-total-tokens", str(tokens)]
            arguments += ["--page-size", "16", "--max-running-requests", "128"] if quick else []
            arguments += [] if quick else ["--mem-fraction-static", "0.98"]
            port, environment = free_port(), os.environ | EAGER_ENVIRONMENT
            what = command(model, port, arguments, environment, host=quick)
            url = f"http://127.0.0.1:{port}"
            waits.append(
                stack.enter_context(
                    started(cache, what, url, folder / f"{cache}.log", environment, patience=START_SECONDS)
                )
            )
            clients[cache] = Client(url, vocabulary)
        console.print(f"up in {max(wait() for wait in waits):.1f} s")
        rng = random.Random(0)
        prompts = [[rng.randrange(6, vocabulary) for _ in range(length)] for _ in range(count)]
        for cache, client in clients.items():
            rows.append({"part": "live", "cache": cache} | fill(client, folder / f"{cache}.log", prompts, new))
            stop_all(client)
            console.print(rows[-1])
        held = [row["page_bytes"] * row["capacity_pages"] for row in rows]
        if max(held) > 1.01 * min(held):
            raise RuntimeError(f"the caches are to have the same memory, and have {held} bytes")
        size = next(iter(caches.values()))[1]
        load = int(OVER * size) // (prompt + answer)
        for number in range(rounds):
            for place, cache in enumerate(rotated(list(caches), number)):
                measured = clients[cache].run(independent(load, prompt, answer, load), seed=1 + number)
                rows.append({"part": "load", "cache": cache, "round": number, "place": place} | measured)
                console.print(f"load {number} {cache}: p99 TTFT {measured['ttft_p99_ms']:,.0f} ms")

    def middle(cache: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["cache"] == cache and key in row)

    first, second = caches
    summary = {
        "fp8_live_tokens_vs_bf16": middle(second, "live_tokens") / middle(first, "live_tokens"),
        "fp8_overload_ttft_p99_vs_bf16": middle(first, "ttft_p99_ms") / middle(second, "ttft_p99_ms"),
        "fp8_overload_tokens_per_second_vs_bf16": (
            middle(second, "tokens_per_second") / middle(first, "tokens_per_second")
        ),
    }
    if not quick:
        results.write("live_tokens", summary, rows)
    console.print(summary)


if __name__ == "__main__":
    typer.run(main)
