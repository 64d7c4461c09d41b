"""The client of vLLM, against a server that speaks as vLLM does; and the shell file that vLLM is started with."""

import asyncio
import contextlib
import json
import random
import subprocess
from dataclasses import replace

import pytest
from aiohttp import web

from benchmarks import contestants
from benchmarks.serving import session

METRICS = (
    'vllm:cache_config_info{block_size="16",cache="a, b",num_gpu_blocks="64",num_gpu_blocks_override="None"} 1.0\n'
)


async def complete(request):
    """Two parts of the answer, and the account, which says what was in the cache."""
    asked = await request.json()
    assert asked["ignore_eos"]
    assert asked["return_token_ids"]
    answer = web.StreamResponse()
    await answer.prepare(request)
    new = list(range(asked["max_tokens"]))
    parts = [{"choices": [{"text": "", "token_ids": ids}]} for ids in (new[:1], new[1:])]
    usage = {"usage": {"prompt_tokens_details": {"cached_tokens": len(asked["prompt"]) // 2}}, "choices": []}
    for part in [*parts, usage]:
        await answer.write(b"data: " + json.dumps(part).encode() + b"\n\n")
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def ask_all(calls):
    """What each of `calls(url)` returns, from a server that lives as long."""

    async def metrics(request):
        return web.Response(text=METRICS)

    async def version(request):
        return web.json_response({"version": "0.33.0"})

    async def reset(request):
        return web.json_response({"success": True})

    async def flush(request):
        """As SGLang's, of which a request ends within 10 s."""
        return web.Response(status=200 if float(request.query.get("timeout", 0)) >= 10 else 400)

    app = web.Application()
    app.router.add_post("/flush_cache", flush)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/version", version)
    app.router.add_post("/reset_prefix_cache", reset)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    try:
        return await asyncio.to_thread(calls, url)
    finally:
        await runner.cleanup()


def test_vllm_answers_with_tokens_and_says_what_it_had():
    async def talk(client, rng):
        async with session() as http:
            assert await client.ask(http, client.words(rng, 10), 4) == [0, 1, 2, 3]

    def calls(url):
        client = contestants.VllmClient(url, 400)
        measured = client.run(talk, seed=1)
        return client.kv_tokens(), client.versions(), measured

    room, versions, measured = asyncio.run(ask_all(calls))
    assert (room, versions) == (1024, {"vllm": "0.33.0"})
    assert (measured["requests"], measured["cached_share"]) == (1, 0.5)


def test_a_flush_waits_for_requests_that_end():
    asyncio.run(ask_all(lambda url: contestants.Client(url, 400).flush()))


def test_an_answer_of_another_length_is_no_measurement(monkeypatch):
    async def short(self, http, tokens, new):
        return contestants.Said(0.0, 1.0, 2.0, 1.0, [1], {"cached_tokens": 0})

    monkeypatch.setattr(contestants.Client, "said", short)
    with pytest.raises(RuntimeError, match="1 tokens where 2"):
        contestants.Client("http://nobody", 400).drive(lambda client, rng: client.ask(None, [1], 2), seed=0)


def test_vllm_starts_in_the_environment_of_its_shell_file(tmp_path):
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$MARK" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    boot = tmp_path / "boot"
    boot.write_text(f"export MARK=sourced PATH={tmp_path}:$PATH\n")
    plan = contestants.Plan(tmp_path, 400, 65_536, 2048, vllm_boot=boot)
    for dtype, share in (("auto", 1), ("fp8_e4m3", 2)):
        command = contestants.vllm_command(replace(plan, kv_cache_dtype=dtype), 1234)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith("sourced -m vllm.entrypoints.openai.api_server --model")
        assert f"--kv-cache-memory-bytes {2048 * contestants.LLAMA.token_bytes // share}" in said


@pytest.mark.parametrize("left", [0, 2])
def test_rounds_begin_when_our_kernels_are_compiled(tmp_path, monkeypatch, left):
    up, waited = [], []

    @contextlib.contextmanager
    def started(name, *_, **__):
        yield lambda: up.append(name) or 1.0

    def wait(url):
        waited.append((url, len(up)))
        return left

    monkeypatch.setattr(contestants, "started", started)
    monkeypatch.setattr(contestants.Client, "kv_tokens", lambda _: 0)
    monkeypatch.setattr(contestants.precompile, "wait", wait)
    plan = contestants.Plan(tmp_path / "model", 400, 4096, 8192, host=True)
    fails = pytest.raises(RuntimeError, match="vtensor did not compile 2 kernels") if left else contextlib.nullcontext()
    with fails, contestants.servers(["vtensor", "torch_native"], plan) as (clients, _):
        assert waited == [(clients["vtensor"].url, 2)], "all servers start meanwhile"


def test_words_are_equal_for_equal_seeds():
    one, other = (contestants.Client("", 400).words(random.Random(3), 8) for _ in range(2))
    assert one == other
