"""Conversations by token ids, with a server over HTTP or with whoever else answers, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import requests

from tests.e2e.compare import assert_same
from tests.harness import Answer


def conversation(
    ask: Callable[[list[list[int]]], list[Answer]],
    turns: list[list[list[int]]],
    reference: list[list[Answer]] | None = None,
) -> list[list[Answer]]:
    """Ask every turn's questions at once, each behind what its own conversation has been so far, or that of the
    reference: from a tie on they would be other texts."""
    histories: list[list[int]] = [[] for _ in turns[0]]
    answers: list[list[Answer]] = []
    for number, turn in enumerate(turns):
        histories = [history + said for history, said in zip(histories, turn, strict=True)]
        answers.append(ask(histories))
        goes_on = answers[-1] if reference is None else reference[number]
        histories = [history + one.tokens for history, one in zip(histories, goes_on, strict=True)]
    return answers


def asking(url: str, new: int) -> Callable[[list[list[int]]], list[Answer]]:
    """Asks a server for `new` tokens behind each of some prompts, all of them at once."""

    def ask(prompts: list[list[int]]) -> list[Answer]:
        body = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        return [_told(one) for one in answer.json()]

    return ask


def flush(url: str) -> requests.Response:
    """The scheduler may not be done with what was answered: SGLang waits for that."""
    answer = requests.post(f"{url}/flush_cache", params={"timeout": 60}, timeout=120)
    answer.raise_for_status()
    return answer


def assert_same_answers(expected: list[list[Answer]], got: list[list[Answer]], *, tie: float, what: str = "") -> None:
    """Of every turn of every conversation."""
    for number, (theirs, mine) in enumerate(zip(expected, got, strict=True)):
        for n, (one, other) in enumerate(zip(theirs, mine, strict=True)):
            assert_same(one, other, tie=tie, what=f"{what} turn {number}, conversation {n}")


def _told(answer: dict[str, Any]) -> Answer:
    meta = answer["meta_info"]
    best = meta["output_top_logprobs"]
    return Answer(
        tokens=answer["output_ids"],
        cached=meta["cached_tokens"],
        retractions=0,
        finish=str(meta["finish_reason"]),
        gaps=[first[0] - second[0] for first, second in best],
    )
