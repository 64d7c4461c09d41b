"""What SGLang offers beside plain text, over shared pages: as without the plugin, token for token."""

from __future__ import annotations

import os

import pytest
import requests
import torch
from openai import OpenAI
from rich.console import Console

from sglang_vtensor import demo
from sglang_vtensor.server_client import server_stats
from tests.e2e.compare import TIE as TIES
from tests.e2e.compare import Prompts, answers_of_both, both
from tests.harness import Request

TIE = TIES["float32"]


@pytest.fixture
def pair(schedulers):
    def get(**server_args):
        return schedulers.both(server_args, {"kv_backend": "vtensor", **server_args})

    return get


def test_log_probabilities_of_a_prompt_that_is_cached(pair):
    """From the first token on nothing may come from the cache; from the middle on, what is before it."""
    reference, ours = pair()
    text = Prompts(41)(130)
    both(reference, ours, [Request("text", text, 4)], tie=TIE)
    for start in (0, 77):
        asked = [Request(f"from{start}", text, 4, logprobs_from=start)]
        (expected,), (got,) = answers_of_both(reference, ours, asked)
        assert got.cached == expected.cached == start
        assert len(got.prompt_logprobs) >= len(text) - start - 1
        torch.testing.assert_close(
            torch.tensor(got.prompt_logprobs), torch.tensor(expected.prompt_logprobs), atol=TIE, rtol=0
        )
    ours.check()


def test_embeddings_in_place_of_tokens(pair):
    reference, ours = pair(disable_radix_cache=True, chunked_prefill_size=64, dtype="bfloat16")  # SGLang's own for them
    random = torch.Generator().manual_seed(42)
    asked = [
        Request(f"e{n}", [1] * (90 + n), 12, embeds=torch.randn(90 + n, 256, generator=random).tolist())
        for n in range(3)
    ]
    both(reference, ours, asked, tie=TIES["bfloat16"], cached=[0, 0, 0])


def test_preempted_requests_come_to_their_end(pair):
    """With priorities a late request may take the memory of those that run, which are computed anew."""
    args = {"enable_priority_scheduling": True, "max_total_tokens": 1024, "max_running_requests": 6}
    reference, ours = pair(**args)
    prompt = Prompts(43)
    low = [Request(f"low{n}", prompt(120), 60, priority=1) for n in range(4)]
    high = [Request(f"high{n}", prompt(200), 40, priority=100) for n in range(2)]
    script = [low, [], [], high]
    expected, got = reference.run(script), ours.run(script)
    for request in (*low, *high):
        assert got[request.rid].tokens == expected[request.rid].tokens, request.rid
    ours.check()


def test_two_data_parallel_ranks_behind_several_tokenizers(models, tmp_path, monkeypatch):
    """Each rank has a memory of its own, and says so."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")  # one node has both ranks
    # On two cores a worker takes longer than the 10 s that SGLang gives it to import SGLang, and is started anew then.
    monkeypatch.setenv("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "900")
    arguments = ["--dp-size", "2", "--tokenizer-worker-num", "2", "--max-total-tokens", "2048", "--dtype", "float32"]
    arguments += ["--load-balance-method", "round_robin"]
    log = tmp_path / "log"
    with demo.serve(Console(), str(models["gqa"]), port=demo.free_port(), log=log, arguments=arguments) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "user", "content": "please explain how a segment shows the pages of one path " * 4}]
        asked = {"model": "default", "messages": messages, "max_tokens": 8, "temperature": 0}
        said = {client.chat.completions.create(**asked).choices[0].message.content for _ in range(6)}
        assert len(said) == 1
        ranks = server_stats(url)
        assert sorted(rank["dp_rank"] for rank in ranks) == [0, 1]
        assert all(rank["tree_tokens"] > 0 for rank in ranks), "both were asked"
        answer = requests.post(f"{url}/vtensor/limit", json={"limit": 0.5}, timeout=60)
        assert answer.status_code == 404, "SGLang loads no plugin in its HTTP workers"
        text = log.read_text(errors="replace")  # behind that are SGLang's own tracebacks of workers that end
    missing = "GET /vtensor and POST /vtensor/limit, /vtensor/sleep and /vtensor/wake are not there"
    assert f"--tokenizer-worker-num 2: {missing}" in text
    assert "Traceback" not in text, text[-3000:]
