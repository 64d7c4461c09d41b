"""Two ranks, each on a GPU of its own: the same answers as SGLang without the plugin on two ranks. Not collected on a
machine with one GPU."""

from __future__ import annotations

from typing import Any

import requests

from benchmarks.serving import server
from sglang_vtensor.server_client import server_stats
from tests.e2e.compare import TIE, Prompts, assert_same
from tests.harness import Answer

COMMON = ["--tp", "2", "--load-format", "auto", "--mem-fraction-static", "0.3", "--cuda-graph-max-bs-decode", "16"]
COMMON += ["--disable-custom-all-reduce"]  # whether the GPUs reach each other directly is not what is tested


def conversation(
    url: str, turns: list[list[list[int]]], reference: list[list[Answer]] | None = None
) -> list[list[Answer]]:
    """Ask every turn's questions at once, each behind what its own conversation has been so far, or that of the
    reference: from a tie on they would be other texts."""
    histories: list[list[int]] = [[] for _ in turns[0]]
    answers: list[list[Answer]] = []
    for number, turn in enumerate(turns):
        histories = [history + said for history, said in zip(histories, turn, strict=True)]
        body = {
            "input_ids": histories,
            "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=120)
        answer.raise_for_status()
        answers.append([told(one) for one in answer.json()])
        goes_on = answers[-1] if reference is None else reference[number]
        histories = [history + one.tokens for history, one in zip(histories, goes_on, strict=True)]
    return answers


def told(answer: dict[str, Any]) -> Answer:
    meta = answer["meta_info"]
    best = meta["output_top_logprobs"]
    return Answer(
        tokens=answer["output_ids"],
        cached=meta["cached_tokens"],
        retractions=0,
        finish=str(meta["finish_reason"]),
        gaps=[first[0] - second[0] for first, second in best],
    )


def test_two_ranks_answer_as_sglang_does(models, tmp_path):
    prompt = Prompts(12)
    system = prompt(700)
    turns = [[system + prompt(50 + 30 * n) for n in range(8)]] + [[prompt(60 + n) for n in range(8)] for _ in range(2)]
    with server("fa3", models["gqa"], tmp_path / "fa3.log", arguments=["--attention-backend", "fa3", *COMMON]) as (
        url,
        _,
    ):
        expected = conversation(url, turns)
    with server("vtensor", models["gqa"], tmp_path / "ours.log", arguments=["--kv-backend", "vtensor", *COMMON]) as (
        url,
        _,
    ):
        got = conversation(url, turns, expected)
        (stats,) = server_stats(url)
    for number, (theirs, mine) in enumerate(zip(expected, got, strict=True)):
        for n, (one, other) in enumerate(zip(theirs, mine, strict=True)):
            assert_same(one, other, tie=TIE["bfloat16"], what=f"turn {number}, conversation {n}")
    assert all(answer.cached >= 700 for turn in got[1:] for answer in turn)
    assert stats["adoptions"] > 0
