"""The servers that the prefix suite compares, how much of the GPU each may take, and how each is asked.

SGLang's servers and ours are asked through `/generate`; vLLM's through `/v1/completions`, with prompts and answers as
token ids. All stream their first token at once and then every `STREAM_INTERVAL`, and all have room for the same number
of tokens. vLLM has an environment of its own: a shell file, sourced before its command.

Servers that stand side by side start at the same time. Each has a fixed number of tokens, and a static fraction so high
that the number decides: SGLang takes the lesser of it and of what is free beyond that fraction's rest. Ours keeps free
pages as the others keep their pools, so that it does not give memory back to the driver while others are measured;
`vtensor-elastic` gives it back after 3 s, as ours does by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import requests

from benchmarks.geometries import LLAMA, Geometry
from benchmarks.serving import CONTESTANTS, STREAM_INTERVAL, Said, command, longest, started, stream
from sglang_vtensor import precompile
from sglang_vtensor.demo import free_port

KEEP = ["--vtensor-idle-seconds", "3600"]
GPU = {name: args for name, args in CONTESTANTS.items() if name != "vtensor"}
GPU |= {f"{name}-nocache": [*args, "--disable-radix-cache"] for name, args in CONTESTANTS.items()}
GPU |= {
    "vtensor": [*CONTESTANTS["vtensor"], *KEEP],
    "vtensor-elastic": CONTESTANTS["vtensor"],
    # Decode reads what requests share once for each of them.
    "vtensor-plain": [*CONTESTANTS["vtensor"], *KEEP, "--vtensor-shared-decode", "off"],
    # Beside torch_memory_saver, which keeps the weights, and SGLang's own KV cache too.
    "vtensor-saver": [*CONTESTANTS["vtensor"], *KEEP, "--enable-memory-saver"],
    "fa3-saver": [*CONTESTANTS["fa3"], "--enable-memory-saver"],
    "vllm": [],
}
# A server that waits must not take one of the few cores from the one that works.
HOST = {
    "vtensor": ["--kv-backend", "vtensor"],
    "torch_native": ["--attention-backend", "torch_native", "--sleep-on-idle"],
}
HOST_TOKENS = 8192

#: Of the device, for the driver and for what fragments.
SPARE = 0.02
#: Page sizes divide it.
ROUND_TOKENS = 1024
START_SECONDS = 480
#: Within which requests end that nobody waits for any more.
FLUSH_SECONDS = 30.0
#: After a flush, so that a round does not begin with work that the round before left.
SETTLE_SECONDS = 1.0
#: What our server counted in a round.
COUNTED = (
    "pages_allocated",
    "pages_with_memory",
    "pages_created_at_once",
    "pages_in_place",
    "contexts",
    "context_runs",
    "broken_runs",
    "partial_copies",
    "tails_continued",
    "awaited_prefixes",
    "pages_created",
    "pages_released",
    "worker_seconds",
    "worker_driver_seconds",
    "decode_steps_shared",
    "decode_steps_plain",
    "shared_bytes_saved",
)

Workload = Callable[["Client", random.Random], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Staged:
    """A workload whose prompts are computed first. That takes `prompt_seconds`, and the clock starts behind it; both
    parts are given random numbers of one seed."""

    prompts: Workload
    answers: Workload


def capacity(device_bytes: int, servers: int, geometry: Geometry = LLAMA, server_bytes: int | None = None) -> int:
    """KV tokens for each of so many servers on one device, each of which needs `server_bytes` beside them; 0 or less if
    they do not fit."""
    free = int(device_bytes * (1 - SPARE)) - servers * (server_bytes or geometry.server_bytes)
    return free // servers // geometry.token_bytes // ROUND_TOKENS * ROUND_TOKENS


@dataclass
class Answer:
    """One request: seconds since the start of the run, the longest between two chunks of the stream, and tokens."""

    sent: float
    first: float
    last: float
    gap: float
    prompt: int
    cached: int
    new: int

    @property
    def waited(self) -> float:
        """The longest that the client heard nothing, in seconds."""
        return max(self.first - self.sent, self.gap)


@dataclass
class Client:
    """Requests by token ids to SGLang, streamed; remembers what each took."""

    url: str
    vocabulary: int
    temperature: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    async def said(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> Said:
        return await stream(http, self.url, tokens, new, self.temperature)

    async def ask(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> list[int]:
        """The new tokens. Raises `aiohttp.ClientResponseError` if the server refuses, `RuntimeError` for an answer of
        another length."""
        said = await self.said(http, tokens, new)
        if len(said.tokens) != new:
            raise RuntimeError(f"{self.url} answered {len(said.tokens)} tokens where {new} were wanted")
        cached = said.meta["cached_tokens"]
        self.answers.append(Answer(said.sent, said.first, said.last, said.gap, len(tokens), cached, new))
        return said.tokens

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = requests.get(f"{self.url}/server_info", timeout=30).json()["internal_states"][0]
        return state

    def stats(self) -> dict[str, Any]:
        """What our server counted since it started; nothing for others."""
        stats: dict[str, Any] = self._state().get("vtensor", {})
        return stats

    def kv_tokens(self) -> int:
        """The capacity that the server came up with; 0 if it does not say."""
        return int(self._state()["memory_usage"]["token_capacity"])

    def versions(self) -> dict[str, str]:
        """Of packages that this process does not have."""
        return {}

    def flush(self) -> None:
        """Requests of a round may still be ending; the server waits for them. Raises `requests.HTTPError` if they stay
        for longer."""
        flushed = requests.post(f"{self.url}/flush_cache", params={"timeout": FLUSH_SECONDS}, timeout=2 * FLUSH_SECONDS)
        flushed.raise_for_status()

    def words(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(6, self.vocabulary) for _ in range(count)]

    def drive(self, workload: Workload, seed: int) -> float:
        """Do the workload. Returns seconds; `answers` are what came of it."""
        self.answers = []
        start = time.perf_counter()
        asyncio.run(workload(self, random.Random(seed)))
        return time.perf_counter() - start

    def run(self, workload: Workload | Staged, seed: int) -> dict[str, Any]:
        """One round, from an empty cache: a row of the results."""
        self.flush()
        time.sleep(SETTLE_SECONDS)
        prompts = {}
        if isinstance(workload, Staged):
            prompts["prompt_seconds"] = round(self.drive(workload.prompts, seed), 3)
            workload = workload.answers
        before = self.stats()
        seconds = self.drive(workload, seed)
        return row(self.answers, seconds) | prompts | self.counted(before, seconds)

    def counted(self, before: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What our server counted since it said `before`, which is `seconds` ago."""
        after = self.stats()
        if not after:
            return {"mapping_share": 0.0}
        waited = after["scheduling_seconds"] - before["scheduling_seconds"]
        counted = {"mapping_share": round(waited / seconds, 5), "backed_bytes": after["backed_bytes"]}
        return counted | {key: after[key] - before[key] for key in COUNTED}


class VllmClient(Client):
    """The same requests to vLLM."""

    async def said(self, http: aiohttp.ClientSession, tokens: list[int], new: int) -> Said:
        body = {
            "model": VLLM_NAME,
            "prompt": tokens,
            "max_tokens": new,
            "temperature": self.temperature,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent = time.perf_counter()
        times, lines = [], []
        async with http.post(f"{self.url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                    lines.append(line)
        times.append(time.perf_counter())
        parts = [json.loads(line[6:]) for line in lines]  # read when all is there: the client must not be the slow one
        if refused := next((part["error"] for part in parts if "error" in part), None):
            raise RuntimeError(f"{self.url} says {refused}")
        ids = [token for part in parts for choice in part["choices"] for token in choice["token_ids"]]
        # Where nothing was found in the cache, vLLM leaves the details out.
        details = parts[-1]["usage"].get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or 0
        return Said(sent, times[0], times[-1], longest(times), ids, {"cached_tokens": cached})

    def stats(self) -> dict[str, Any]:
        return {}

    def kv_tokens(self) -> int:
        metrics = requests.get(f"{self.url}/metrics", timeout=30).text
        config = next((line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{")), "")
        blocks, size = (re.search(rf'\b{key}="(\d+)"', config) for key in ("num_gpu_blocks", "block_size"))
        return int(blocks[1]) * int(size[1]) if blocks and size else 0

    def versions(self) -> dict[str, str]:
        return {"vllm": requests.get(f"{self.url}/version", timeout=30).json()["version"]}

    def flush(self) -> None:
        """Blocks of the last requests may still be held for a moment. Raises `RuntimeError` if they stay so."""
        for _ in range(50):
            done = requests.post(f"{self.url}/reset_prefix_cache", timeout=30)
            done.raise_for_status()
            if done.json()["success"]:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.url} did not reset its prefix cache")


VLLM_NAME = "llama"


def vllm_command(plan: Plan, port: int) -> list[str]:
    """vLLM as it ships, with room for as many tokens. Its check of free memory at the start asks for a share of the
    device; the size of the cache is given in bytes instead, so that share is small."""
    model, fp8 = plan.model, plan.kv_cache_dtype.startswith("fp8")
    vllm = ["vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", VLLM_NAME]
    vllm += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--load-format", "dummy", "--seed", "0"]
    vllm += ["--max-model-len", str(plan.context), "--enable-prefix-caching"]
    vllm += ["--kv-cache-dtype", plan.kv_cache_dtype, "--gpu-memory-utilization", "0.1"]
    vllm += ["--kv-cache-memory-bytes", str(plan.tokens * plan.geometry.token_bytes // (2 if fp8 else 1))]
    vllm += ["--enable-prompt-tokens-details", "--uvicorn-log-level", "warning"]
    interval = plan.stream_interval if plan.text else STREAM_INTERVAL
    vllm += ["--stream-interval", str(interval), *([] if plan.text else ["--skip-tokenizer-init"])]
    return in_vllm(plan, ["-m", *vllm])


def in_vllm(plan: Plan, arguments: list[str]) -> list[str]:
    """The command that runs Python with these arguments where vLLM is."""
    if plan.vllm_boot is None:
        return [sys.executable, *arguments]
    return ["bash", "-c", '. "$0" && exec "$@"', str(plan.vllm_boot.resolve()), "python3", *arguments]


@dataclass(frozen=True)
class Plan:
    """How servers are started: all with the same model and the same room. With `text` they read and write text, and
    stream every `stream_interval` tokens, where they ship with 1. `devices` has a GPU for each server (as
    CUDA_VISIBLE_DEVICES names it); if it is empty, all are on the first."""

    model: Path
    vocabulary: int
    context: int
    tokens: int
    host: bool = False
    vllm_boot: Path | None = None
    kv_cache_dtype: str = "auto"
    geometry: Geometry = LLAMA
    temperature: float = 0.0
    text: bool = False
    stream_interval: int = 1
    devices: tuple[str, ...] = ()


def row(answers: list[Answer], seconds: float, given_up: Sequence[float] = ()) -> dict[str, Any]:
    """Throughput, times to the first token and between tokens (ms), and how much of the prompts was cached. Requests
    that were `given_up` after so many seconds count among the times to the first token."""
    first = sorted(1000 * one for one in [*(answer.first - answer.sent for answer in answers), *given_up])
    between = sorted(1000 * (answer.last - answer.first) / (answer.new - 1) for answer in answers if answer.new > 1)
    prompt, new = sum(answer.prompt for answer in answers), sum(answer.new for answer in answers)

    def at(values: list[float], share: float) -> float:
        return round(values[int(share * (len(values) - 1))], 2) if values else 0.0

    return {
        "seconds": round(seconds, 3),
        "requests": len(answers),
        "requests_per_second": round(len(answers) / seconds, 3),
        "tokens_per_second": round((prompt + new) / seconds, 1),
        "output_tokens_per_second": round(new / seconds, 1),
        "ttft_median_ms": at(first, 0.5),
        "ttft_p99_ms": at(first, 0.99),
        "tpot_median_ms": at(between, 0.5),
        "tpot_p99_ms": at(between, 0.99),
        "cached_share": round(sum(answer.cached for answer in answers) / prompt, 4) if prompt else 0.0,
    }


@contextlib.contextmanager
def servers(names: list[str], plan: Plan) -> Iterator[tuple[dict[str, Client], dict[str, float]]]:
    """Start contestants, all at once. Yields, when all are up, who asks each, and the seconds that each took. Raises
    `RuntimeError` if one does not start, or comes up with another capacity than planned, or without its kernels."""
    with contextlib.ExitStack() as stack:
        waits: dict[str, Callable[[], float]] = {}
        clients: dict[str, Client] = {}
        ports: set[int] = set()
        for number, name in enumerate(names):
            ports.add(port := free_port(ports))
            log = plan.model.parent / f"{name}.log"
            environment, folder = dict(os.environ), None
            if plan.devices:
                environment["CUDA_VISIBLE_DEVICES"] = plan.devices[number]
            client: type[Client]
            if name == "vllm":
                what = vllm_command(plan, port)
                environment["VLLM_SERVER_DEV_MODE"] = "1"  # it must forget its prefixes between rounds
                folder = plan.model  # not the repository's, whose folders have names that vLLM imports
                health, client = "/health", VllmClient
            else:
                arguments = HOST[name] if plan.host else [*GPU[name], "--mem-fraction-static", "0.98"]
                arguments = [*arguments, "--max-total-tokens", str(plan.tokens)]
                arguments += ["--kv-cache-dtype", plan.kv_cache_dtype]
                arguments += ["--stream-interval", str(plan.stream_interval)] if plan.text else []
                what = command(plan.model, port, arguments, environment, host=plan.host, text=plan.text)
                health, client = "/health_generate", Client
            url = f"http://127.0.0.1:{port}"
            wait = started(name, what, url, log, environment, health=health, folder=folder, patience=START_SECONDS)
            waits[name] = stack.enter_context(wait)
            clients[name] = client(url, plan.vocabulary, plan.temperature)
        seconds = {name: wait() for name, wait in waits.items()}
        for name, up in clients.items():
            if (room := up.kv_tokens()) and abs(room - plan.tokens) > ROUND_TOKENS:
                raise RuntimeError(f"{name} has room for {room} tokens, and not for {plan.tokens}")
        for name, up in clients.items():
            compiled(name, up.url)
        yield clients, seconds


def compiled(name: str, url: str) -> None:
    """Until a server of ours has its kernels: it answers before, and uses others until then. Raises `RuntimeError` if
    some do not compile."""
    if name.startswith("vtensor") and (left := precompile.wait(url)):
        raise RuntimeError(f"{name} did not compile {left} kernels")
