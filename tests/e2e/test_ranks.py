"""A server of two ranks on the host backend: they schedule alike, whatever is asked of them, and answer as one rank of
SGLang without the plugin does."""

from __future__ import annotations

import contextlib
import os

import pytest

from benchmarks.serving import server
from sglang_vtensor.server_client import ask as ask_for
from sglang_vtensor.server_client import server_stats
from tests.conversations import asking, assert_same_answers, conversation
from tests.e2e.compare import TIE, Prompts
from tests.harness import Request
from tests.waiting import wait_for


@pytest.fixture(params=["auto", "fp8_e4m3"])
def cache(request):
    return request.param


@pytest.fixture
def two_ranks(models, tmp_path, cache):
    cores = sorted(os.sched_getaffinity(0))
    arguments = ["--kv-backend", "vtensor", "--tp", "2", "--disable-custom-all-reduce"]
    arguments += ["--kv-cache-dtype", cache]
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")  # one node has both ranks
            environment.setenv("SGLANG_NCCL_SO_PATH", "none")  # SGLang would take NCCL for the host's tensors
            environment.setenv("TORCHDYNAMO_DISABLE", "1")  # a minute of compiling
            started = server("vtensor", models["gqa"], tmp_path / "ranks.log", arguments=arguments, host=True)
            url, _ = running.enter_context(started)
        yield url


def test_two_ranks_answer_as_one_does(two_ranks, schedulers, cache):
    reference = schedulers(kv_cache_dtype=cache)
    tie = TIE["float32" if cache == "auto" else "fp8"]
    prompt = Prompts(31)
    system = prompt(90)
    turns = [[system + prompt(10 + 9 * n) for n in range(5)]] + [[prompt(12 + n) for n in range(5)] for _ in range(2)]
    new = 20

    def one_rank(prompts):
        return reference.generate(*[Request(f"p{n}", prompt, new) for n, prompt in enumerate(prompts)])

    expected = conversation(one_rank, turns)

    def compare(what):
        got = conversation(asking(two_ranks, new), turns, expected)
        assert_same_answers(expected, got, tie=tie, what=f"{what},")

    compare("at first")
    (stats,) = server_stats(two_ranks)
    assert stats["pages_in_place"] > 0
    said = sum(len(tokens) + new for turn in turns for tokens in turn)
    assert stats["tree_tokens"] >= said - 4 * len(system) - new * len(turns[0])

    # Less than all of them need at once: what does not fit waits, on both ranks alike.
    ask_for(two_ranks, "limit", {"limit": f"{24 * stats['page_bytes']}B"})
    compare("with a limit")
    wait_for(lambda: server_stats(two_ranks)[0]["backed_bytes"] <= 24 * stats["page_bytes"])  # the worker does it

    ask_for(two_ranks, "sleep")
    wait_for(lambda: server_stats(two_ranks)[0]["pages_backed"] == 1)
    assert server_stats(two_ranks)[0]["sleeping"] == 1
    ask_for(two_ranks, "wake")
    ask_for(two_ranks, "limit", {"limit": "all"})
    compare("awake again")
