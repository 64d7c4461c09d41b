"""`python -m benchmarks.live_tokens`: how many live tokens a server has when it retracts the first request, with a bf16
and with an FP8 KV cache, in the same memory. Ours, one server after the other, alone on the GPU.

    python -m benchmarks.live_tokens --quick     the host backend and a small model, float32 and FP8: does it run?

More requests than have room are sent at once; each says its prompt once and answers for long. Live tokens are what
requests and the tree hold, asked for ten times a second; the most before SGLang's log says that it retracts counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
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
from benchmarks.contestants import KEEP
from benchmarks.prefix import large_model, small_model
from benchmarks.serving import server, session

console = Console(width=150)
CACHES = {"bf16": "bfloat16", "fp8": "fp8_e4m3"}
PROMPT, ANSWER = 1024, 3072
#: On the host, where the same memory has room for four times as many tokens in FP8 as in float32.
QUICK_CACHES, QUICK_TOKENS = {"float32": "auto", "fp8": "fp8_e4m3"}, {"float32": 1024, "fp8": 4096}
QUICK_PROMPT, QUICK_ANSWER = 16, 60
#: Of the device: the weights and a cache that some seconds fill.
SHARE = 0.3
#: SGLang counts on answers that end early, and admits more than there is room for.
EAGER = ["--schedule-conservativeness", "0.2"]
RETRACTS = "#retracted_reqs"
TOLD_EVERY_SECONDS = 10.0


async def one(http: aiohttp.ClientSession, url: str, prompt: list[int], new: int) -> None:
    """An answer as a whole: SGLang sends all tokens so far with each part of a stream, which thousands of tokens for
    hundreds of requests are too many for."""
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}}
    with contextlib.suppress(aiohttp.ClientError):  # those that are cut off when it is known
        async with http.post(f"{url}/generate", json=body) as answer:
            await answer.read()


def fill(url: str, log: Path, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Send these requests; what there was before the first was retracted. Raises `RuntimeError` if none was."""
    done = threading.Event()

    async def everybody() -> None:
        async with session() as http:
            tasks = [asyncio.create_task(one(http, url, prompt, new)) for prompt in prompts]
            while not done.is_set() and not all(task.done() for task in tasks):
                await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(everybody()))
    thread.start()
    most, retracted, told = 0.0, False, time.monotonic()
    try:
        while thread.is_alive() and not retracted:
            stats = requests.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]["vtensor"]
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


def main(
    count: Annotated[int, typer.Option(help="Requests that are sent at once.")] = 600,
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
) -> None:
    """Measure, print and write live_tokens.json."""
    rows: list[dict[str, Any]] = []
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder))
        length, new = (QUICK_PROMPT, QUICK_ANSWER) if quick else (PROMPT, ANSWER)
        prompts = [[rng.randrange(6, vocabulary) for _ in range(length)] for _ in range(count)]
        for name, dtype in (QUICK_CACHES if quick else CACHES).items():
            arguments = ["--kv-backend", "vtensor", *KEEP, *EAGER, "--kv-cache-dtype", dtype]
            if quick:
                arguments += ["--page-size", "16", "--max-total-tokens", str(QUICK_TOKENS[name])]
                arguments += ["--max-running-requests", "128"]
            else:
                arguments += ["--mem-fraction-static", str(SHARE)]
            log = Path(folder) / f"{name}.log"
            with server("vtensor", model, log, arguments=arguments, host=quick) as (url, seconds):
                console.print(f"{name}: up in {seconds:.1f} s")
                rows.append({"cache": name} | fill(url, log, prompts, new))
            console.print(rows[-1])
    summary = {"fp8_live_tokens_vs_bf16": rows[1]["live_tokens"] / rows[0]["live_tokens"]}
    if not quick:
        results.write("live_tokens", summary, rows)
    console.print(summary)


if __name__ == "__main__":
    typer.run(main)
