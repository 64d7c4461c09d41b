"""Conversations with a server over HTTP, by token ids."""

from __future__ import annotations

from typing import Any

import requests

from tests.harness import Answer


def conversation(
    url: str, turns: list[list[list[int]]], reference: list[list[Answer]] | None = None, *, new: int = 40
) -> list[list[Answer]]:
    """Ask every turn's questions at once, each behind what its own conversation has been so far, or that of the
    reference: from a tie on they would be other texts."""
    histories: list[list[int]] = [[] for _ in turns[0]]
    answers: list[list[Answer]] = []
    for number, turn in enumerate(turns):
        histories = [history + said for history, said in zip(histories, turn, strict=True)]
        answers.append(ask(url, histories, new=new))
        goes_on = answers[-1] if reference is None else reference[number]
        histories = [history + one.tokens for history, one in zip(histories, goes_on, strict=True)]
    return answers


def ask(url: str, prompts: list[list[int]], *, new: int) -> list[Answer]:
    """All of them at once."""
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    answer = requests.post(f"{url}/generate", json=body, timeout=120)
    answer.raise_for_status()
    return [_told(one) for one in answer.json()]


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
