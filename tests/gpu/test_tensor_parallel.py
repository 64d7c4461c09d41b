"""Two ranks, each on a GPU of its own: the same answers as SGLang without the plugin on two ranks. Not collected on a
machine with one GPU."""

from __future__ import annotations

import pytest

from benchmarks.serving import server
from sglang_vtensor.server_client import server_stats
from tests.conversations import asking, assert_same_answers, conversation
from tests.e2e.compare import TIE, Prompts

COMMON = ["--tp", "2", "--load-format", "auto", "--mem-fraction-static", "0.3", "--cuda-graph-max-bs-decode", "16"]
COMMON += ["--disable-custom-all-reduce"]  # whether the GPUs reach each other directly is not what is tested


@pytest.mark.parametrize(
    ("cache", "tie"),
    [
        ([], TIE["bfloat16"]),
        # What one rounds up to FP8 and the other down differs by an eighth.
        (["--kv-cache-dtype", "fp8_e4m3"], 1.0),
    ],
    ids=["bfloat16", "fp8_e4m3"],
)
def test_two_ranks_answer_as_sglang_does(models, tmp_path, cache, tie):
    prompt, common = Prompts(12), [*COMMON, *cache]
    system = prompt(700)
    turns = [[system + prompt(50 + 30 * n) for n in range(8)]] + [[prompt(60 + n) for n in range(8)] for _ in range(2)]
    with server("fa3", models["gqa"], tmp_path / "fa3.log", arguments=["--attention-backend", "fa3", *common]) as (
        url,
        _,
    ):
        expected = conversation(asking(url, 40), turns)
    with server("vtensor", models["gqa"], tmp_path / "ours.log", arguments=["--kv-backend", "vtensor", *common]) as (
        url,
        _,
    ):
        got = conversation(asking(url, 40), turns, expected)
        (stats,) = server_stats(url)
    assert_same_answers(expected, got, tie=tie)
    assert all(answer.cached >= 700 for turn in got[1:] for answer in turn)
    assert stats["pages_in_place"] > 0
