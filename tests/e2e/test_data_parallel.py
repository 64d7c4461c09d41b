"""Two data-parallel ranks on the host backend: each has a memory of its own, and both answer as one rank of SGLang
without the plugin does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.serving import server
from sglang_vtensor.server_client import ask as ask_for
from sglang_vtensor.server_client import server_stats
from tests.conversations import asking, assert_same_answers, conversation
from tests.e2e.compare import TIE, Prompts
from tests.harness import Request
from tests.waiting import wait_for

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_two_ranks_have_a_memory_each(models, schedulers, tmp_path, cache):
    reference, new, prompt = schedulers(kv_cache_dtype=cache), 16, Prompts(61)
    tie = TIE["float32" if cache == "auto" else "fp8"]
    turns = [[prompt(40 + 9 * n) for n in range(6)]] + [[prompt(12 + n) for n in range(6)] for _ in range(2)]

    def one_rank(prompts):
        return reference.generate(*[Request(f"p{n}", prompt, new) for n, prompt in enumerate(prompts)])

    expected = conversation(one_rank, turns)
    arguments = ["--kv-backend", "vtensor", "--page-size", "16", "--dp", "2", "--kv-cache-dtype", cache]
    with pytest.MonkeyPatch.context() as environment:
        cores = sorted(os.sched_getaffinity(0))
        environment.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        with server("vtensor", models["gqa"], tmp_path / "dp.log", arguments=arguments, host=True) as (url, _):
            got = conversation(asking(url, new), turns, expected)
            assert_same_answers(expected, got, tie=tie, what="two ranks,")
            ranks = server_stats(url)
            assert [rank["dp_rank"] for rank in ranks] == [0, 1]
            untold = {name for name in ranks[0] if f"`{name}`" not in OPERATIONS.read_text()}
            assert not untold, "statistics that docs/operations.md does not have"
            assert all(rank["pages_allocated"] > 0 and rank["tree_tokens"] > 0 for rank in ranks), "both served"
            ask_for(url, "limit", {"limit": f"{8 * ranks[0]['page_bytes']}B"})
            # The worker gives back what is beyond it.
            wait_for(lambda: all(rank["backed_bytes"] <= 8 * rank["page_bytes"] for rank in server_stats(url)))
            got = conversation(asking(url, new), turns[:1])
            assert_same_answers(expected[:1], got, tie=tie, what="a limit each,")
