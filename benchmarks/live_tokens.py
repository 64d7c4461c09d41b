"""`python -m benchmarks.live_tokens`: how many live tokens a server has when it retracts the first request, with a bf16
and with an FP8 KV cache, in the same memory. Ours, one server after the other, alone on the GPU.

More requests than have room are sent at once; each says its prompt once and answers for long. Live tokens are what
requests and the tree hold, asked for ten times a second; the most before SGLang's log says that it retracts counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.console import Console

from benchmarks import results
from benchmarks.contestants import KEEP, Client
from benchmarks.geometries import LLAMA
from benchmarks.serving import server, session

console = Console(width=150)
CACHES = {"bf16": "bfloat16", "fp8": "fp8_e4m3"}
PROMPT, ANSWER = 1024, 3072
#: Of the device: the weights and a cache that some seconds fill.
SHARE = 0.3
RETRACTS = "#retracted_reqs"


def fill(url: str, log: Path, count: int) -> dict[str, float]:
    """Send so many requests; what there was before the first was retracted."""
    client, rng = Client(url, LLAMA.vocabulary), random.Random(0)
    most, done = 0.0, threading.Event()

    async def one(http: object, prompt: list[int]) -> None:
        with contextlib.suppress(Exception):  # those that are cut off when it is known
            await client.ask(http, prompt, ANSWER)  # type: ignore[arg-type]

    async def everybody() -> None:
        async with session() as http:
            tasks = [asyncio.create_task(one(http, client.words(rng, PROMPT))) for _ in range(count)]
            while not done.is_set() and not all(task.done() for task in tasks):
                await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(everybody()))
    thread.start()
    retracted = False
    while thread.is_alive() and not retracted:
        stats = requests.get(f"{url}/server_info", timeout=30).json()["internal_states"][0]["vtensor"]
        retracted = RETRACTS in log.read_text(errors="replace")
        if not retracted:
            most = max(most, stats["live_tokens"] + stats["tree_tokens"])
        time.sleep(0.1)
    done.set()
    thread.join()
    if not retracted:
        raise RuntimeError(f"{count} requests were not enough to fill the cache: send more")
    return {"live_tokens": most, "page_bytes": stats["page_bytes"], "capacity_pages": stats["pages_capacity"]}


def main(count: Annotated[int, typer.Option(help="Requests that are sent at once.")] = 600) -> None:
    """Measure, print and write live_tokens.json."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(LLAMA.config))
        for name, dtype in CACHES.items():
            arguments = [
                "--kv-backend",
                "vtensor",
                *KEEP,
                "--kv-cache-dtype",
                dtype,
                "--mem-fraction-static",
                str(SHARE),
            ]
            log = model / f"{name}.log"
            with server("vtensor", model, log, arguments=arguments) as (url, _):
                rows.append({"cache": name} | fill(url, log, count))
            console.print(rows[-1])
    summary = {"fp8_live_tokens_vs_bf16": rows[1]["live_tokens"] / rows[0]["live_tokens"]}
    results.write("live_tokens", summary, rows)
    console.print(summary)


if __name__ == "__main__":
    typer.run(main)
